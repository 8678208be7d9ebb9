"""SIGKILL of every process of a consortium in every phase of a run: it finishes, or stops by name and is resumed, and
ends with the bridge of a run that nobody disturbed.

The job asks for all three hospitals in every exchange, so a lost answer must be asked for again: whatever was killed,
there is one right bridge.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.deployment.consortium import lines, until, whole
from tests.end_to_end.commands import SMOKE, call

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]

ROUNDS = 2
SETTINGS = (
    f"train.rounds={ROUNDS}",
    "sites.minimum=3",
    "sites.retries=8",
    "sites.timeout_seconds=25",
    "sites.wait_seconds=100",
    "controls=[]",
)
PHASES = ("describe", "probe", "similarity", "round 1", "round 2", "evaluate")
AT_SITES = {"supernode": "hospital-1", "executor": "hospital-2", "clientapp": "hospital-3", "nginx": ""}
AT_THE_SERVER = {"serverapp": "", "superlink": "", "server executor": ""}
PARTS = {"clientapp": "client.deployment.clientapp", "serverapp": "flwr-serverapp", "nginx": "nginx: master"}


class Disturbed:
    """A consortium and the study whose runs are disturbed; it remembers what it killed when."""

    def __init__(self, place: Path) -> None:
        self.reference = place / "reference"
        options = [part for each in SETTINGS for part in ("--set", each)]
        call("fedbridge-sim", "run", SMOKE, "--out", self.reference, "--quiet", *options)
        self.consortium = whole(place / "real", SMOKE, *SETTINGS)
        # Every question is asked many times over here.
        self.consortium.edit_study(attempts=50)
        self.study = self.consortium.build()
        self.consortium.accept(self.study)
        self.consortium.up()
        self.killed: list[tuple[str, str]] = []

    def run_folder(self, name: str) -> Path:
        return self.consortium.coordinator / "runs" / name

    def submit(self, name: str, *arguments: str) -> None:
        self.consortium.call(
            "fedbridge-server",
            "run",
            self.study,
            "--dir",
            self.consortium.coordinator,
            "--name",
            name,
            "--detach",
            *arguments,
        )

    def service(self, folder: Path, name: str) -> int:
        """Id of a service's process, as its supervisor wrote it down; 0 where it is being started again."""
        record = json.loads((folder / "state" / "services.json").read_text(encoding="utf-8"))
        found = {each["name"]: each["process"] for each in record["services"]}
        return int(found[name]["pid"]) if found[name] else 0

    def pid(self, process: str) -> int:
        site = AT_SITES.get(process, "")
        if process in PARTS:
            return next(iter(self.consortium.processes(PARTS[process], site)), 0)
        return self.service(self.consortium.sites[site] if site else self.consortium.coordinator, process)

    def kill(self, process: str, phase: str) -> None:
        pid = until(lambda: self.pid(process), 60, f"{process} in {phase}")
        os.kill(pid, signal.SIGKILL)
        self.killed.append((process, phase))

    def same_bridge(self, name: str) -> None:
        mine = load_file(self.run_folder(name) / "bridge" / "bridge.safetensors")
        its = load_file(self.reference / "bridge" / "bridge.safetensors")
        assert max(float(np.abs(mine[key] - its[key]).max()) for key in its) <= 1e-6


def phase_of(run: Path) -> str:
    """Where a run is at, by its log."""
    phase = ""
    for line in lines(run / "log.jsonl"):
        event, state = line["event"], line.get("state", "")
        if event == "checkpoint" and not line.get("stopped"):
            phase = f"round {line['round'] + 1}" if line["round"] < ROUNDS else phase
        elif (event in PHASES and state == "started") or event in ("finished", "failed"):
            phase = str(event)
        elif event == "note" and "resumed after round" in line.get("text", ""):
            phase = f"round {int(line['text'].split('round ')[1].split()[0]) + 1}"
    return phase


def status(run: Path) -> str:
    path = run / "run.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["status"]) if path.exists() else ""


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    found = Disturbed(tmp_path_factory.mktemp("kills"))
    try:
        yield found
    finally:
        found.consortium.close()


@pytest.mark.timeout(1500)
def test_whatever_is_killed_at_the_sites_the_run_finishes(disturbed: Disturbed) -> None:
    run = disturbed.run_folder("sites")
    disturbed.submit("sites")
    for phase in PHASES:
        until(lambda phase=phase: phase_of(run) in (phase, "failed"), 300, phase)  # type: ignore[misc]
        assert phase_of(run) == phase, lines(run / "log.jsonl")[-3:]
        for process in ("clientapp", "supernode", "executor", "nginx"):
            disturbed.kill(process, phase)
    until(lambda: status(run) in ("completed", "failed"), 300, "the end")
    assert status(run) == "completed", lines(run / "log.jsonl")[-3:]
    disturbed.same_bridge("sites")
    assert len(set(disturbed.killed)) >= len(PHASES) * len(AT_SITES)


@pytest.mark.timeout(1500)
def test_whatever_is_killed_at_the_server_the_run_is_resumed(disturbed: Disturbed) -> None:
    run = disturbed.run_folder("server")
    disturbed.submit("server")
    for phase in PHASES:
        for process in AT_THE_SERVER:
            until(lambda phase=phase: phase_of(run) in (phase, "failed"), 300, phase)  # type: ignore[misc]
            disturbed.kill(process, phase)
            resume(disturbed, run)
    until(lambda: status(run) in ("completed", "failed"), 300, "the end")
    assert status(run) == "completed", lines(run / "log.jsonl")[-3:]
    disturbed.same_bridge("server")
    sys.stdout.write(f"{len(set(disturbed.killed))} pairs of process and phase\n")


def resume(disturbed: Disturbed, run: Path) -> None:
    """Once the process that was killed is gone for the run, go on with it, as a coordinator would."""
    deadline = time.monotonic() + 200
    while True:
        code, text = disturbed.consortium.run(disturbed.study, "--name", run.name, "--resume", "--detach")
        if code == 0:
            return
        assert time.monotonic() < deadline, text
        time.sleep(2)


def test_no_audit_log_was_broken(disturbed: Disturbed) -> None:
    for folder in disturbed.consortium.sites.values():
        text = disturbed.consortium.call("fedbridge-site", "audit", "verify", folder)
        assert "each follows the one before it" in text
