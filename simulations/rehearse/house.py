"""The pretend sites as a run sees them: a ClientApp whose messages are computed in processes of their own."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict

from bridge.errors import FedbridgeError
from bridge.messages import CONFIG, DESCRIBE
from client.deployment.clientapp import outcome_of
from client.site import Site
from simulations.errors import EngineError, RehearsalError
from simulations.rehearse.workers import Cost, Workers

OUTGOING = "outgoing"


@dataclass(frozen=True)
class Reply:
    """One message to the site as it is: what was asked, what would leave, and what it cost."""

    number: int
    message: str
    round: int | None
    split: str | None
    outcome: str
    why: str
    cost: Cost
    cached_bytes: int
    files: dict[str, Path]
    """The items' files, relative to `out`, in the order in which the audit log has them."""


class House:
    """Stands for the ClientApp of all pretend sites; partition 0 is the site as it is.

    What that one would send is written to `out/outgoing`. `stopped` is what ends the rehearsal: a process died, or the
    site says that it can't take part. Every message after that is answered by an error, so that the run ends soon.
    """

    def __init__(self, own: Site, workers: Workers, out: Path) -> None:
        self._own, self._workers, self._out = own, workers, out
        self.replies: list[Reply] = []
        self.stopped: FedbridgeError | None = None
        self.run = ""
        """The run's id, as the audit log has it."""
        self._before = folder_bytes(own.folder)
        self._computing = threading.Lock()

    def disk_bytes(self) -> int:
        """By how much the site's own files (ledger, audit log, log) have grown since the beginning."""
        return folder_bytes(self._own.folder) - self._before

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply of one pretend site. Raises `stopped` once the rehearsal is over."""
        with self._computing:
            if self.stopped is not None:
                raise self.stopped
            try:
                return self._answer(message, context)
            except (EngineError, OSError) as error:
                self.stopped = _as_error(error)
                raise

    def close(self) -> None:
        """Answer nothing more, and return when nothing is being written any more."""
        self._workers.end()
        with self._computing:
            self.stopped = self.stopped or EngineError("the rehearsal has ended")

    def _answer(self, message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != 0:
            return self._workers.ask_other(message, context)
        before = folder_bytes(self._own.cache_folder)
        reply, cost = self._workers.ask_fresh(message, context)
        self._note(message, reply, cost, folder_bytes(self._own.cache_folder) - before)
        return reply

    def _note(self, message: Message, reply: Message, cost: Cost, cached_bytes: int) -> None:
        self.run = str(message.metadata.run_id)
        number, kind = len(self.replies) + 1, message.metadata.message_type
        asked = dict(message.content.config_records.get(CONFIG, {}))
        items = {} if reply.has_error() else _items(reply.content)
        outcome = outcome_of(reply)
        why = "" if outcome == "OK" else _last_error(self._own.log_path)
        folder = self._out / OUTGOING / f"{number:03d}-{kind}-{self._own.name}"
        files = {name: _write(folder, name, value).relative_to(self._out) for name, value in items.items()}
        round_, split = asked.get("round"), asked.get("split")
        self.replies.append(
            Reply(
                number,
                kind,
                round_ if isinstance(round_, int) else None,
                split if isinstance(split, str) else None,
                outcome,
                why,
                cost,
                cached_bytes,
                files,
            )
        )
        if kind == DESCRIBE and outcome != "OK":
            self.stopped = RehearsalError(
                f"the site would not take part in the study: {outcome}",
                why=why or "the site's own log has no line about it",
                fix="correct what it names, or leave the study be; docs/reference/errors.md explains each code",
            )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _items(content: RecordDict) -> dict[str, Any]:
    """All that a reply holds, by name; arrays as numpy's."""
    found: dict[str, Any] = {}
    for arrays in content.array_records.values():
        found |= {name: array.numpy() for name, array in arrays.items()}
    for metrics in content.metric_records.values():
        found |= dict(metrics.items())
    for texts in content.config_records.values():
        found |= dict(texts.items())
    return found


def _write(folder: Path, name: str, value: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(value, np.ndarray):
        path = folder / f"{name}.npy"
        np.save(path, value, allow_pickle=False)
    else:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    return path


def _last_error(log: Path) -> str:
    """The last entry of a site's log: its lines that are indented, after the one with time and code."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    last = max((number for number, line in enumerate(lines) if not line.startswith("  ")), default=-1)
    return "\n".join(line.strip() for line in lines[last + 1 :])


def _as_error(error: Exception) -> FedbridgeError:
    if isinstance(error, FedbridgeError):
        return error
    return EngineError("a message can't be rehearsed", why=str(error), fix="free space for the rehearsal")
