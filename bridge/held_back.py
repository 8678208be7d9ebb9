"""Patients who are held back from a fit: who they are, which epoch they choose, and how good it is on patients like
them.

Everything is reckoned from counts by patient, `(epochs, patients, classes, classes)`: rows are labels, columns
predictions. An epoch that was chosen on the same patients that judge it looks better than it is. So the patients are
parted in two halves, and each half judges the epoch that the other one chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SelectionError
from bridge.hashing import keyed_hash
from bridge.metrics import balanced_accuracy, confusion_matrix

FEWEST = 5
"""Fewer held-back patients give no interval."""
LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Judgement:
    """Balanced accuracy of the held-back patients' windows; its interval where there are patients enough; and what a
    guess that does not look at the window would have."""

    balanced_accuracy: float
    interval: tuple[float, float] | None
    chance: float


def held_back(
    patients: NDArray[np.str_],
    share: float,
    seed: int,
    *,
    who: str = "patients",
    what: str = "fit a task head",
    why: str = "judge it",
) -> NDArray[np.bool_]:
    """Rows of the patients that are held back, by keyed hash: the same patients whatever the order of rows.

    Raises `SelectionError` where there are fewer than two patients, in these words: who are too few to do what, and why
    some are held back.
    """
    names = _in_order(patients, seed)
    if len(names) < 2:
        raise SelectionError(
            f"too few {who} to {what}",
            why=f"{len(names)} found, and some must be held back to {why}",
            fix=f"give more {who} with labels",
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.isin(patients, names[:count])


def counts_by_patient(
    patients: NDArray[np.str_], labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, seed: int
) -> NDArray[np.int64]:
    """Counts of one epoch, `(patients, classes, classes)`; patients in the order in which halves are taken."""
    names = _in_order(patients, seed)
    return np.stack(
        [confusion_matrix(labels[patients == name], predicted[patients == name], classes) for name in names]
    )


def best_epoch(counts: NDArray[Any]) -> int:
    """The first epoch with the highest balanced accuracy over all windows of `(epochs, patients, c, c)`."""
    return int(np.argmax(balanced_accuracy(counts.sum(axis=1))))


def judge(counts: NDArray[np.int64], *, choosing: bool, seed: int) -> Judgement:
    """How good the fit is, from the counts of all its epochs; `choosing` says whether the best epoch is kept, or the
    last.

    The interval is of whole patients resampled; a resample that lacks a class which the held-back patients have says
    nothing of it and is left out.
    """
    chosen = _judged(counts) if choosing else counts[-1]
    total = chosen.sum(axis=0)
    classes = int((total.sum(axis=1) > 0).sum())
    return Judgement(float(balanced_accuracy(total)), _interval(chosen, classes, seed), 1 / classes)


def _judged(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts by patient, each of the epoch that the other half of the patients chose."""
    patients = counts.shape[1]
    if patients < 2:
        alone: NDArray[np.int64] = counts[best_epoch(counts)]
        return alone
    chosen = np.zeros(counts.shape[1:], dtype=np.int64)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        others = np.ones(patients, dtype=bool)
        others[half] = False
        chosen[half] = counts[best_epoch(counts[:, others]), half]
    return chosen


def _interval(counts: NDArray[np.int64], classes: int, seed: int) -> tuple[float, float] | None:
    patients = len(counts)
    if patients < FEWEST:
        return None
    draws = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=_RESAMPLES)
    resampled = np.einsum("rp,pij->rij", draws, counts)
    complete = (resampled.sum(axis=2) > 0).sum(axis=1) == classes
    low, high = np.quantile(balanced_accuracy(resampled[complete]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _in_order(patients: NDArray[np.str_], seed: int) -> list[str]:
    return sorted(set(patients.tolist()), key=lambda name: keyed_hash(f"held-back-{seed}", name))
