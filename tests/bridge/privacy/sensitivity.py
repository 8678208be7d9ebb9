"""Does one patient move a sum by no more than its bound? A check for any computing function, on made cohorts.

A check that never fails proves nothing, so the tests that use it also hand it functions with a planted fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    """Windows of some patients, row by row: who, features at each position, and three kinds of class."""

    patients: NDArray[np.str_]
    new: tuple[Array, ...]
    old: tuple[Array, ...]
    labels: NDArray[np.int64]
    teacher: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def without(self, patient: str) -> Cohort:
        """The neighbour that lacks one patient; the other rows stay in their order."""
        keep = self.patients != patient
        return Cohort(
            self.patients[keep],
            tuple(x[keep] for x in self.new),
            tuple(x[keep] for x in self.old),
            self.labels[keep],
            self.teacher[keep],
            self.predicted[keep],
        )


Compute = Callable[[Cohort], Array]


def made_cohort(
    seed: int, patients: int, *, positions: int = 4, classes: int = 3, most_windows: int = 9, signal: float = 3.0
) -> Cohort:
    """Patients of 1 to `most_windows` windows, whose features tell the classes more or less well (`signal` 0: not)."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(1, most_windows + 1, size=patients)
    names = np.repeat([f"patient-{seed}-{i}" for i in range(patients)], windows) if patients else np.array([], np.str_)
    teacher = rng.integers(0, classes, size=len(names))
    centres = rng.normal(size=(positions, classes, 5)) * rng.uniform(0, signal, size=(positions, 1, 1))
    new = tuple(centre[teacher] + rng.normal(size=(len(names), 5)) for centre in centres)
    old = tuple(x @ rng.normal(size=(5, 6)) + rng.normal(size=(len(names), 6)) for x in new)
    right = rng.random(len(names)) < 0.8
    labels = np.where(rng.random(len(names)) < 0.1, -1, teacher)
    predicted = np.where(right, teacher, rng.integers(0, classes, size=len(names)))
    return Cohort(np.asarray(names, np.str_), new, old, labels, teacher, predicted)


def moves(compute: Compute, cohort: Cohort) -> Iterator[tuple[str, float]]:
    """Each patient of the cohort, and how far (L2) the sum moves when it is taken away.

    `compute` is the function without noise. The shape may not change, and every number must be finite.
    """
    whole = compute(cohort)
    for patient in np.unique(cohort.patients):
        rest = compute(cohort.without(str(patient)))
        assert rest.shape == whole.shape
        assert rest.dtype == whole.dtype
        assert np.isfinite(rest).all()
        yield str(patient), float(np.linalg.norm(whole - rest))


def exceeded(compute: Compute, cohort: Cohort, bound: float) -> list[str]:
    """The patients who move the sum by more than `bound` (up to rounding): none, where the bound holds."""
    return [patient for patient, move in moves(compute, cohort) if move > bound * (1 + 1e-9)]
