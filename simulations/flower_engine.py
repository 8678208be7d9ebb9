"""A run on Flower's own simulation: `flwr run` from a neutral folder, watched until it really ended, and cleaned up.

What `flwr run` leaves open is settled here. Its exit code says nothing about the run, so `flwr list` is asked. It
leaves a SuperLink and Ray behind, so every process that carries this run's mark in its environment is ended, whatever
happened. And Ray imports from the folder in which the SuperLink was started, so that is an empty one. Linux only,
since the mark is read from /proc.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bridge.bundle import build_app
from bridge.hashing import sha256_json
from bridge.processes import ProcessId, is_alive, process_id, signal_process
from bridge.run_config import Value, toml_text
from server.flower_command import FlowerCommand, words
from simulations.errors import EngineError

MARK = "FEDBRIDGE_RUN"
"""Environment variable that every process of one run inherits: the hash of its run folder."""
_POLL_SECONDS = 5.0
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """How Flower says that a run ended: `completed`, `failed` or `stopped`, and the exception's text."""

    run_id: str
    status: str
    details: str


def run_flower(
    app: Path | None,
    run_config: Mapping[str, Value],
    federation: Mapping[str, Value],
    run_folder: Path,
    *,
    ended: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run an app (None: fedbridge's own) with `flwr run` to its end and leave no process behind.

    `run_config` and `federation` travel as TOML files. `ended` may tell early that the run is over (it is asked far
    more often than Flower). Raises `EngineError` where the run could not be started or did not complete; what the run
    printed is then kept in `run_folder/flower.log`.
    """
    if not Path("/proc/self/environ").exists():
        raise EngineError(
            "the flower engine can't run here", why="it needs Linux's /proc to clean up", fix="use --engine local"
        )
    mark = sha256_json(str(run_folder.resolve()))[:32]
    # A run that was killed may have left its SuperLink at work on this very folder.
    end_processes(mark)
    with _neutral_folder() as place, _always_cleaned(mark):
        flower = _Flower(place, mark)
        run_id = flower.submit(app or build_app(place / "app"), run_config, federation)
        outcome = flower.watch(run_id, ended)
        if outcome.status != "completed":
            flower.keep_log(run_id, run_folder / "flower.log")
            raise EngineError(
                f"the run on Flower {outcome.status}",
                why=outcome.details or "Flower gives no details",
                fix=f"see {run_folder / 'flower.log'}",
            )
        return outcome


class _Flower:
    """One run on a local SuperLink with an own home, port and working folder."""

    def __init__(self, place: Path, mark: str) -> None:
        self._home = place / "home"
        self._home.mkdir()
        self._command = FlowerCommand(
            self._home,
            {
                MARK: mark,
                "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_DEDUP_LOGS": "0",
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                "RAY_TMPDIR": str(place),
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
            },
        )

    def submit(self, app: Path, run_config: Mapping[str, Value], federation: Mapping[str, Value]) -> str:
        """Start the run and return its id."""
        files = {"--run-config": run_config, "--federation-config": federation}
        arguments = []
        for option, values in files.items():
            path = self._home / f"{option.strip('-')}.toml"
            path.write_text(toml_text(values), encoding="utf-8")
            arguments += [option, str(path)]
        answer = self._command.ask("run", str(app), *arguments)
        if not answer.get("success") or not answer.get("run-id"):
            raise EngineError(
                "Flower did not start the run",
                why=words(answer),
                fix="correct what it names; `fedbridge-sim run --engine local` needs no Flower processes",
            )
        return str(answer["run-id"])

    def watch(self, run_id: str, ended: Callable[[], bool]) -> Outcome:
        """Poll until the run has finished."""
        while True:
            answer = self._command.ask("list", "--run-id", run_id)
            runs = answer.get("runs") or [{}]
            status = str(runs[0].get("status", ""))
            if status.startswith("finished:"):
                return Outcome(run_id, status.partition(":")[2], str(runs[0].get("status-details", "") or ""))
            if not status:
                raise EngineError("Flower lost the run", why=words(answer))
            was_over = ended()
            deadline = time.monotonic() + _POLL_SECONDS
            while time.monotonic() < deadline and (was_over or not ended()):
                time.sleep(0.2)

    def keep_log(self, run_id: str, target: Path) -> None:
        """Write what the run printed, its traceback too, into a file."""
        target.write_text(self._command.call("log", run_id, "--show").stdout, encoding="utf-8")


def marked_processes(mark: str) -> list[int]:
    """Ids of the live processes that inherited this mark, and of all their descendants; the caller is left out.

    Ray's workers write their title over their environment, so a parent's mark counts for its children.
    """
    found: set[int] = set()
    parents: dict[int, int] = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or (process := process_id(int(entry.name))) is None:
            continue
        parents[int(entry.name)] = process.parent
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return sorted(found - {os.getpid()})


def end_processes(mark: str) -> None:
    """End every process with this mark: asked first, killed when it does not go."""
    seen: set[ProcessId] = set()
    left: list[ProcessId] = []
    for request in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            seen |= {process for pid in marked_processes(mark) if (process := process_id(pid)) is not None}
            # A worker whose parent ended first no longer counts as marked: it is remembered.
            left = [process for process in seen if is_alive(process)]
            if not left:
                return
            for process in left:
                signal_process(process, request)
            time.sleep(0.3)
    raise EngineError(f"processes {[each.pid for each in left]} of the run could not be ended", fix="end them by hand")


@contextmanager
def _always_cleaned(mark: str) -> Iterator[None]:
    """End the marked processes however the block ends; Ctrl-C can't interrupt the clean-up."""
    try:
        yield
    finally:
        with _uninterrupted():
            end_processes(mark)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: list[Any] = [signal.signal(number, _ignore) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Nothing: the clean-up is under way."""


@contextmanager
def _neutral_folder() -> Iterator[Path]:
    """An own empty folder with a short path (Ray's sockets allow about 100 characters)."""
    short = Path("/tmp")
    folder = Path(tempfile.mkdtemp(prefix="fedbridge-", dir=short if os.access(short, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
