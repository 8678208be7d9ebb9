"""What a run is doing, shown as bars: what the simulation itself computes, and what the server's log tells.

Both engines write the same `log.jsonl`, so the bars of a run on Flower, which happens in other processes, are those of
a local one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.events import PHASES, LogTail

Progress = Callable[[str, int, int], None]
"""`(what is being computed, done, of how many)`."""

_TRAINING = "training rounds"
_SECONDS = 0.2


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def bars(quiet: bool) -> Iterator[Progress]:
    """A function that draws one bar for each thing that is computed, on stderr; nothing at all where `quiet`.

    Where stderr is no terminal, a line is written when something begins and when it is done.
    """
    if quiet:
        yield no_progress
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console.print)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console) as drawn:
        tasks: dict[str, Any] = {}
        lock = threading.Lock()

        def show(what: str, done: int, total: int) -> None:
            with lock:
                if what not in tasks or (drawn.tasks[tasks[what]].finished and done < total):
                    tasks[what] = drawn.add_task(what, total=total)
                drawn.update(tasks[what], completed=done, total=total)

        yield show


class _Lines:
    """Plain lines for logs: one when something begins, one when it is done."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._open: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._open and done < total:
            self._open.add(what)
            self._write(f"{what} ...")
        elif done >= total and (what in self._open or total > 0):
            self._open.discard(what)
            self._write(f"{what}: {done} of {total}")


@contextmanager
def following(folder: Path, progress: Progress) -> Iterator[None]:
    """Show what the server writes into `folder/log.jsonl` from now on, until the block ends."""
    tail = LogTail(folder, from_end=True)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_SECONDS):
            _show_all(tail, progress)
        _show_all(tail, progress)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show_all(tail: LogTail, progress: Progress) -> None:
    for event in tail.events():
        show_event(event, progress)


def show_event(event: dict[str, Any], progress: Progress) -> None:
    """One line of the log as a step of a bar."""
    name = str(event.get("event", ""))
    if name == "round":
        progress(_TRAINING, int(event["round"]), int(event["rounds"]))
    elif name in PHASES and event.get("state") in ("started", "done"):
        progress(PHASES[name], int(event["state"] == "done"), 1)
