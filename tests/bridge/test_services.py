"""Services are kept running, found again, and ended; real processes throughout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.errors import ServiceError
from bridge.processes import ProcessId, end, is_alive, process_id
from bridge.services import SERVICES_JSON, running, start, stop

SUPERVISOR = """
import os, sys
from pathlib import Path
from bridge.services import Service, supervise
state, code = Path(sys.argv[1]), sys.argv[2]
names = sys.argv[3:]
supervise(state, [Service(n, (sys.executable, "-c", code), dict(os.environ), state / f"{n}.log", 0.3) for n in names])
"""
SLEEPS = "import time; print('up', flush=True); time.sleep(300)"
IGNORES_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
HAS_CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    "time.sleep(300)"
)


def command(state: Path, code: str = SLEEPS, *names: str) -> list[str]:
    return [sys.executable, "-c", SUPERVISOR, str(state), code, *(names or ("one", "two"))]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(state: Path) -> list[ProcessId]:
    return [each.process for each in running(state) if each.process is not None]


def supervisor(state: Path) -> ProcessId:
    return ProcessId(**json.loads((state / SERVICES_JSON).read_text())["supervisor"])


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state"
    yield folder
    stop(folder)


def test_started_services_run_detached_and_are_ended(state: Path) -> None:
    assert running(state) == []
    start(state, command(state))
    found = running(state)
    assert [each.name for each in found] == ["one", "two"]
    alive = processes(state)
    assert len(alive) == 2
    assert all(os.getsid(each.pid) != os.getsid(0) for each in alive)
    assert stop(state) == ["one", "two"]
    assert not any(is_alive(each) for each in alive)
    assert running(state) == []
    assert stop(state) == []


def test_a_killed_service_is_started_again_and_counted(state: Path) -> None:
    start(state, command(state))
    first = processes(state)[0]
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: len(now := processes(state)) == 2 and first not in now)
    assert [each.restarts for each in running(state)] == [1, 0]
    assert "one ended with code -9" in (state / "one.log").read_text()


def test_a_second_start_is_refused_while_the_first_runs(state: Path) -> None:
    start(state, command(state))
    before = processes(state)
    with pytest.raises(ServiceError, match="running already"):
        start(state, command(state))
    done = subprocess.run(command(state), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "running already" in done.stderr
    assert processes(state) == before


def test_services_of_a_killed_supervisor_are_found_and_ended(state: Path) -> None:
    start(state, command(state))
    orphans = processes(state)
    end([supervisor(state)], grace_seconds=0)
    assert all(is_alive(each) for each in orphans)
    assert processes(state) == orphans
    assert stop(state) == ["one", "two"]
    assert not any(is_alive(each) for each in orphans)


def test_a_new_supervisor_ends_the_orphans_of_the_one_before(state: Path) -> None:
    start(state, command(state))
    orphans = processes(state)
    os.kill(supervisor(state).pid, signal.SIGKILL)
    until(lambda: not is_alive(supervisor(state)))
    start(state, command(state))
    assert not any(is_alive(each) for each in orphans)
    assert len(processes(state)) == 2


def test_what_a_service_started_ends_with_it(state: Path) -> None:
    start(state, command(state, HAS_CHILD, "one"))
    parent = processes(state)[0]
    children: list[int] = []

    def has_child() -> bool:
        children[:] = [int(word) for word in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        return bool(children)

    until(has_child)
    child = process_id(children[0])
    assert child is not None
    stop(state)
    assert not is_alive(child)


def test_one_that_does_not_listen_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", IGNORES_TERM])
    process = process_id(child.pid)
    assert process is not None
    time.sleep(0.5)
    end([process], grace_seconds=0.3)
    assert child.wait(timeout=10) == -signal.SIGKILL


def test_another_process_under_a_used_id_is_not_taken_for_it() -> None:
    me = process_id(os.getpid())
    assert me is not None
    earlier = ProcessId(me.pid, me.started - 1)
    assert not is_alive(earlier)
    end([earlier])  # ends nobody, least of all this process
    assert process_id(2**22 + 1) is None


def test_a_command_that_fails_tells_its_last_words(state: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        start(state, [sys.executable, "-c", "raise SystemExit('no certificate')"])
    assert "no certificate" in caught.value.why


def test_a_damaged_record_is_told(state: Path) -> None:
    state.mkdir()
    (state / SERVICES_JSON).write_text('{"services": [')
    with pytest.raises(ServiceError, match="can't be read"):
        running(state)
    (state / SERVICES_JSON).unlink()


def test_a_supervisor_ends_by_sigterm_with_its_services(state: Path) -> None:
    child = subprocess.Popen(command(state))
    until(lambda: len(processes(state)) == 2)
    alive = processes(state)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 0
    assert not any(is_alive(each) for each in alive)
    assert not (state / SERVICES_JSON).exists()
