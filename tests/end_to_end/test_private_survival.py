"""A private run killed with SIGKILL, hospitals and all, and resumed: it ends, and nobody is charged twice."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.ledger.view import view
from client.site import open_site
from tests.end_to_end.commands import SMOKE, call, start
from tests.end_to_end.test_survival import kill

pytestmark = pytest.mark.slow

ROUNDS, SITES = 12, 3
SETTINGS = (
    "controls=[]",
    "sites.minimum=1",  # a hospital that was killed while it computed never answers that message again
    "privacy.mechanism=central",
    "privacy.epsilon=8",
    "privacy.selection.noise_multiplier=5",
    "privacy.metrics.noise_multiplier=1",
    "strategy.name=FedAdam",
    "train.local_steps=1",
    f"train.rounds={ROUNDS}",
)
MOMENTS = (
    '"event": "probe", "state": "started"',
    '"event": "similarity", "state": "started"',
    '"round": 2,',
    '"round": 8,',
)
CHANGES = tuple(word for setting in SETTINGS for word in ("--set", setting))


def test_killed_in_each_phase(tmp_path: Path) -> None:
    call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", tmp_path / "whole", "--quiet")  # fills the caches
    resumed = []
    for number, moment in enumerate(MOMENTS):
        run = tmp_path / f"run-{number}"
        process = start("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet")
        wait_for(run / "log.jsonl", moment)
        kill(process)
        call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet", "--resume")
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert record["status"] == "completed"
        assert [each["round"] for each in record["rounds"]] == list(range(1, ROUNDS + 1))
        resumed.append(record["resumed_from_round"])
        for site in range(SITES):
            check_ledger(run / "sites" / f"site-{site}")
    assert resumed[0] is None  # it began anew, and the sites gave the answers that they had given
    assert all(after >= 1 for after in resumed[-2:])


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while not (log.is_file() and text in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, text
        time.sleep(0.005)


def check_ledger(site: Path) -> None:
    """One plan, charged once, each message drawn down at most once; the chain is whole."""
    call("fedbridge-site", "ledger", "verify", site)
    with Ledger.open(open_site(site)) as ledger:
        (plan,) = view(ledger).plans
    used = {phase.release.phase: (phase.used, phase.release.count) for phase in plan.phases}
    assert used.keys() == {"probe", "similarity", "training", "metrics"}
    assert all(drawn <= reserved for drawn, reserved in used.values())
    assert used["training"][1] == ROUNDS
    assert used["training"][0] >= ROUNDS - 2  # a kill interrupts at most one message of a site
