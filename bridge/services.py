"""Long-running programs of one folder, kept running without systemd: started, watched, restarted, ended.

One process supervises (`supervise`); it runs detached (`start`) or in a terminal. What runs is written to
`<state>/services.json`, so that any later command can tell (`running`) and end it (`stop`), also after the supervisor
itself was killed. Where a hospital has systemd, its units do the same and none of this is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from bridge.errors import ServiceError
from bridge.files import cause, write_whole
from bridge.processes import ProcessId, descendants, end, is_alive, process_id

SERVICES_JSON = "services.json"
SUPERVISOR_LOG = "supervisor.log"
_LOCK = "services.lock"
_POLL_SECONDS = 0.2
_START_SECONDS = 60.0
_MAX_LOG_BYTES = 20_000_000
_TAIL_CHARACTERS = 1500


@dataclass(frozen=True)
class Service:
    """A program to keep running: its command, its whole environment, and the file that gets what it prints.

    It is started again `restart_seconds` after it ended: Flower's SuperLink takes a killed SuperNode for online up to
    60 s longer and refuses its successor so long, so tries that come faster are no use.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    restart_seconds: float = 15.0


@dataclass(frozen=True)
class ServiceState:
    """A service as it is now; `process` is None while it waits to be started again."""

    name: str
    process: ProcessId | None
    restarts: int
    since: str
    """UTC, ISO 8601: when it was started last."""


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of a Flower process: an own home, no telemetry, no update check, nothing installed at run time."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }


def supervise(state: Path, services: Sequence[Service]) -> None:
    """Keep the services running until SIGTERM or SIGINT, then end them. `ServiceError` where they run already."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(state / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ServiceError(
            f"{state}: its services are running already", why=f"{_LOCK} is held", fix="stop them first"
        ) from error
    except OSError as error:
        raise _unwritable(state, error) from error
    try:
        _end_orphans(state)
        _Supervisor(state, services).run()
    finally:
        lock.release()


class _Supervisor:
    def __init__(self, state: Path, services: Sequence[Service]) -> None:
        self._state = state
        self._kept = [_Kept(each) for each in services]
        self._ending = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        try:
            while not self._ending:
                changed = [each.tend() for each in self._kept]
                if any(changed):
                    self._write()
                time.sleep(_POLL_SECONDS)
        finally:
            end([process for each in self._kept for process in each.processes()])
            (self._state / SERVICES_JSON).unlink(missing_ok=True)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True

    def _write(self) -> None:
        me = process_id(os.getpid())
        assert me is not None
        record = {"supervisor": asdict(me), "services": [asdict(each.state) for each in self._kept]}
        write_whole(self._state / SERVICES_JSON, json.dumps(record, indent=1) + "\n")


class _Kept:
    """One service and its present process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._child: subprocess.Popen[bytes] | None = None
        self._next = 0.0
        self._starts = 0
        self._process: ProcessId | None = None
        self._since = ""

    @property
    def state(self) -> ServiceState:
        return ServiceState(self._service.name, self._process, max(0, self._starts - 1), self._since)

    def tend(self) -> bool:
        """Start it where it does not run and its time has come; whether anything changed."""
        if self._child is not None:
            if self._child.poll() is None:
                return False
            self._note(f"ended with code {self._child.returncode}")
            self._child, self._process = None, None
            self._next = time.monotonic() + self._service.restart_seconds
            return True
        if time.monotonic() < self._next:
            return False
        self._start()
        return True

    def processes(self) -> list[ProcessId]:
        """Its process and what that one started."""
        return [] if self._process is None else [self._process, *descendants(self._process)]

    def _start(self) -> None:
        self._rotate()
        with self._service.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._service.command,
                env=dict(self._service.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._service.log.parent,
                # A Ctrl-C in the supervisor's terminal is for the supervisor.
                start_new_session=True,
            )
        self._process = process_id(self._child.pid)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._starts += 1

    def _note(self, text: str) -> None:
        with self._service.log.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {self._service.name} {text}\n")

    def _rotate(self) -> None:
        log = self._service.log
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))


def start(state: Path, command: Sequence[str]) -> None:
    """Start `command`, whose process calls `supervise(state, ...)`, detached from this terminal.

    Returns once every service has been started. Raises `ServiceError` where they run already, or the command ended; its
    last words are the reason.
    """
    if _supervisor(state) is not None:
        raise ServiceError(f"{state}: its services are running already", fix="stop them first, or ask for their status")
    try:
        state.mkdir(parents=True, exist_ok=True)
        log = (state / SUPERVISOR_LOG).open("wb")
    except OSError as error:
        raise _unwritable(state, error) from error
    try:
        with log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    except OSError as error:
        raise ServiceError(
            f"{command[0]}: can't be started", why=cause(error), fix="let this user read and run it"
        ) from error
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        if _supervisor(state) is not None and all(each.process for each in running(state)):
            return
        time.sleep(_POLL_SECONDS)
    if child.poll() is None:
        end([process for process in [process_id(child.pid)] if process])
    words = (state / SUPERVISOR_LOG).read_text(encoding="utf-8", errors="replace").strip()
    raise ServiceError(
        "the services did not start",
        why=words[-_TAIL_CHARACTERS:] or "they said nothing",
        fix=f"see the logs in {state}",
    )


def stop(state: Path) -> list[str]:
    """End supervisor and services, also services whose supervisor was killed; the names of what was ended."""
    record = _read(state)
    supervisor = _supervisor(state)
    names = [each.name for each in running(state) if each.process is not None]
    if supervisor is not None:
        end([supervisor], grace_seconds=40.0)
    _end_recorded(record)
    (state / SERVICES_JSON).unlink(missing_ok=True)
    return names


def running(state: Path) -> list[ServiceState]:
    """The services as they are now: with a process only where it is alive; empty where nothing was started."""
    found = []
    for each in _read(state).get("services", []):
        process = ProcessId(**each["process"]) if each["process"] else None
        alive = process if process is not None and is_alive(process) else None
        found.append(ServiceState(each["name"], alive, each["restarts"], each["since"]))
    return found


def _end_orphans(state: Path) -> None:
    """Services of a supervisor that was killed: they would hold the ports."""
    _end_recorded(_read(state))


def _end_recorded(record: dict[str, Any]) -> None:
    processes = [ProcessId(**each["process"]) for each in record.get("services", []) if each["process"]]
    alive = [each for each in processes if is_alive(each)]
    end([*alive, *(below for each in alive for below in descendants(each))])


def _supervisor(state: Path) -> ProcessId | None:
    recorded = _read(state).get("supervisor")
    process = ProcessId(**recorded) if recorded else None
    return process if process is not None and is_alive(process) else None


def _read(state: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((state / SERVICES_JSON).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"{state / SERVICES_JSON}: can't be read",
            why=str(error),
            fix="end the services by hand (their logs lie beside it), then remove the file",
        ) from error


def _unwritable(state: Path, error: OSError) -> ServiceError:
    return ServiceError(f"{state}: can't be written", why=cause(error), fix="correct the permissions, or free space")
