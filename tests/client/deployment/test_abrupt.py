"""A task's process ends at once with its executor, and on a signal; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bridge.processes import ProcessId, is_alive, process_id

EXECUTOR = """
import os, subprocess, sys, time
environment = {**os.environ, "FEDBRIDGE_EXECUTOR": str(os.getpid())}
task = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
print(task.pid, flush=True)
time.sleep(300)
"""
TASK = """
import atexit, pathlib, sys, time
from client.deployment.abrupt import end_with_executor
atexit.register(lambda: pathlib.Path(r"{left}").write_text("said goodbye"))
end_with_executor()
pathlib.Path(r"{up}").write_text("up")
time.sleep(300)
"""
SIGNALLED = """
import pathlib, signal, sys, time
from client.deployment.abrupt import die_of_signals
def register(path):
    signal.signal(signal.SIGTERM, lambda *_: path.write_text("said goodbye"))
die_of_signals(register)(pathlib.Path(r"{left}"))
pathlib.Path(r"{up}").write_text("up")
time.sleep(300)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(process: ProcessId) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(process)


def test_a_task_is_killed_with_its_executor_and_lives_while_that_does(tmp_path: Path) -> None:
    left, up = tmp_path / "left", tmp_path / "up"
    task = TASK.format(left=left, up=up)
    executor = subprocess.Popen([sys.executable, "-c", EXECUTOR, task], stdout=subprocess.PIPE, text=True)
    assert executor.stdout is not None
    process = process_id(int(executor.stdout.readline()))
    assert process is not None
    wait_for(up)
    time.sleep(1.5)
    assert is_alive(process)
    executor.kill()
    executor.wait()
    assert gone(process)
    assert not left.exists()


def test_a_task_without_an_executor_does_not_go_on(tmp_path: Path) -> None:
    task = TASK.format(left=tmp_path / "left", up=tmp_path / "up")
    environment = {key: value for key, value in os.environ.items() if key != "FEDBRIDGE_EXECUTOR"}
    done = subprocess.run([sys.executable, "-c", task], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_signal_ends_a_task_before_it_can_report(tmp_path: Path) -> None:
    left, up = tmp_path / "left", tmp_path / "up"
    task = subprocess.Popen([sys.executable, "-c", SIGNALLED.format(left=left, up=up)])
    wait_for(up)
    task.terminate()
    assert task.wait(timeout=20) == -signal.SIGTERM
    assert not left.exists()
