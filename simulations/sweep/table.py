"""One row a run: what it was asked, what it cost, and its true figures on the test patients; as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from bridge.config import Settings
from bridge.files import write_whole
from server.errors import RunFolderError
from server.record import SIMULATED_EVALUATION, Evaluation, Metric, Metrics, RunRecord, read_evaluation, read_record
from server.report.words import METRIC_NAMES, PREDICTOR_NAMES, predictors
from server.statement import PRIVACY_JSON, Statement, read_statement
from simulations.sweep.grid import Label, Point

RESULTS_JSON, RESULTS_CSV = "results.json", "results.csv"


class Row(Settings):
    """One run of a sweep."""

    key: str
    """Names its row and its run folder."""
    labels: dict[str, Label]
    """Value of each axis."""
    seed: int
    status: Literal["completed", "failed"]
    error: str | None = None
    threat_model: str = "none"
    epsilon: float | None = None
    """Of a paired patient, composed over all that its data entered; null without a private mechanism."""
    test_epsilon: float | None = None
    """Of a test patient, who has a budget of its own."""
    delta: float | None = None
    parameters: int | None = None
    """Numbers that training changes."""
    positions: tuple[int, int] | None = None
    seconds: float = 0.0
    figures: dict[str, Metrics] = Field(default_factory=dict)
    """True figures by predictor: what only a simulation knows."""
    released: Metrics | None = None
    """The bridge's figures as a private run releases them, with their noise."""

    def figure(self, predictor: str, metric: str = "balanced_accuracy") -> Metric | None:
        """One figure of one predictor; None where there is none."""
        found = self.figures.get(predictor)
        value: Metric | None = getattr(found, metric) if found is not None else None
        return value


def figures(folder: Path) -> Evaluation:
    """The true figures of a simulated run's bridge and controls; raises `RunFolderError`.

    Under a private mechanism `run.json` holds what may be released; the truth stands beside it.
    """
    path = folder / SIMULATED_EVALUATION
    return read_evaluation(path) if path.is_file() else read_record(folder).evaluation


def row_of(point: Point, folder: Path, record: RunRecord, seconds: float) -> Row:
    """The row of a completed run that took so long here: a private record tells no times."""
    chosen = record.selection
    private = point.config.privacy.private
    statements = _statements(folder, record) if private else []
    return Row(
        key=point.key,
        labels=dict(point.labels),
        seed=point.seed,
        status="completed",
        threat_model=point.config.privacy.mechanism,
        epsilon=_lost(statements, "pair"),
        test_epsilon=_lost(statements, "test"),
        delta=sum(each.delta or 0.0 for each in statements) or None,
        parameters=record.bridge.parameters if record.bridge else None,
        positions=(chosen.input_position, chosen.output_position) if chosen else None,
        seconds=round(seconds, 3),
        figures=predictors(figures(folder)),
        released=record.evaluation.bridge if private else None,
    )


def failed_row(point: Point, error: str) -> Row:
    """The row of a run that ended with an error."""
    return Row(
        key=point.key,
        labels=dict(point.labels),
        seed=point.seed,
        status="failed",
        error=error,
        threat_model=point.config.privacy.mechanism,
    )


def _statements(folder: Path, record: RunRecord) -> list[Statement]:
    """What the run states; of one whose test patients were rotated, what each rotation states."""
    return [read_statement(folder / name / PRIVACY_JSON) for name in record.rotations or [""]]


def _lost(statements: Sequence[Statement], cohort: str) -> float | None:
    """Epsilon of a cohort's patients; over rotations, in which a patient takes part again and again, the sum."""
    found = [each.epsilon for statement in statements for each in statement.cohorts if each.cohort == cohort]
    return sum(found) if found else None


def write_row(folder: Path, row: Row) -> None:
    """Write a row beside the runs, whole or not at all; raises `RunFolderError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{row.key}.json", row.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error


def read_row(folder: Path, key: str) -> Row | None:
    """The row of a key; None where there is none, or a damaged file."""
    try:
        return Row.model_validate_json((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def write_tables(out: Path, rows: Sequence[Row]) -> None:
    """`results.json` (every row whole) and `results.csv`; raises `RunFolderError`."""
    content = {"schema": "fedbridge.sweep-results/1", "rows": [row.model_dump(mode="json") for row in rows]}
    try:
        write_whole(out / RESULTS_JSON, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        write_whole(out / RESULTS_CSV, csv_text(rows))
    except OSError as error:
        raise _unwritable(out, error) from error


def csv_text(rows: Sequence[Row]) -> str:
    """One line a run: the axes, what it cost, and each figure as `<predictor>.<metric>`, `....low`, `....high`."""
    lines = [_line(row) for row in rows]
    heads = list(dict.fromkeys(head for line in lines for head in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {**row.labels, **row.model_dump(include={"seed", "status", "threat_model"})}
    line |= {"pair_epsilon": row.epsilon, "test_epsilon": row.test_epsilon, "delta": row.delta}
    line |= row.model_dump(include={"parameters", "seconds"})
    line["positions"] = "-".join(map(str, row.positions)) if row.positions else ""
    for predictor in PREDICTOR_NAMES:
        if predictor in row.figures:
            line |= _columns(predictor, row.figures[predictor])
    if row.released is not None:
        line |= _columns("released", row.released)
    return line | {"error": row.error or "", "run": f"runs/{row.key}"}


def _columns(name: str, found: Metrics) -> Mapping[str, float | None]:
    columns: dict[str, float | None] = {}
    for metric in METRIC_NAMES:
        value: Metric | None = getattr(found, metric)
        if value is not None:
            columns |= {f"{name}.{metric}": value.value}
            columns |= {f"{name}.{metric}.low": value.low, f"{name}.{metric}.high": value.high}
    return columns


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: can't be written", why=error.strerror or str(error), fix="free space, then --resume"
    )
