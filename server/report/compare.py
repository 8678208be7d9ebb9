"""Runs side by side: one row a run, mean and spread over runs that differ only in seed, and the keys that differ."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import ConfigError
from server.record import Metric, RunRecord
from server.report.folder import RunFolder, read_folder
from server.report.page import fill, write_file
from server.report.tables import Table
from server.report.words import (
    METRIC_NAMES,
    PREDICTOR_NAMES,
    figure,
    figure_over_interval,
    in_bytes,
    in_time,
    predictors,
)

_LABELS = frozenset({"seed", "name"})
"""First-level keys in which runs of one configuration may differ: repeats of one experiment have their own."""


_HEADS = {
    "teacher": "Teacher",
    "centralised": "One machine",
    "linear_student": "Linear",
    "bridge": "Bridge",
    "site_alone": "Alone",
    "kd:centralised": "KD",
    "kd_contrast:centralised": "KD-Contrast",
    "kd:site_alone": "KD alone",
    "kd_contrast:site_alone": "KD-Contrast alone",
    "shuffled_pairs": "Shuffled",
    "chance": "Chance",
}
"""Short names, so that the columns fit a terminal."""


@dataclass(frozen=True)
class Run:
    """A run and the short name by which the comparison calls it."""

    label: str
    folder: RunFolder

    @property
    def record(self) -> RunRecord:
        """Its run record."""
        return self.folder.record

    def figure(self, predictor: str, metric: str = "balanced_accuracy") -> Metric | None:
        """One figure of one predictor; None where the run has none."""
        row = predictors(self.record.evaluation).get(predictor)
        found: Metric | None = getattr(row, metric) if row is not None else None
        return found

    @property
    def bytes_sent(self) -> int:
        """All that left the sites."""
        return sum(row.bytes for row in self.record.outbox)


@dataclass(frozen=True)
class Spread:
    """Balanced accuracy over the seeds of one configuration, by predictor: (mean, sample standard deviation)."""

    runs: tuple[Run, ...]
    figures: dict[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """How many seeds, and on a second line of which runs."""
        return f"Mean of {len(self.runs)} seeds\n{', '.join(run.label for run in self.runs)}"


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs; labels are the folders' names, with as many parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("the same run folder is named twice", fix="name each run once")
    depth = 1
    deepest = max(len(path.parts) for path in paths)
    while len({path.parts[-depth:] for path in paths}) < len(paths) and depth < deepest:
        depth += 1
    return [Run("/".join(path.parts[-depth:]), read_folder(path)) for path in paths]


def shown_predictors(runs: Iterable[Run]) -> list[str]:
    """The predictors that any of the runs has a balanced accuracy of."""
    every = list(runs)
    return [name for name in PREDICTOR_NAMES if any(run.figure(name) is not None for run in every)]


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """Runs that completed and differ in nothing but seed and name, at least two each, with their mean and spread."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.record.status == "completed":
            configs = [_without_labels(config) for config in (run.record.config, run.folder.simulation)]
            key = json.dumps([run.record.engine, *configs], sort_keys=True, default=str)
            groups.setdefault(key, []).append(run)
    repeated = [tuple(group) for group in groups.values() if len({run.record.seed for run in group}) > 1]
    return [Spread(group, _figures(group)) for group in repeated]


def _figures(group: Sequence[Run]) -> dict[str, tuple[float, float]]:
    found = {}
    for name in PREDICTOR_NAMES:
        values = [metric.value for run in group if (metric := run.figure(name)) is not None]
        if len(values) == len(group):
            found[name] = (statistics.fmean(values), statistics.stdev(values))
    return found


def _without_labels(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _LABELS}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots; values as text."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def differences(runs: Sequence[Run]) -> Table:
    """The configuration keys in which the runs differ, one row a key, one column a run; absent keys are `(none)`.

    Keys of the configuration around a simulated job begin with `simulation.`; what the job says too is not repeated.
    """
    configs = [_all_keys(run) for run in runs]
    keys = [key for config in configs for key in config]
    rows = []
    for key in dict.fromkeys(keys):
        values = tuple(config.get(key, "(none)") for config in configs)
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Table(("Key", *(run.label for run in runs)), rows)


def _all_keys(run: Run) -> dict[str, str]:
    job, around = flat(run.record.config), flat(run.folder.simulation)
    return job | {f"simulation.{key}": value for key, value in around.items() if job.get(key) != value}


def figures_table(runs: Sequence[Run], intervals: Sequence[str] = tuple(PREDICTOR_NAMES)) -> Table:
    """One row a run with its balanced accuracies, then one row a repeated configuration with mean and spread.

    `intervals` names the predictors whose intervals are shown.
    """
    names = shown_predictors(runs)
    rows: list[tuple[str, ...]] = [(run.label, *(_cell(run, name, intervals) for name in names)) for run in runs]
    found = spreads(runs)
    for spread in found:
        cells = [spread.figures.get(name) for name in names]
        rows.append((spread.name, *(f"{cell[0]:.3f}\n± {cell[1]:.3f}" if cell else "–" for cell in cells)))
    heads = ("Run", *(_HEADS[name] for name in names))
    strong = frozenset(range(len(runs), len(rows)))
    of_figures = frozenset(range(1, len(heads)))
    return Table(heads, rows, of_figures, strong, fine=of_figures | {0})


def _cell(run: Run, name: str, intervals: Sequence[str]) -> str:
    found = run.figure(name)
    return figure_over_interval(found) if name in intervals else figure(found)


def runs_table(runs: Sequence[Run]) -> Table:
    """One row a run with what it did: engine, seed, positions, parameters, rounds, time, bytes."""
    rows = []
    for run in runs:
        record = run.record
        chosen, bridge = record.selection, record.bridge
        rows.append(
            (
                run.label,
                record.status,
                record.engine,
                str(record.seed),
                f"{chosen.mode}: {chosen.input_position} → {chosen.output_position}" if chosen else "–",
                f"{bridge.parameters:,}" if bridge else "–",
                str(len(record.rounds)),
                "–" if record.seconds is None else in_time(record.seconds),
                in_bytes(run.bytes_sent),
            )
        )
    heads = ("Run", "Status", "Engine", "Seed", "Positions", "Parameters", "Rounds", "Time", "Left the sites")
    return Table(heads, rows, frozenset({3, 5, 6, 7, 8}))


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Write the comparison as one self-contained HTML page; raises `RunFolderError` where it can't be written."""
    from server.report.charts import comparison_chart

    names = shown_predictors(runs)
    chart = comparison_chart([run.label for run in runs], [{name: run.figure(name) for name in names} for run in runs])
    content = {
        "runs": runs,
        "chart": chart,
        "figures": figures_table(runs),
        "spreads": spreads(runs),
        "facts": runs_table(runs),
        "differences": differences(runs),
        "failures": [(run.label, run.record.error or "") for run in runs if run.record.status == "failed"],
    }
    write_file(out, fill("compare.html.j2", content))
    return out


def comparison_csv(runs: Sequence[Run]) -> str:
    """One line a run: what it is, then every figure as `<predictor>.<metric>.<value|low|high>`; empty where none."""
    lines = [_csv_line(run) for run in runs]
    heads = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(run: Run) -> dict[str, object]:
    record = run.record
    line: dict[str, object] = {
        "run": run.label,
        "status": record.status,
        "engine": record.engine,
        "seed": record.seed,
        "mode": record.selection.mode if record.selection else "",
        "input_position": record.selection.input_position if record.selection else "",
        "output_position": record.selection.output_position if record.selection else "",
        "parameters": record.bridge.parameters if record.bridge else "",
        "rounds": len(record.rounds),
        "seconds": record.seconds,
        "bytes_left_sites": run.bytes_sent,
        "bytes_down": sum(row.bytes_down for row in record.rounds),
    }
    for name in PREDICTOR_NAMES:
        for metric in METRIC_NAMES:
            found = run.figure(name, metric)
            if found is not None:
                prefix = f"{name}.{metric}"
                line |= {f"{prefix}.value": found.value, f"{prefix}.low": found.low, f"{prefix}.high": found.high}
    return line
