"""The page of a sweep: curves, a table of means, one line a run, and the sweep itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import server.report
from server.report.page import write_file
from server.report.tables import Table
from server.report.words import METRIC_NAMES, PREDICTOR_NAMES, figure, figure_over_interval, in_time
from simulations.sweep.curves import write_curves
from simulations.sweep.grid import Label, SweepConfig
from simulations.sweep.summary import Key, Summary, by_labels
from simulations.sweep.table import Row

REPORT = "report.html"


def write_page(sweep: SweepConfig, rows: Sequence[Row], out: Path) -> Path:
    """Draw the curves and write `report.html` into `out`; returns its path. Raises `RunFolderError`."""
    metric = sweep.curves.metric if sweep.curves else "balanced_accuracy"
    curves = write_curves(rows, sweep.curves, out) if sweep.curves else None
    failed = [row for row in rows if row.status == "failed"]
    content = {
        "sweep": sweep,
        "facts": _facts(sweep, rows),
        "failures": [(_name(row), row.error or "") for row in failed],
        "curves": curves,
        "heading": f"{METRIC_NAMES[metric]} and {sweep.curves.x}" if sweep.curves else "",
        "private": any(row.threat_model != "none" for row in rows),
        "delta": ", ".join(sorted({f"{row.delta:g}" for row in rows if row.delta is not None})) or "–",
        "metric": METRIC_NAMES[metric].lower(),
        "means": means_table(rows, metric),
        "runs": _runs_table(rows, metric),
        "text": _text(sweep),
    }
    write_file(out / REPORT, _fill(content))
    return out / REPORT


def _fill(content: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(server.report.__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**content)


def _facts(sweep: SweepConfig, rows: Sequence[Row]) -> list[str]:
    done = [row for row in rows if row.status == "completed"]
    return [
        f"{len(done)} of {len(rows)} runs completed",
        f"seeds {', '.join(map(str, sweep.seeds))}",
        f"{in_time(sum(row.seconds for row in done))} of computing",
    ]


def _name(row: Row) -> str:
    return ", ".join([*(f"{axis} {label}" for axis, label in row.labels.items()), f"seed {row.seed}"])


def means_table(rows: Sequence[Row], metric: str) -> Table:
    """One row a point of the grid: axes, composed epsilon, parameters, the bridge's mean, and the controls' means."""
    names = [name for name in PREDICTOR_NAMES if name != "chance"]  # the same everywhere, and in the picture
    shown = [name for name in names if any(row.figure(name, metric) is not None for row in rows)]
    shown.sort(key=lambda name: name != "bridge")  # first: a terminal shows no more
    found = {name: by_labels(rows, name, metric) for name in shown}
    axes = list(rows[0].labels)
    body = []
    for key in dict.fromkeys(tuple(row.labels.items()) for row in rows):
        here = [row for row in rows if tuple(row.labels.items()) == key and row.status == "completed"]
        cells = [_mean_cell(found[name].get(key)) for name in shown]
        body.append((*_labels_of(key), str(len(here)), _range([r.epsilon for r in here]), _counts(here), *cells))
    heads = (*axes, "Seeds", "Epsilon", "Parameters", *(PREDICTOR_NAMES[name] for name in shown))
    numbers = frozenset(range(len(axes), len(heads)))
    return Table(heads, body, numbers, fine=frozenset(range(len(axes) + 3, len(heads))))


def _labels_of(key: Key) -> tuple[str, ...]:
    return tuple(_shown(label) for _, label in key)


def _shown(label: Label) -> str:
    return f"{label:g}" if isinstance(label, float) else str(label)


def _mean_cell(found: Summary | None) -> str:
    if found is None:
        return "–"
    bounds = "" if found.low is None or found.high is None else f"\n{found.low:.2f}–{found.high:.2f}"
    return f"{found.value:.3f}{bounds}"


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return low if low == high else f"{low}–{high}"


def _counts(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({f"{row.parameters:,}" for row in rows if row.parameters is not None})) or "–"


def _runs_table(rows: Sequence[Row], metric: str) -> Table:
    axes = list(rows[0].labels)
    released = any(row.released is not None for row in rows)
    body = []
    for row in rows:
        positions = f"{row.positions[0]} → {row.positions[1]}" if row.positions else "–"
        cells = [*map(_shown, row.labels.values()), str(row.seed), row.status, positions, in_time(row.seconds)]
        cells += [figure_over_interval(row.figure("bridge", metric)), figure(row.figure("bridge", "agreement"))]
        if released:
            cells.append(figure_over_interval(getattr(row.released, metric) if row.released else None))
        body.append((*cells, f"runs/{row.key}"))
    heads = (*axes, "Seed", "Status", "Positions", "Time", METRIC_NAMES[metric], "Agreement")
    heads += (("Released, with noise",) if released else ()) + ("Folder",)
    first = len(axes)
    of_figures = frozenset(range(first + 3, len(heads) - 1))
    return Table(heads, body, of_figures | {first}, fine=of_figures)


def _text(sweep: SweepConfig) -> str:
    return yaml.safe_dump(sweep.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
