"""The curves of a sweep: a figure over one axis, a line for each value of the others, and what to hold it against.

Drawn once: as an inline SVG for the page, and as curves.svg and curves.png.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bridge.files import write_whole
from server.errors import RunFolderError
from server.report.drawing import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PAPER, RED, WIDE, as_svg, canvas
from server.report.words import METRIC_NAMES
from simulations.sweep.grid import EPSILON, MECHANISM, CurvesConfig, Label
from simulations.sweep.summary import Summary, is_plain, selected, summary
from simulations.sweep.table import Row

_LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (RED, "^"), (MUTED, "v"), (INK, "P"))
_REFERENCES = {"teacher": (INK, "teacher"), "site_alone": (MUTED, "hospital alone"), "chance": (GREY, "chance")}


@contextmanager
def drawn(rows: Sequence[Row], curves: CurvesConfig) -> Iterator[tuple[Any, str]]:
    """The figure and its description in words, for as long as the block lasts."""
    noised = [row for row in rows if not is_plain(row, curves.x)]
    panels = _labels(noised, curves.series[0]) if len(curves.series) == 2 else [None]
    lines = _labels(noised, curves.series[-1]) if curves.series else [None]
    ticks = _labels(noised, curves.x)
    with canvas(WIDE, 3.9, "sweep") as fig:
        every = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, panel in zip(every, panels, strict=True):
            inside = rows if panel is None else selected(rows, curves.series[0], panel, curves.x)
            places = _places(axes, ticks)
            for number, line in enumerate(lines):
                mine = inside if line is None else selected(inside, curves.series[-1], line, curves.x)
                _line(axes, mine, curves, places, number, len(lines), str(line or "bridge"))
            _reference_lines(axes, inside, curves.metric, named=axes is every[-1])
            axes.set(
                xlabel=_axis_name(curves.x), title="" if panel is None else f"{_axis_name(curves.series[0])}: {panel}"
            )
            axes.set_xlim(-0.35, len(ticks) - 0.65)
        every[0].set_ylabel(METRIC_NAMES[curves.metric])
        _legend(fig, every[0])
        yield fig, f"{METRIC_NAMES[curves.metric]} over {_axis_name(curves.x)}, a line for each {curves.series[-1:]}"


def _labels(rows: Sequence[Row], axis: str) -> list[Label]:
    """An axis's values in the grid's order; numbers by size."""
    found = list(dict.fromkeys(row.labels[axis] for row in rows))
    numbers = [each for each in found if isinstance(each, int | float)]
    return sorted(numbers) if len(numbers) == len(found) else found


def _places(axes: Any, ticks: Sequence[Label]) -> dict[Label, float]:
    """Where each value stands along x: evenly, as epsilons are chosen by factors."""
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" if isinstance(tick, float) else str(tick) for tick in ticks])
    return {tick: float(place) for place, tick in enumerate(ticks)}


def _line(
    axes: Any,
    rows: Sequence[Row],
    curves: CurvesConfig,
    places: Mapping[Label, float],
    number: int,
    lines: int,
    name: str,
) -> None:
    """One line with its intervals, and dotted the same without noise."""
    colour, marker = _LINES[number % len(_LINES)]
    shift = (number - (lines - 1) / 2) * 0.09
    found: dict[float, Summary] = {}
    for tick, place in places.items():
        here = [row.figure("bridge", curves.metric) for row in rows if row.labels[curves.x] == tick]
        if (each := summary([metric for metric in here if metric is not None])) is not None:
            found[place + shift] = each
    for place, each in found.items():
        _bar(axes, place, each, colour)
    values = [each.value for each in found.values()]
    axes.plot(list(found), values, marker=marker, color=colour, lw=1.8, ms=6, mec=PAPER, mew=0.7, label=name)
    plain = [row.figure("bridge", curves.metric) for row in rows if is_plain(row, curves.x)]
    if (free := summary([metric for metric in plain if metric is not None])) is not None:
        axes.axhline(free.value, color=colour, ls=":", lw=1.4)


def _bar(axes: Any, place: float, found: Summary, colour: str) -> None:
    """Thin: over seeds and patients. Thick: over seeds alone."""
    if found.low is not None:
        axes.plot([place, place], [found.low, found.high], color=colour, lw=1.0, alpha=0.55)
    if found.seeds_low is not None:
        axes.plot([place, place], [found.seeds_low, found.seeds_high], color=colour, lw=3.2, alpha=0.45)


def _reference_lines(axes: Any, rows: Sequence[Row], metric: str, *, named: bool) -> None:
    """Teacher, hospital alone and chance: means over all rows that have them."""
    for predictor, (colour, name) in _REFERENCES.items():
        found = summary([each for row in rows if (each := row.figure(predictor, metric)) is not None])
        if found is None:
            continue
        axes.axhline(found.value, color=colour, ls="--", lw=1.1)
        if named:
            axes.annotate(
                f"{name} {found.value:.2f}",
                (1.01, found.value),
                xycoords=("axes fraction", "data"),
                va="center",
                color=colour,
                annotation_clip=False,
            )


def _legend(fig: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if any(line.get_linestyle() == ":" for line in axes.get_lines()):
        from matplotlib.lines import Line2D

        handles, names = [*handles, Line2D([], [], color=MUTED, ls=":", lw=1.4)], [*names, "the same without noise"]
    fig.legend(handles, names, loc="outside upper left", ncols=5, fontsize=8.5)


def _axis_name(axis: str) -> str:
    return {EPSILON: "epsilon of a patient", MECHANISM: "threat model"}.get(axis, axis)


def write_curves(rows: Sequence[Row], curves: CurvesConfig, out: Path) -> Markup | None:
    """Write curves.svg and curves.png into `out` and return the inline SVG; None where no run has a figure.

    Raises `RunFolderError`.
    """
    shown = [row for row in rows if row.figure("bridge", curves.metric) is not None]
    if all(is_plain(row, curves.x) for row in shown):
        return None
    with drawn(shown, curves) as (figure, description):
        inline = as_svg(figure, description)
        try:
            for kind in ("svg", "png"):
                buffer = io.BytesIO()
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                figure.savefig(buffer, format=kind, dpi=160, metadata=metadata, facecolor=PAPER)
                write_whole(out / f"curves.{kind}", buffer.getvalue())
        except OSError as error:
            raise RunFolderError(
                f"{out}: the curves can't be written", why=error.strerror or "", fix="free space, then --resume"
            ) from error
    return inline
