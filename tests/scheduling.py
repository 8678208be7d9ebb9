"""How `make test-slow` shares its tests out: the tests of a module run on one worker, as they share what is slow to
make, but each direction is a module of its own; what takes longest starts first.

What waits for other processes takes little of the processors, but is judged by the clock. So it runs first, beside what
computes, and that yields to it (`commands.yielding`).
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling

ALONE = "tests/end_to_end/test_directions.py"
FIRST = (
    "tests/deployment/test_kills_at_the_server.py",
    "tests/deployment/test_kills_at_sites.py",
    f"{ALONE}::test_a_direction_runs[fog_emg2eeg]",
    f"{ALONE}::test_a_direction_runs[wesad_ppg2ecg_ecgfm]",
    f"{ALONE}::test_a_direction_runs[fog_eeg2emg]",
    "tests/end_to_end/test_ledger_kills.py",
    "tests/end_to_end/test_demo.py",
    ALONE,
    "tests/deployment/test_consortium.py",
    "tests/deployment/test_tutorial.py",
    "tests/deployment/",
    "tests/server/submission/",
    "tests/server/coordinator/test_services.py",
    "tests/client/deployment/",
    "tests/end_to_end/",
    "tests/simulations/",
)
"""Beginnings of tests' names, what takes longest first; the others follow."""


class SlowScheduling(LoadFileScheduling):  # type: ignore[misc]
    """By module, in the order of collection, each direction by itself."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith(ALONE) else str(super()._split_scope(nodeid))


def longest_first(items: list[pytest.Item]) -> None:
    """Sort collected tests in place; those of a module stay in their order."""
    items.sort(key=lambda item: next((at for at, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))
