"""One task at a site: the accepted code runs, which is the installed one, or the coordinator learns why not.

Flower's own command would unpack the bundle that the SuperLink hands it and run what is in there. Here the bundle is
hashed and never unpacked: its hash must be that of a study that this site accepted, and then the installed
`client.app` runs, from which that bundle was built. Otherwise every message is answered by a reason code.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import CodeError, FedbridgeError
from bridge.flower_names import flower_module, replace_names
from bridge.installation import check_installation
from bridge.messages import CONFIG, METRICS, ReasonCode
from client.deployment.abrupt import die_of_signals, end_with_executor
from client.errors import NotAcceptedError, SiteFileError
from client.site import Site, open_site

if TYPE_CHECKING:
    from flwr.app import Context, Message

    App = Callable[[Message, Context], Message]

SITE_VARIABLE = "FEDBRIDGE_SITE"
"""Environment: path of the site file, set by the executor."""

TOKEN_VARIABLE = "FEDBRIDGE_TASK_TOKEN"
"""Environment: the task's token, set by the executor."""

MESSAGES_LOG = "messages.jsonl"
"""In the site's state folder: what each message cost (`client.effort`)."""


def main() -> None:
    """Entry point of a task's process; only the executor starts it."""
    end_with_executor()
    try:
        run = pinned_clientapp(open_site(Path(os.environ.pop(SITE_VARIABLE, "."))))
    except FedbridgeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(int(error.exit_code)) from None
    # Only this process's list changes: what the machine's users see of its command line does not.
    sys.argv += ["--token", os.environ.pop(TOKEN_VARIABLE, "")]
    run()


def pinned_clientapp(site: Site) -> Callable[[], None]:
    """Flower's `flwr_clientapp()`, held to accepted bundles and the installed app. Raises `CodeError` where this Flower
    is another."""
    runtime = flower_module("flwr.supernode.runtime.run_clientapp", ("run_clientapp", "register_signal_handlers"))
    command = flower_module("flwr.supernode.cli.flwr_clientapp", ("flwr_clientapp", "run_clientapp"))
    chosen: list[App] = []

    def look_at(content: bytes, **_: Any) -> None:
        chosen.append(app_for(site, content))

    replacements: dict[str, Callable[..., Any]] = {
        "install_from_fab": look_at,
        "get_load_client_app_fn": lambda *_, **__: lambda *_: answering(site, chosen[-1]),
        "install_app_dependencies": _refuse_dependencies,
        "register_signal_handlers": die_of_signals(runtime.register_signal_handlers),
    }
    replace_names(runtime, "run_clientapp", replacements)
    run: Callable[[], None] = command.flwr_clientapp
    return run


def app_for(site: Site, bundle: bytes) -> App:
    """The installed app where this site accepted the bundle; otherwise one that answers why it did not. Never raises:
    Flower would send the error's text."""
    try:
        return _installed_app(site, bundle)
    except Exception as error:
        return _refusing(error)


def answering(site: Site, app: App) -> App:
    """The app with what surrounds it: the site must be the executor's own, whatever gets past the app leaves as a code,
    and what the message cost is written down."""
    from client.redact import redact

    def answer(message: Message, context: Context) -> Message:
        reply = redact(message, context, _of_this_site(site, app))
        _record(site, message, reply)
        return reply

    return answer


def _installed_app(site: Site, bundle: bytes) -> App:
    from client.study.acceptance import require_code
    from client.study.running import set_running_bundle

    try:
        check_installation()
    except CodeError as error:
        raise NotAcceptedError(
            ReasonCode.CODE_NOT_ACCEPTED, error.what, why=error.why, fix=f"{error.fix}, then restart the services"
        ) from error
    sha256 = hashlib.sha256(bundle).hexdigest()
    require_code(site, sha256)
    set_running_bundle(sha256)
    from client.app import app

    return app


def _refusing(error: Exception) -> App:
    def refuse(message: Message, context: Context) -> Message:
        raise error

    return refuse


def _of_this_site(site: Site, app: App) -> App:
    """Another SuperNode on this site's port would hand over its own site's messages."""

    def checked(message: Message, context: Context) -> Message:
        if Path(str(context.node_config.get("site"))).resolve() != site.path.resolve():
            raise SiteFileError(
                "the SuperNode and the executor belong to different sites",
                why=f"the executor runs for {site.path}",
                fix="give each site of a machine its own deployment.port, and restart its services",
            )
        return app(message, context)

    return checked


def _record(site: Site, message: Message, reply: Message) -> None:
    from client.effort import Effort, peak_bytes, record_effort, seconds_since_start

    effort = Effort(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        run=str(message.metadata.run_id),
        message=message.metadata.message_type,
        round=_round(message),
        seconds=seconds_since_start(),
        peak_bytes=peak_bytes(),
        outcome=outcome_of(reply),
    )
    record_effort(site.state_folder / MESSAGES_LOG, effort)


def outcome_of(reply: Message) -> str:
    """`OK`, or the reason code's name: of an error, or of a `describe` that says why the site can't take part."""
    if reply.has_error():
        code = reply.error.code
    else:
        metrics = reply.content.metric_records.get(METRICS)
        reason = metrics.get("reason", 0) if metrics is not None else 0
        code = reason if isinstance(reason, int) else 0
    return ReasonCode(code).name if code in set(ReasonCode) else str(code)


def _round(message: Message) -> int | None:
    config = message.content.config_records.get(CONFIG)
    value = config.get("round") if config is not None else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _refuse_dependencies(*_: Any, **__: Any) -> None:
    raise RuntimeError("a site installs nothing at run time")


if __name__ == "__main__":
    main()
