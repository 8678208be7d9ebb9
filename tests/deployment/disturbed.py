"""A consortium whose processes are killed: which are, in which phases of a run, and where a run is at.

The job asks for all hospitals in every exchange, so a lost answer must be asked for again: whatever was killed,
there is one right bridge, that of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.deployment.consortium import whole
from tests.end_to_end.commands import SMOKE, call
from tests.waiting import until

ROUNDS = 2
SETTINGS = (
    f"train.rounds={ROUNDS}",
    "sites.retries=20",
    "sites.timeout_seconds=30",
    "sites.wait_seconds=100",
    "controls=[]",
)
PHASES = ("describe", "probe", "similarity", "round 1", "round 2", "evaluate")
AT_SITES = {"clientapp": "hospital-3", "supernode": "hospital-1", "executor": "hospital-2", "nginx": ""}
WITH_SUPERNODE = ("describe", "probe", "round 1", "evaluate")
"""Of its kill, a site is away for a minute or more."""
KILLS_AT_SITES = tuple(
    (process, phase) for phase in PHASES for process in AT_SITES if process != "supernode" or phase in WITH_SUPERNODE
)
KILLS_AT_THE_SERVER = tuple(
    (process, phase) for phase in PHASES for process in ("serverapp", "superlink", "server executor")
)
PARTS = {"clientapp": "client.deployment.clientapp", "serverapp": "flwr-serverapp"}


class Disturbed:
    """A consortium and the study whose runs are disturbed; it remembers what it killed when."""

    def __init__(self, place: Path, hospitals: int) -> None:
        self.reference = place / "reference"
        settings = (*SETTINGS, f"partition.hospitals={hospitals}", f"sites.minimum={hospitals}")
        options = [part for each in settings for part in ("--set", each)]
        call("fedbridge-sim", "run", SMOKE, "--out", self.reference, "--quiet", *options)
        self.consortium = whole(place / "real", SMOKE, *settings)
        # Every question is asked many times over here.
        self.consortium.edit_study(attempts=200)
        self.study = self.consortium.build()
        self.consortium.accept(self.study)
        self.killed: list[tuple[str, str]] = []

    def run_folder(self, name: str) -> Path:
        return self.consortium.coordinator / "runs" / name

    def submit(self, name: str) -> None:
        where = ("--dir", self.consortium.coordinator)
        self.consortium.call("fedbridge-server", "run", self.study, *where, "--name", name, "--detach")

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

    def check_audit_logs(self) -> None:
        for folder in self.consortium.sites.values():
            text = self.consortium.call("fedbridge-site", "audit", "verify", folder)
            assert "each follows the one before it" in text

    def same_result(self, name: str) -> None:
        """The bridge of a run that nobody disturbed, and the same windows evaluated in the same way."""
        mine = load_file(self.run_folder(name) / "bridge" / "bridge.safetensors")
        its = load_file(self.reference / "bridge" / "bridge.safetensors")
        assert max(float(np.abs(mine[key] - its[key]).max()) for key in its) <= 1e-6
        evaluated = [
            json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["confusion"]
            for run in (self.run_folder(name), self.reference)
        ]
        assert evaluated[0] == evaluated[1]


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


@contextmanager
def disturbed(place: Path, hospitals: int = 3) -> Iterator[Disturbed]:
    """One that is up, until the test ends."""
    found = Disturbed(place, hospitals)
    try:
        found.consortium.up()
        yield found
    finally:
        found.consortium.close()
