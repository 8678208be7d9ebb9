"""SIGKILL of every process at the coordinator in every phase of a run: it goes on, or stops by name and is resumed, and
ends with the bridge of a run that nobody disturbed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.deployment.consortium import lines
from tests.deployment.disturbed import KILLS_AT_THE_SERVER, Disturbed, disturbed, phase_of, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_whatever_is_killed_at_the_server_the_run_goes_on_or_is_resumed(tmp_path: Path) -> None:
    pending, runs = list(KILLS_AT_THE_SERVER), 0
    with disturbed(tmp_path, hospitals=2) as it:
        while pending:
            runs += 1
            assert runs <= 5, pending
            name = f"server-{runs}"
            it.submit(name)
            key = (it.run_folder(name) / "run-key").read_text()
            one_run(it, name, pending)
            # The ledgers of the sites know a run by it.
            assert (it.run_folder(name) / "run-key").read_text() == key
            it.same_result(name)
        it.check_audit_logs()
        assert sorted(it.killed) == sorted(KILLS_AT_THE_SERVER)
    sys.stdout.write(f"{len(KILLS_AT_THE_SERVER)} pairs of process and phase in {runs} run(s)\n")


def one_run(it: Disturbed, name: str, pending: list[tuple[str, str]]) -> None:
    """To its end, with one kill after the other of what is pending in the phase that it is at."""
    run, seen = it.run_folder(name), 0
    while status(run) != "completed":
        log = lines(run / "log.jsonl")
        phase = phase_of(log[seen:])
        assert phase != "failed" or seen, log[-3:]
        found = next((each for each in pending if each[1] == phase), None)
        if found is not None:
            pending.remove(found)
            it.kill(*found)
        if found is not None or phase == "failed":
            seen = settled(it, run, seen)
        time.sleep(0.3)


def settled(it: Disturbed, run: Path, seen: int) -> int:
    """After a kill: the run goes on by itself, or its process is gone and it is resumed, as a coordinator would.

    Returns from which line of its log it can be told where the run is at.
    """
    before, deadline = len(lines(run / "log.jsonl")), time.monotonic() + 400
    while time.monotonic() < deadline:
        log = lines(run / "log.jsonl")
        if len(log) > before and log[-1]["event"] != "failed":
            return seen
        if not it.pid("serverapp"):
            code, text = it.consortium.run(it.study, "--name", run.name, "--resume", "--detach")
            if code == 0:
                return len(log)
            assert "still going on" in text or "SuperLink" in text or "Flower" in text, text
            # Flower marks a run as failed after a minute or so; a command each second would only heat the machine.
            time.sleep(6)
        time.sleep(1)
    raise AssertionError(f"{run.name} neither went on nor could be resumed: {lines(run / 'log.jsonl')[-3:]}")
