"""SIGKILL of every process at the hospitals, and of nginx, in the phases of one run: it finishes, with the bridge of a
run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployment.consortium import lines
from tests.deployment.disturbed import KILLS_AT_SITES, KILLS_AT_THE_SERVER, PHASES, disturbed, phase_of, status
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_whatever_is_killed_at_the_sites_the_run_finishes(tmp_path: Path) -> None:
    with disturbed(tmp_path) as it:
        run = it.run_folder("sites")
        it.submit("sites")
        for phase in PHASES:
            found = until(lambda phase=phase: reached(run, phase), 600, phase)  # type: ignore[misc]
            assert found == phase, lines(run / "log.jsonl")[-3:]
            for pair in KILLS_AT_SITES:
                if pair[1] == phase:
                    it.kill(*pair)
        until(lambda: status(run) in ("completed", "failed"), 600, "the end")
        assert status(run) == "completed", lines(run / "log.jsonl")[-3:]
        it.same_result("sites")
        it.check_audit_logs()
        assert it.killed == list(KILLS_AT_SITES)


def test_forty_pairs_of_process_and_phase_are_killed() -> None:
    """Here, and in the module for the server's."""
    assert len({*KILLS_AT_SITES, *KILLS_AT_THE_SERVER}) >= 40


def reached(run: Path, phase: str) -> str:
    """The phase, once it is at that one or has ended."""
    found = phase_of(lines(run / "log.jsonl"))
    return found if found in (phase, "finished", "failed") else ""
