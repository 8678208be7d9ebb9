"""The run as it is known so far: what becomes `run.json`, and what a checkpoint must remember of it."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bridge.job import Job
from bridge.messages import ITEMS
from server.record import (
    BridgeRecord,
    Evaluation,
    OutboxRecord,
    RoundRecord,
    RunRecord,
    SelectionRecord,
    SiteRecord,
    write_record,
)

Engine = Literal["local", "flower", "deployment"]

REFUSED = "refused"
"""Under this name the outbox summary counts what came and was not accepted: its names are not the schema's."""

_PACKAGES = (
    "fedbridge",
    "flwr",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "pydantic",
    "opacus",
    "dp-accounting",
)
_SECONDS_BETWEEN_WRITES = 0.5


class RunBook:
    """Collects what a run did and writes `run.json` from it.

    `save()` writes at most twice a second and for at most a twentieth of the time, since a round may take milliseconds
    (`log.jsonl` has each as it ends, and the checkpoints hold what a resume needs); another status is always written.
    """

    def __init__(
        self, folder: Path, *, run_id: str, job: Job, engine: Engine, models: dict[str, dict[str, Any]], started: str
    ) -> None:
        self.folder = folder
        self.selection: SelectionRecord | None = None
        self.bridge: BridgeRecord | None = None
        self.evaluation = Evaluation()
        self.resumed_from: int | None = None
        self._fixed: dict[str, Any] = {
            "run_id": run_id,
            "name": job.name,
            "config": job.model_dump(mode="json", by_alias=True),
            "seed": job.seed,
            "engine": engine,
            "threat_model": job.privacy.mechanism,
            "models": models,
            "versions": versions(),
        }
        self._private = job.privacy.private
        self._started = started
        self._seconds_before = 0.0
        self._clock = time.monotonic()
        self._next_write = 0.0
        self._answers: dict[str, tuple[bool, str]] = {}
        self._lost: dict[str, list[str]] = {}
        self._outbox: dict[tuple[str, str], list[int]] = {}
        self._rounds: list[RoundRecord] = []
        self._round_values: list[dict[str, Any]] = []

    def described(self, site: str, can_take_part: bool, reason: str) -> None:
        """What a site answered to describe; `reason` is a code's name."""
        self._answers[site] = (can_take_part, reason)

    def lost_turn(self, site: str, phase: str, code: str) -> None:
        """A site lost its turn in a phase or round."""
        self._lost.setdefault(site, []).append(f"{phase}: {code}")

    def count(self, site: str, item: str, size: int) -> None:
        """An item of so many bytes came from a site."""
        entry = self._outbox.setdefault((site, item), [0, 0])
        entry[0] += 1
        entry[1] += size

    def add_round(self, record: RoundRecord) -> None:
        """A round counted."""
        self._rounds.append(record)
        self._round_values.append(record.model_dump(mode="json"))

    @property
    def seconds(self) -> float:
        """Time that the run took so far, over all its starts."""
        return self._seconds_before + time.monotonic() - self._clock

    def progress(self) -> dict[str, Any]:
        """What a checkpoint remembers, as plain JSON values."""
        return {
            "started": self._started,
            "seconds": self.seconds,
            "selection": self.selection.model_dump(mode="json") if self.selection else None,
            "rounds": self._round_values,
            "lost": self._lost,
            "outbox": [[site, item, *numbers] for (site, item), numbers in self._outbox.items()],
        }

    def restore(self, progress: dict[str, Any], round_: int) -> None:
        """Go on from what a checkpoint of `round_` remembers.

        What came between it and the end of the process is not counted: each site's audit log has it.
        """
        self._started = progress["started"]
        self._seconds_before = progress["seconds"]
        self.selection = SelectionRecord.model_validate(progress["selection"])
        self._rounds, self._round_values = [], []
        for values in progress["rounds"]:
            self.add_round(RoundRecord.model_validate(values))
        for site, turns in progress["lost"].items():
            self._lost[site] = turns + self._lost.get(site, [])
        for site, item, count, size in progress["outbox"]:
            entry = self._outbox.setdefault((site, item), [0, 0])
            entry[0] += count
            entry[1] += size
        self.resumed_from = round_

    def save(self, status: Literal["running", "completed", "failed"] = "running", error: str | None = None) -> None:
        """Write `run.json`; raises `RunFolderError` where that fails."""
        started = time.monotonic()
        if status == "running" and started < self._next_write:
            return
        write_record(self.folder, self.record(status, error))
        took = time.monotonic() - started
        self._next_write = started + max(_SECONDS_BETWEEN_WRITES, 20 * took)

    def record(self, status: Literal["running", "completed", "failed"], error: str | None = None) -> RunRecord:
        """The run record as of now."""
        return RunRecord(
            status=status,
            error=error,
            sites=self._sites(),
            selection=self.selection,
            bridge=self.bridge,
            rounds=self._rounds,
            evaluation=self.evaluation,
            outbox=[
                OutboxRecord(site=site, item=item, count=count, bytes=size, purpose=_purpose(item))
                for (site, item), (count, size) in sorted(self._outbox.items())
            ],
            started=self._started,
            seconds=None if self._private else round(self.seconds, 3),
            resumed_from_round=self.resumed_from,
            **self._fixed,
        )

    def _sites(self) -> list[SiteRecord]:
        names = sorted({*self._answers, *self._lost})
        answers = {name: self._answers.get(name, (False, "NO_REPLY")) for name in names}
        return [
            SiteRecord(site=name, can_take_part=can, reason=reason, lost_turns=self._lost.get(name, []))
            for name, (can, reason) in answers.items()
        ]


def versions() -> dict[str, str]:
    """Versions of what computed the run, by package, and Python's."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _purpose(item: str) -> str:
    return ITEMS[item].purpose if item in ITEMS else "none: refused by the server's check of replies"
