"""95 % intervals by resampling patients: the patient is the unit, never the window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bridge.metrics import accuracy, balanced_accuracy, f1_macro, f1_weighted
from server.record import Metric, Metrics

_Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]

_FIGURES: Mapping[str, _Figure] = MappingProxyType(
    {"balanced_accuracy": balanced_accuracy, "f1_macro": f1_macro, "f1_weighted": f1_weighted}
)


@dataclass(frozen=True)
class PatientCounts:
    """What one predictor did, patient by patient: `labels` and `agreement` `(patients, classes, classes)`.

    Rows are labels (pseudo-labels in `agreement`), columns predictions. Counts may be fractions: a predictor by chance
    has expected ones.
    """

    labels: NDArray[np.float64]
    agreement: NDArray[np.float64]


def count_patients(
    patients: NDArray[np.str_],
    labels: NDArray[np.int64],
    pseudo_labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    classes: int,
) -> PatientCounts:
    """Per-patient confusion of windows `(n,)`, patients sorted; windows labelled -1 count for agreement alone."""
    return PatientCounts(
        labels=per_patient(patients, labels, predictions, classes),
        agreement=per_patient(patients, pseudo_labels, predictions, classes),
    )


def count_chance(
    patients: NDArray[np.str_], labels: NDArray[np.int64], pseudo_labels: NDArray[np.int64], classes: int
) -> PatientCounts:
    """What is expected of a predictor that draws each class with the same probability."""

    def expected(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        support = per_patient(patients, rows, rows, classes).sum(axis=2, keepdims=True)
        return np.repeat(support / classes, classes, axis=2)

    return PatientCounts(labels=expected(labels), agreement=expected(pseudo_labels))


def per_patient(
    patients: NDArray[np.str_], rows: NDArray[np.int64], columns: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """`(patients, classes, classes)` counts of windows, patients sorted; rows of -1 are left out."""
    names, owner = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), classes, classes), dtype=np.float64)
    known = rows >= 0
    np.add.at(counts, (owner[known], rows[known], columns[known]), 1.0)
    return counts


def resample(patients: int, samples: int, seed: int) -> NDArray[np.float64]:
    """How often each patient is drawn in each sample: `(samples, patients)`, rows sum to `patients`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=samples).astype(np.float64)


def metrics(counts: PatientCounts, draws: NDArray[np.float64], level: float = 0.95) -> Metrics:
    """Figures of the pooled windows, each with its percentile interval over the same draws of patients.

    A figure that has no window (no labels at all) is null; samples in which it has none are left out.
    """
    return mean_metrics({"": counts}, draws, level)


def mean_metrics(counts: Mapping[str, PatientCounts], draws: NDArray[np.float64], level: float = 0.95) -> Metrics:
    """Mean figures of several predictors on the same patients, with the interval of the mean over the same draws."""
    figures: dict[str, Metric | None] = {
        name: _mean([each.labels for each in counts.values()], draws, figure, level)
        for name, figure in _FIGURES.items()
    }
    figures["agreement"] = _mean([each.agreement for each in counts.values()], draws, accuracy, level)
    return Metrics(**figures)


def _mean(
    several: list[NDArray[np.float64]], draws: NDArray[np.float64], figure: _Figure, level: float
) -> Metric | None:
    value = float(np.mean([figure(counts.sum(axis=0)) for counts in several]))
    if not np.isfinite(value):
        return None
    sampled = np.mean([figure(np.tensordot(draws, counts, axes=1)) for counts in several], axis=0)
    low, high = np.nanquantile(sampled, [(1 - level) / 2, (1 + level) / 2])
    return Metric(value=value, low=float(low), high=float(high))
