"""`fedbridge-server init|renew|enrol|revoke|sites|start|stop|status`: the coordinator's own machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.coordinator.folder import CoordinatorFolder
    from server.coordinator.initialise import Initialised
    from server.coordinator.status import SiteStatus, Status

FolderArgument = Annotated[Path, typer.Argument(metavar="[DIR]", help="The coordinator's folder.")]
FolderOption = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The coordinator's folder.")]
_WARN_DAYS = 30
_AWAIT_SECONDS = 60.0


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command("init")(init_command)
    app.command("renew")(renew_command)
    app.command("enrol")(enrol_command)
    app.command("revoke")(revoke_command)
    app.command("sites")(sites_command)
    app.command("start")(start_command)
    app.command("stop")(stop_command)
    app.command("status")(status_command)
    app.command("superlink")(superlink_command)
    app.command("executor")(executor_command)
    app.command("proxy")(proxy_command)
    app.command("serve", hidden=True)(serve_command)


def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    name: Annotated[
        str | None, typer.Option("--name", help="The coordinator's name, as in every job and policy.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="What sites connect to: this machine's name or address.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="The one port that is open to the sites.", show_default="8443")
    ] = None,
    superlink_port: Annotated[
        int | None,
        typer.Option(
            "--superlink-port",
            help="Port of Flower's SuperLink on 127.0.0.1; open to nobody.",
            show_default="8000",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write everything but the keys anew.")] = False,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="Make new keys too: every site then needs the new coordinator.yaml.")
    ] = False,
) -> None:
    """Make the coordinator's folder: authority, certificate, signing key, nginx configuration, systemd units.

    What is there already is kept, also the settings in server.yaml that no option names; the first time, name and host
    are needed. Reads and writes that folder alone.
    """
    from server.coordinator.initialise import initialise, wanted_settings

    settings = wanted_settings(folder, name=name, host=host, port=port, superlink_port=superlink_port)
    _print_initialised(initialise(folder, settings, force=force, new_keys=new_keys))


def renew_command(folder: FolderArgument = Path()) -> None:
    """Issue a new server certificate, valid for 397 days. Nothing changes for the sites, and no run is interrupted."""
    from server.coordinator import nginx
    from server.coordinator.initialise import renew

    opened = _open(folder)
    ends = renew(opened)
    typer.echo(f"{opened.server_certificate}: valid until {ends:%Y-%m-%d %H:%M} UTC")
    if nginx.reload(opened):
        typer.echo("nginx reads it now")


def enrol_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The site's enrolment request.")],
    folder: FolderOption = Path(),
    yes: Annotated[
        bool, typer.Option("--yes", help="The site read me its fingerprint, and it was the same: do not ask.")
    ] = False,
) -> None:
    """Let a site in, after its fingerprint was compared by telephone."""
    from server.coordinator import registry, superlink

    opened = _open(folder)
    request = registry.read_request(file)
    registry.check_new(registry.read_registry(opened), request)
    typer.echo(f"site: {request.site}\nfingerprint: {request.fingerprint}")
    _ask(f"Did '{request.site}' read you this fingerprint?", yes)
    there = superlink.answers(opened)
    if there:
        registry.check_key_is_open(opened, request)
    registry.enrol(opened, request)
    if there:
        registry.sync(opened)
    typer.echo(f"'{request.site}' is enrolled" + ("" if there else "; it can connect once the services are started"))


def revoke_command(
    site: Annotated[str, typer.Argument(metavar="NAME", help="The site's agreed name.")],
    folder: FolderOption = Path(),
) -> None:
    """Shut a site out: its key is refused from now on, and for good. What it sent is not taken back."""
    from bridge.errors import ServiceError
    from server.coordinator import registry, services, superlink

    opened = _open(folder)
    registry.revoke(opened, site)
    # Where the door is open, a SuperLink that does not answer is on its way back.
    if superlink.wait(opened, _AWAIT_SECONDS if services.door_is_open(opened) else 0.0):
        registry.sync(opened)
        typer.echo(f"'{site}' is revoked and shut out")
    elif services.door_is_open(opened):
        raise ServiceError(
            f"'{site}' is revoked, but the SuperLink could not be told",
            why="it does not answer, and the door is open",
            fix="`fedbridge-server stop` now: before the door opens again, the site is shut out",
        )
    else:
        typer.echo(f"'{site}' is revoked; nobody can connect until the services are started")


def sites_command(folder: FolderArgument = Path()) -> None:
    """List who was enrolled, who is revoked, and who is online."""
    from server.coordinator.status import find_sites

    _print_sites(find_sites(_open(folder)))


def start_command(folder: FolderArgument = Path()) -> None:
    """Start SuperLink, executor and nginx; return when sites can connect. Where systemd runs, use the units instead."""
    from server.coordinator import services

    opened = _open(folder)
    services.start(opened)
    typer.echo(f"sites can connect to {opened.settings.address}")


def stop_command(folder: FolderArgument = Path()) -> None:
    """End what `start` started. A run that is under way fails, and can be resumed."""
    from server.coordinator import services

    ended = services.stop(_open(folder))
    typer.echo("ended: " + ", ".join(ended) if ended else "nothing was running")


def status_command(
    folder: FolderArgument = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Tell what runs, whether sites can connect, who is online, and what each run is at."""
    from json import dumps

    from server.coordinator.status import find_status

    found = find_status(_open(folder))
    if json:
        typer.echo(dumps(found.as_json(), indent=1))
    else:
        _print_status(found)


def superlink_command(folder: FolderArgument = Path()) -> None:
    """Be Flower's SuperLink, in the foreground (for systemd)."""
    from server.coordinator.services import run_superlink

    run_superlink(_open(folder))


def executor_command(folder: FolderArgument = Path()) -> None:
    """Start the runs that the SuperLink has, in the foreground (for systemd)."""
    from server.coordinator.services import run_executor

    run_executor(_open(folder))


def proxy_command(folder: FolderArgument = Path()) -> None:
    """Be nginx, in the foreground (for systemd), once the SuperLink lets in whom the registry names."""
    from server.coordinator.services import run_proxy

    run_proxy(_open(folder))


def serve_command(folder: FolderArgument = Path()) -> None:
    """Keep the services running, in the foreground."""
    from server.coordinator.services import serve

    serve(_open(folder))


def _open(folder: Path) -> CoordinatorFolder:
    from server.coordinator.folder import CoordinatorFolder

    return CoordinatorFolder.open(folder)


def _ask(question: str, yes: bool) -> None:
    from bridge.errors import EnrolmentError

    if yes:
        return
    if not sys.stdin.isatty():
        raise EnrolmentError(
            "nobody was asked", why="there is no terminal to ask in", fix="compare the fingerprints, then give --yes"
        )
    if not typer.confirm(question):
        raise EnrolmentError(
            "not enrolled",
            why="the fingerprint was not confirmed",
            fix="if it differs, the request was changed on its way: ask for it over another channel",
        )


def _print_initialised(done: Initialised) -> None:
    folder = done.folder
    for heading, names in (("written", done.written), ("kept", done.kept)):
        for name in names:
            typer.echo(f"{heading:<8}{name}")
    for name in done.edited:
        typer.echo(f"note: {name} differs from what would be written now (--force writes it anew)")
    typer.echo("\nfingerprint of coordinator.yaml, to be read to every site by telephone:")
    typer.echo(f"  {folder.coordinator().fingerprint}")
    typer.echo(
        "\nnext: have the port opened as OPEN-THIS-PORT.md says; hand coordinator.yaml to the sites;\n"
        f"`fedbridge-server enrol REQUEST --dir {folder.path}` for each site's request; then\n"
        f"`fedbridge-server start {folder.path}`, or the units in systemd/"
    )


def _print_sites(sites: list[SiteStatus]) -> None:
    if not sites:
        typer.echo("no site was enrolled yet")
        return
    wide = max(4, *(len(each.name) for each in sites))
    typer.echo(f"{'site':<{wide}}  {'state':<9}{'node':<14}{'last seen':<27}fingerprint")
    for each in sites:
        seen = each.last_seen or "never"
        typer.echo(f"{each.name:<{wide}}  {each.state:<9}{each.node:<14}{seen:<27}{each.fingerprint}")


def _print_status(found: Status) -> None:
    typer.echo(f"{found.name}, {found.address}")
    for service in found.services:
        state = f"runs as process {service.pid}" if service.pid else "is down, and will be started again"
        typer.echo(f"  {service.name:<10}{state}, since {service.since}, restarted {service.restarts} time(s)")
    typer.echo(f"  SuperLink: {'answers' if found.superlink else 'does not answer'}")
    typer.echo(f"  door: {'sites can connect' if not found.door else 'sites can not connect: ' + found.door}")
    typer.echo(f"  certificate: until {found.certificate_ends}, {found.certificate_days:.0f} day(s)")
    if found.certificate_days < _WARN_DAYS:
        typer.echo("  warning: renew the certificate now: `fedbridge-server renew`")
    typer.echo("")
    _print_sites(list(found.sites))
    for run in found.runs:
        where = f", {run.phase}" if run.phase else ""
        rounds = f", round {run.round} of {run.rounds}" if run.rounds else ""
        typer.echo(f"\nrun {run.name}: {run.state}{where}{rounds}" + (f", since {run.started}" if run.started else ""))
        if run.error:
            typer.echo(f"  {run.error}")
        for site, code in sorted(run.sites.items()):
            typer.echo(f"  {site}: {code}" + (f", last answered {run.seen[site]}" if site in run.seen else ""))
