"""`run.json`: what a run did, as data. Written by the run, read by the report; its JSON schema is in the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from bridge.config import Settings
from bridge.files import write_whole
from bridge.job_privacy import MechanismName
from server.errors import RunFolderError

Content = TypeVar("Content", bound=Settings)

RUN_JSON = "run.json"
SIMULATED_EVALUATION = "simulated_evaluation.json"
"""Beside the record of a simulated private run: the figures that only the simulator can compute, an `Evaluation`."""


class Metric(Settings):
    """One figure; `low` and `high` bound its 95 % interval, null where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Metrics(Settings):
    """One predictor's figures on the test patients; null where its confusion was not permitted or has no labels."""

    balanced_accuracy: Metric | None = None
    f1_macro: Metric | None = None
    f1_weighted: Metric | None = None
    agreement: Metric | None = None
    """Share of windows on which it predicts the pseudo-label."""


class PositionScores(Settings):
    """One score a position: the aggregate, and each site's where its policy and the mode let the server see it."""

    aggregate: list[float]
    per_site: dict[str, list[float]] | None = None
    noise_deviation: float | None = None
    """Standard deviation of the noise in each aggregate under a private mechanism; those are sums over groups."""


class SelectionRecord(Settings):
    """Which positions were chosen, and on what."""

    mode: Literal["scores", "moments", "fixed"]
    input_position: int
    output_position: int
    probe_scores: PositionScores | None = None
    similarity_scores: PositionScores | None = None


class BridgeRecord(Settings):
    """The kept bridge."""

    parameters: int
    rank: int
    prototypes: int
    sha256: str
    """sha256 of its safetensors file in `bridge/`."""
    kept_round: int


class RoundRecord(Settings):
    """One counted round."""

    round: int
    loss: float | None = None
    criterion: float | None = None
    """The `keep: best` criterion where it was computed."""
    sites: list[str]
    bytes_up: int
    bytes_down: int
    seconds: float | None = None
    """Null under a private mechanism: it depends on how many patients were drawn."""


class SiteRecord(Settings):
    """What a site answered to describe, and which turns it lost."""

    site: str
    can_take_part: bool
    reason: str
    lost_turns: list[str] = Field(default_factory=list)
    """`round or phase: why`, by code."""


BaselineName = Literal[
    "shuffled_pairs",
    "centralised",
    "linear_student",
    "site_alone",
    "kd:centralised",
    "kd:site_alone",
    "kd_contrast:centralised",
    "kd_contrast:site_alone",
]
"""Controls by name; of those of one hospital alone, the mean over the hospitals."""


class Cost(Settings):
    """What one training cost, in a process of its own; evaluation is no part of it."""

    parameters: int
    """Numbers that were trained."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """The most memory that the process held."""
    added_bytes: int
    """By how much that is more than what it held with its libraries loaded."""


class Evaluation(Settings):
    """The result beside its controls, all on the same test patients."""

    bridge: Metrics | None = None
    teacher: Metrics | None = None
    chance: Metrics | None = None
    baselines: dict[BaselineName, Metrics] = Field(default_factory=dict)
    site_alone_per_site: dict[str, Metrics] = Field(default_factory=dict)
    rivals_per_site: dict[Literal["kd", "kd_contrast"], dict[str, Metrics]] = Field(default_factory=dict)
    """Each rival trained by one hospital on its own pairs, by hospital."""
    costs: dict[str, Cost] = Field(default_factory=dict)
    """What trainings cost, where rivals were asked for: `centralised`, `site_alone:<name>`, `kd:centralised`, ..."""
    confusion: dict[Literal["bridge", "teacher", "agreement"], list[list[int]]] = Field(default_factory=dict)
    """Rows: labels (pseudo-labels for `agreement`); columns: predictions; order of `classes`."""
    confusion_sums: dict[Literal["bridge", "teacher", "agreement"], list[list[float]]] = Field(default_factory=dict)
    """Under a private mechanism, instead: noised sums of patients' tables, each patient's of norm at most one."""
    noise_deviation: float | None = None
    """Standard deviation of the noise in each cell of `confusion_sums`."""
    groups: dict[str, dict[str, Metrics]] = Field(default_factory=dict)
    """Figures by a public group of the recordings (for example the alarm type): group, predictor, metrics."""
    classes: list[str] = Field(default_factory=list)
    patients: int | None = None
    windows: int | None = None
    interval: str = ""


class OutboxRecord(Settings):
    """What left a site, item by item."""

    site: str
    item: str
    count: int
    bytes: int
    purpose: str


class RunRecord(Settings):
    """The whole of `run.json`, schema fedbridge.run/1."""

    schema_: Literal["fedbridge.run/1"] = Field(default="fedbridge.run/1", alias="schema")
    status: Literal["running", "completed", "failed"]
    error: str | None = None
    run_id: str
    name: str
    config: dict[str, Any]
    seed: int
    engine: Literal["local", "flower", "deployment"]
    threat_model: MechanismName = "none"
    sites: list[SiteRecord] = Field(default_factory=list)
    selection: SelectionRecord | None = None
    bridge: BridgeRecord | None = None
    rounds: list[RoundRecord] = Field(default_factory=list)
    evaluation: Evaluation = Evaluation()
    outbox: list[OutboxRecord] = Field(default_factory=list)
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Card of each frozen model: old_encoder, new_encoder, task_head."""
    versions: dict[str, str] = Field(default_factory=dict)
    started: str = ""
    seconds: float | None = None
    """Null under a private mechanism."""
    resumed_from_round: int | None = None
    rotations: list[str] = Field(default_factory=list)
    """Sub-folders of a run whose test patients were rotated: each holds a run record, `evaluation` here pools them."""


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json` in one atomic rename; raises `RunFolderError` where the folder can't be written."""
    _write(folder / RUN_JSON, record)


def read_record(folder: Path) -> RunRecord:
    """Read `run.json` of a run folder; raises `RunFolderError` where there is none or it is no run record."""
    return _read(folder / RUN_JSON, RunRecord, "a run record of schema fedbridge.run/1")


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as a file of its own; raises `RunFolderError`."""
    _write(path, evaluation)


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation's own file; raises `RunFolderError`."""
    return _read(path, Evaluation, "an evaluation")


def _write(path: Path, content: Settings) -> None:
    text = json.dumps(content.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise RunFolderError(
            f"{path}: can't be written",
            why=error.strerror or "",
            fix="free space or choose a writable --out",
        ) from error


def _read(path: Path, model: type[Content], what: str) -> Content:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"{path}: can't be read", why=error.strerror or "", fix="name the folder of a run (it holds run.json)"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        raise RunFolderError(
            f"{path}: is not {what}",
            why=f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ") if first else str(error),
            fix="use the file as the run wrote it",
        ) from error


def schema_text() -> str:
    """The JSON schema of `run.json` as text: docs/reference/run.schema.json."""
    schema = RunRecord.model_json_schema(by_alias=True)
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
