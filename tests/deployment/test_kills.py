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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.deployment.consortium import lines, whole
from tests.end_to_end.commands import SMOKE, call
from tests.waiting import until

pytestmark = pytest.mark.slow

ROUNDS = 2
SETTINGS = (
    f"train.rounds={ROUNDS}",
    "sites.minimum=3",
    "sites.retries=12",
    "sites.timeout_seconds=30",
    "sites.wait_seconds=100",
    "controls=[]",
)
PHASES = ("describe", "probe", "similarity", "round 1", "round 2", "evaluate")
AT_SITES = {"clientapp": "hospital-3", "supernode": "hospital-1", "executor": "hospital-2", "nginx": ""}
WITH_SUPERNODE = ("describe", "probe", "round 1", "evaluate")
"""Of its kill, a site is away for a minute or more."""
AT_THE_SERVER = ("serverapp", "superlink", "server executor")
PARTS = {"clientapp": "client.deployment.clientapp", "serverapp": "flwr-serverapp"}


class Disturbed:
    """A consortium and the study whose runs are disturbed; it remembers what it killed when."""

    def __init__(self, place: Path) -> None:
        self.reference = place / "reference"
        options = [part for each in SETTINGS for part in ("--set", each)]
        call("fedbridge-sim", "run", SMOKE, "--out", self.reference, "--quiet", *options)
        self.consortium = whole(place / "real", SMOKE, *SETTINGS)
        # Every question is asked many times over here.
        self.consortium.edit_study(attempts=200)
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
        folder = self.consortium.sites[site] if site else self.consortium.coordinator
        return self.service(folder, process.removeprefix("server "))

    def kill(self, process: str, phase: str) -> None:
        pid = until(lambda: self.pid(process), 60, f"{process} in {phase}")
        os.kill(pid, signal.SIGKILL)
        self.killed.append((process, phase))

    def same_bridge(self, name: str) -> None:
        mine = load_file(self.run_folder(name) / "bridge" / "bridge.safetensors")
        its = load_file(self.reference / "bridge" / "bridge.safetensors")
        assert max(float(np.abs(mine[key] - its[key]).max()) for key in its) <= 1e-6


def phase_of(events: Sequence[Mapping[str, Any]]) -> str:
    """Where a run is at, by these lines of its log."""
    phase = ""
    for line in events:
        event = str(line["event"])
        if event in PHASES and line["state"] == "started":
            phase = event
        elif event == "round" or (event == "checkpoint" and line["round"] == 0):
            phase = f"round {line['round'] + 1}"
        elif event == "note" and "resumed after round" in line["text"]:
            phase = f"round {int(line['text'].split('round ')[1].split()[0]) + 1}"
        elif event in ("finished", "failed"):
            phase = event
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
        found = until(lambda phase=phase: reached(run, phase), 300, phase)  # type: ignore[misc]
        assert found == phase, lines(run / "log.jsonl")[-3:]
        for process in AT_SITES:
            if process != "supernode" or phase in WITH_SUPERNODE:
                disturbed.kill(process, phase)
    until(lambda: status(run) in ("completed", "failed"), 300, "the end")
    assert status(run) == "completed", lines(run / "log.jsonl")[-3:]
    disturbed.same_bridge("sites")


def reached(run: Path, phase: str) -> str:
    """The phase, once it is at that one or has ended."""
    found = phase_of(lines(run / "log.jsonl"))
    return found if found in (phase, "finished", "failed") else ""


@pytest.mark.timeout(1500)
def test_whatever_is_killed_at_the_server_the_run_goes_on_or_is_resumed(disturbed: Disturbed) -> None:
    pending = [(process, phase) for phase in PHASES for process in AT_THE_SERVER]
    runs = 0
    while pending:
        runs += 1
        assert runs <= len(AT_THE_SERVER) + 2, pending
        name = f"server-{runs}"
        disturbed.submit(name)
        key = (disturbed.run_folder(name) / "run-key").read_text()
        one_run(disturbed, name, pending)
        # The ledgers of the sites know a run by it.
        assert (disturbed.run_folder(name) / "run-key").read_text() == key
        disturbed.same_bridge(name)
    assert len(set(disturbed.killed)) >= 40
    sys.stdout.write(f"{len(set(disturbed.killed))} pairs of process and phase, {runs} run(s) for the server's\n")


def one_run(disturbed: Disturbed, name: str, pending: list[tuple[str, str]]) -> None:
    """To its end, with one kill after the other of what is pending in the phase that it is at."""
    run, seen = disturbed.run_folder(name), 0
    while status(run) != "completed":
        log = lines(run / "log.jsonl")
        phase = phase_of(log[seen:])
        assert phase != "failed" or seen, log[-3:]
        found = next((each for each in pending if each[1] == phase), None)
        if found is not None:
            pending.remove(found)
            disturbed.kill(*found)
        if found is not None or phase == "failed":
            seen = settled(disturbed, run, seen)
        time.sleep(0.3)


def settled(disturbed: Disturbed, run: Path, seen: int) -> int:
    """After a kill: the run goes on by itself, or its process is gone and it is resumed, as a coordinator would.

    Returns from which line of its log it can be told where the run is at.
    """
    before, deadline = len(lines(run / "log.jsonl")), time.monotonic() + 240
    while time.monotonic() < deadline:
        log = lines(run / "log.jsonl")
        if len(log) > before and log[-1]["event"] != "failed":
            return seen
        if not disturbed.pid("serverapp"):
            code, text = disturbed.consortium.run(disturbed.study, "--name", run.name, "--resume", "--detach")
            if code == 0:
                return len(log)
            assert "still going on" in text or "SuperLink" in text or "Flower" in text, text
        time.sleep(1)
    raise AssertionError(f"{run.name} neither went on nor could be resumed: {lines(run / 'log.jsonl')[-3:]}")


def test_no_audit_log_was_broken(disturbed: Disturbed) -> None:
    for folder in disturbed.consortium.sites.values():
        text = disturbed.consortium.call("fedbridge-site", "audit", "verify", folder)
        assert "each follows the one before it" in text
