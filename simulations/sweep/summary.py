"""Rows that differ in their seed alone, as one figure with an interval over seeds and patients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt

from server.record import Metric
from simulations.sweep.grid import EPSILON, MECHANISM, NONE, Label
from simulations.sweep.table import Row


@dataclass(frozen=True)
class Summary:
    """A mean over seeds. `seeds_low, seeds_high`: its 95 % t interval over seeds alone, None for a single seed.
    `low, high`: over seeds and patients together."""

    value: float
    seeds: int
    seeds_low: float | None
    seeds_high: float | None
    low: float | None
    high: float | None


def summary(found: Sequence[Metric]) -> Summary | None:
    """The figures of several seeds as one; None without any.

    The seeds share their test patients, so averaging over them makes the patients' part of the error no smaller: half
    the interval is the root of (half the t interval over seeds) squared plus (the mean half of the bootstrap
    intervals) squared, for each side by itself; cut at 0 and 1.
    """
    if not found:
        return None
    values = [metric.value for metric in found]
    mean = statistics.fmean(values)
    half = _half_t(values)
    below = [metric.value - metric.low for metric in found if metric.low is not None]
    above = [metric.high - metric.value for metric in found if metric.high is not None]
    whole = len(below) == len(above) == len(found)
    return Summary(
        value=mean,
        seeds=len(values),
        seeds_low=None if half is None else max(0.0, mean - half),
        seeds_high=None if half is None else min(1.0, mean + half),
        low=max(0.0, mean - hypot(half or 0.0, statistics.fmean(below))) if whole else None,
        high=min(1.0, mean + hypot(half or 0.0, statistics.fmean(above))) if whole else None,
    )


def _half_t(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / sqrt(len(values))


Key = tuple[tuple[str, Label], ...]


def by_labels(rows: Sequence[Row], predictor: str, metric: str) -> dict[Key, Summary]:
    """One summary for each combination of labels that has a figure, in the rows' order."""
    grouped: dict[Key, list[Metric]] = {}
    for row in rows:
        found = row.figure(predictor, metric)
        if found is not None:
            grouped.setdefault(tuple(row.labels.items()), []).append(found)
    return {key: whole for key, metrics in grouped.items() if (whole := summary(metrics)) is not None}


def is_plain(row: Row, x: str) -> bool:
    """Whether a row has no place along epsilon, being without a mechanism: it is what all noise is held against."""
    return x == EPSILON and row.labels[EPSILON] == NONE


def selected(rows: Sequence[Row], axis: str, label: Label, x: str) -> list[Row]:
    """The rows of one label; where x is epsilon, a row without a mechanism belongs to every mechanism."""
    return [row for row in rows if row.labels[axis] == label or (axis == MECHANISM and is_plain(row, x))]
