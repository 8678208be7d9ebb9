"""Positions from groups of patients: what a site may say about them under a private mechanism.

A patient's own score at a position says almost nothing, so groups speak. A site has a fixed, public number of groups,
filled by a keyed hash of the patient id. Each group ALONE scores every position, as if it were a site of its own; its
scores over the positions are centred, scaled down to an L2 norm of at most `clip` (R), and the groups' vectors are
added up.

Unit: the patient. Adding or removing one changes the vector of one group and no other, from one point of a ball of
radius R to another, so the sum moves by at most 2R (`sensitivity`), however many patients and groups there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.cka import similarity_scores
from bridge.job_privacy import PrivateSelection
from bridge.probe import probe_scores
from bridge.selection import fold_of

Floats = NDArray[np.float64]

Score = Callable[[NDArray[np.int64]], Floats]
"""From the rows of one group to one score a position, `(positions,)`. It looks at no other row."""

MINIMUM_PATIENTS = 2
"""A probe is judged on patients left out, so a group needs as many."""


def sensitivity(clip: float) -> float:
    """2R: the most by which one patient, added or removed, moves a site's sum, in L2 norm."""
    return 2.0 * clip


def noise_deviation(plan: PrivateSelection) -> float:
    """Standard deviation of the noise of one sum, by a plan whose noise multiplier is known; raises `ValueError` where
    it is not: nothing leaves without noise by mistake."""
    if plan.noise_multiplier is None:
        raise ValueError("the plan has no noise_multiplier")
    return plan.noise_multiplier * sensitivity(plan.clip)


def probe_group_sums(
    features: Sequence[NDArray[Any]],
    pseudo_labels: NDArray[Any],
    patients: NDArray[Any],
    *,
    classes: int,
    folds: int,
    groups: int,
    clip: float,
    key: str,
) -> Floats:
    """Sum over groups of the bounded probe scores of the new encoder's positions, `(positions,)`.

    Arguments are those of `bridge.probe.probe_scores`, which judges each group by its own patients in at most `folds`
    folds. A group of fewer than two patients, or of one pseudo-label, has no say. Raises nothing on any data.
    """

    def score(rows: NDArray[np.int64]) -> Floats:
        if len(np.unique(patients[rows])) < MINIMUM_PATIENTS:
            return np.zeros(len(features))
        own = [x[rows] for x in features]
        return probe_scores(own, pseudo_labels[rows], patients[rows], classes, folds, key)

    return group_sums(patients, len(features), score, groups=groups, clip=clip, key=key)


def similarity_group_sums(
    chosen: NDArray[Any],
    inputs: Sequence[NDArray[Any]],
    patients: NDArray[Any],
    *,
    groups: int,
    clip: float,
    key: str,
) -> Floats:
    """Sum over groups of the bounded debiased CKA between `chosen` and each of the old encoder's positions,
    `(positions,)`.

    Arguments are those of `bridge.cka.similarity_scores`. A group of fewer than four windows has no say. Raises
    nothing on any data.
    """

    def score(rows: NDArray[np.int64]) -> Floats:
        return similarity_scores(chosen[rows], [x[rows] for x in inputs])

    return group_sums(patients, len(inputs), score, groups=groups, clip=clip, key=key)


def group_sums(patients: NDArray[Any], positions: int, score: Score, *, groups: int, clip: float, key: str) -> Floats:
    """Sum over groups of `bounded(score(rows of the group))`, `(positions,)`, added up in the order of the groups.

    `patients (windows,)` names each row's patient. Sensitivity to one patient: `sensitivity(clip)`.
    """
    names, owner = np.unique(patients, return_inverse=True)
    group = np.asarray([fold_of(str(name), groups, f"{key}/groups") for name in names], dtype=np.int64)[owner]
    total = np.zeros(positions)
    for index in range(groups):
        total += _vector(np.flatnonzero(group == index).astype(np.int64), positions, score, clip)
    return total


def bounded(scores: NDArray[Any], clip: float) -> Floats:
    """The scores less their mean, scaled down to an L2 norm of at most `clip`; zeros where one is not finite."""
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        return np.zeros(values.shape)
    centred: Floats = values - values.mean()
    norm = float(np.linalg.norm(centred))
    return np.asarray(centred * min(1.0, clip / norm) if norm > 0 else centred, dtype=np.float64)


def _vector(rows: NDArray[np.int64], positions: int, score: Score, clip: float) -> Floats:
    """What one group says: zeros where it can't be scored, whatever the reason; a refusal would tell of it."""
    if not len(rows):
        return np.zeros(positions)
    try:
        scores = np.asarray(score(rows), dtype=np.float64)
    except Exception:
        return np.zeros(positions)
    return bounded(scores, clip) if scores.shape == (positions,) else np.zeros(positions)
