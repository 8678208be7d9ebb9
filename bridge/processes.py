"""Processes by id and start, so that an id that was given to another process is never mistaken. Linux's /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import ServiceError

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class ProcessId:
    """A process: its id, when it started (clock ticks since boot), and, outside comparison, its parent."""

    pid: int
    started: int
    parent: int = field(default=0, compare=False)


def process_id(pid: int) -> ProcessId | None:
    """The live process of that id; None where there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else ProcessId(pid, started=int(fields[19]), parent=int(fields[1]))


def is_alive(process: ProcessId) -> bool:
    """Whether that very process lives."""
    return process_id(process.pid) == process


def descendants(process: ProcessId) -> list[ProcessId]:
    """The live processes that this one started, and theirs."""
    live = [each for entry in Path("/proc").iterdir() if entry.name.isdigit() and (each := process_id(int(entry.name)))]
    found, parents = list[ProcessId](), {process.pid}
    while more := [each for each in live if each.parent in parents and each not in found]:
        found += more
        parents |= {each.pid for each in more}
    return found


def signal_process(process: ProcessId, number: int) -> None:
    """Send a signal, unless the process is gone."""
    if is_alive(process):
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return


def end(processes: Sequence[ProcessId], grace_seconds: float = 10.0) -> None:
    """End processes: asked first, killed where they don't go. Raises `ServiceError` where one can't be ended."""
    left = list(processes)
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, _KILL_SECONDS)):
        for process in left:
            signal_process(process, number)
        deadline = time.monotonic() + seconds
        while (left := [each for each in left if is_alive(each)]) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if not left:
            return
    raise ServiceError(f"processes {[each.pid for each in left]} could not be ended", fix="end them by hand")
