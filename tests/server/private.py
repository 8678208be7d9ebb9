"""Jobs and records of private runs, for the tests of the statement and of the report."""

from __future__ import annotations

from typing import Any

from bridge.job import Job
from server.record import RunRecord
from tests.server import runs

PRIVACY: dict[str, Any] = {
    "mechanism": "central",
    "delta": 1e-3,
    "patients_bound": 100,
    "training": {"noise_multiplier": 1.3, "sampling_rate": 0.25, "clip": 0.7, "divisor": 12},
    "selection": {"noise_multiplier": 4.0, "groups": 6, "clip": 0.5},
    "metrics": {"noise_multiplier": 0.9},
}


def config(**privacy: Any) -> dict[str, Any]:
    """A job with every noise multiplier it needs; keyword arguments change its privacy section."""
    changed = {
        "name": "private",
        "models": runs.config()["models"],
        "train": {"rounds": 80, "local_steps": 1},
        "privacy": PRIVACY | privacy,
    }
    return Job.model_validate(changed).model_dump(mode="json", by_alias=True)


def job(**privacy: Any) -> Job:
    return Job.model_validate(config(**privacy))


def record(asked: dict[str, Any] | None = None, public: object = 40) -> RunRecord:
    """The record of such a run as the server leaves it: no losses, no seconds, no scores of a site."""
    asked = asked if asked is not None else config()
    content = runs.completed()
    content |= {"name": "private", "config": asked, "threat_model": asked["privacy"]["mechanism"]}
    content["models"] = {
        name: card | {"training": {"data": "made up", "public_patients": public}}
        for name, card in content["models"].items()
    }
    if asked["privacy"]["mechanism"] != "none":
        content["seconds"] = None
        content["rounds"] = [row | {"loss": None, "criterion": None, "seconds": None} for row in content["rounds"]]
        for scores in ("probe_scores", "similarity_scores"):
            content["selection"][scores] = {"aggregate": [-0.3, 0.1, 0.2, 0.9, -0.1], "noise_deviation": 0.4}
        content["evaluation"] = {
            "bridge": runs.metrics(0.71, 0.08, 0.8),
            "teacher": runs.metrics(0.78, 0.08),
            "chance": runs.metrics(1 / 3, None),
            "confusion_sums": {"bridge": [[9.1, 2.2, -0.6], [1.7, 8.4, 1.1], [0.2, 2.9, 7.7]]},
            "noise_deviation": 0.9,
            "classes": runs.CLASSES,
            "interval": "95 %, of the noise and of the patients",
        }
    return RunRecord.model_validate(content)
