"""Stage 1: how well each new-encoder position predicts the old encoder's pseudo-labels, judged on patients left out.

Two federated forms (`selection.mode` of a job): a site's own bounded score a position (`probe_scores`), or
additive sums (`probe_moments`) from which the server gets exactly the scores of one machine with all data
(`scores_from_moments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SelectionError
from bridge.hashing import keyed_hash
from bridge.messages import moments_length
from bridge.metrics import balanced_accuracy, confusion_matrix
from bridge.selection import fold_of

_CONSTANT = 1e-9
"""A feature that varies by less than this share of its largest value is constant up to rounding."""


def probe_scores(
    features: Sequence[NDArray[Any]],
    pseudo_labels: NDArray[Any],
    patients: NDArray[Any],
    classes: int,
    folds: int,
    key: str,
) -> NDArray[np.float64]:
    """Balanced accuracy in [0, 1] of a linear probe for each position, `(positions,)`, cross-validated by patient.

    `features[i]` is `(windows, width_i)`, `pseudo_labels` and `patients` are `(windows,)`. The probe is a logistic
    regression with balanced class weights on features standardised by the training folds; predictions of all folds
    are pooled in one confusion matrix. Patients are dealt to `min(folds, patients)` folds by the rank of a keyed hash
    of their id, so each fold holds some. The result does not depend on the order of the rows.

    A position scores 1/classes, which tells the average over sites nothing, where nothing can be judged: one patient,
    one class in all, or constant features. A training fold with one class, or constant features, predicts its
    commonest class. Raises `SelectionError` on no windows, features that do not fit the labels, or values that are
    not finite.
    """
    columns = _checked(features, pseudo_labels, patients, classes)
    order = _canonical_order(columns, pseudo_labels, patients)
    labels, fold = pseudo_labels[order].astype(np.int64), _dealt_folds(patients[order], folds, key)
    neutral = 1.0 / classes
    if fold.max() == 0 or len(np.unique(labels)) < 2:
        return np.full(len(columns), neutral)
    scores = [_cross_validated(x[order], labels, fold, classes, neutral) for x in columns]
    return np.asarray(scores, dtype=np.float64)


def probe_moments(
    features: Sequence[NDArray[Any]],
    pseudo_labels: NDArray[Any],
    patients: NDArray[Any],
    classes: int,
    folds: int,
    key: str,
) -> NDArray[np.float64]:
    """One flat float64 vector of sums over windows, additive over sites: position after position, in each fold after
    fold.

    A fold's numbers are the upper triangle of X'X, row by row, with X the features and a last column of ones, then
    X'Y row by row with one-hot pseudo-labels Y (`bridge.messages.moments_length`). A patient's fold is `fold_of`, so
    sites agree on it. Folds without windows are zeros. Raises `SelectionError` as `probe_scores` does.
    """
    columns = _checked(features, pseudo_labels, patients, classes)
    fold = np.asarray([fold_of(str(patient), folds, key) for patient in patients])
    one_hot = np.eye(classes)[pseudo_labels.astype(np.int64)]
    parts: list[NDArray[np.float64]] = []
    for x in columns:
        extended = np.column_stack([x, np.ones(len(x))])
        upper = np.triu_indices(extended.shape[1])
        for index in range(folds):
            rows = fold == index
            parts.append((extended[rows].T @ extended[rows])[upper])
            parts.append((extended[rows].T @ one_hot[rows]).ravel())
    return np.concatenate(parts)


def scores_from_moments(
    summed: NDArray[np.float64], widths: Sequence[int], classes: int, folds: int, ridge: float
) -> NDArray[np.float64]:
    """From moments summed over sites to one score a position, `(positions,)`: 1 - SSE/SST over held-out folds.

    Each fold is held out once; a ridge regression on one-hot pseudo-labels is fitted on the others (intercept not
    penalised, strength `ridge` times the mean centred sum of squares of a feature) and judged by the held-out squared
    error SSE. SST is the held-out squared error of the training folds' class shares. So 0 is no better than no
    features, 1 is perfect, and below 0 is worse. Raises `SelectionError` where fewer than two folds have windows,
    only one class occurs, or the numbers don't fit.
    """
    sizes = [folds * moments_length(width, classes) for width in widths]
    if summed.shape != (sum(sizes),):
        raise SelectionError(
            f"probe moments of shape {summed.shape} do not fit",
            why=f"{len(widths)} positions, {folds} folds and {classes} classes make {sum(sizes)} numbers",
            fix="ask every site with the same job and models",
        )
    parts = np.split(summed, np.cumsum(sizes)[:-1])
    return np.asarray([_held_out(p, w, classes, folds, ridge) for p, w in zip(parts, widths, strict=True)])


def _checked(
    features: Sequence[NDArray[Any]], labels: NDArray[Any], patients: NDArray[Any], classes: int
) -> list[NDArray[np.float64]]:
    n = len(labels)
    if n == 0 or len(patients) != n or any(x.ndim != 2 or len(x) != n for x in features) or not features:
        raise SelectionError(
            "positions can't be probed",
            why=f"{n} pseudo-labels, {len(patients)} patient ids, features of shapes {[x.shape for x in features]}",
            fix="give one row a window, and at least one window",
        )
    columns = [np.asarray(x, dtype=np.float64) for x in features]
    if any(not np.isfinite(x).all() for x in columns):
        raise SelectionError(
            "positions can't be probed", why="features hold NaN or infinity", fix="check the recordings and the encoder"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise SelectionError(
            "positions can't be probed", why=f"a pseudo-label lies outside 0 to {classes - 1}", fix="use the task head"
        )
    return columns


def _canonical_order(
    columns: list[NDArray[np.float64]], labels: NDArray[Any], patients: NDArray[Any]
) -> NDArray[np.intp]:
    """An order of the rows that depends on their content alone: by patient, pseudo-label, then features."""
    return np.lexsort([*np.concatenate(columns, axis=1).T[::-1], labels, patients])


def _dealt_folds(patients: NDArray[Any], folds: int, key: str) -> NDArray[np.int64]:
    names = np.unique(patients)
    ranks = np.argsort(np.argsort([keyed_hash(key, "deal", str(name)) for name in names]))
    dealt: NDArray[np.int64] = (ranks % min(folds, len(names))).astype(np.int64)
    return dealt[np.searchsorted(names, patients)]


def _cross_validated(
    x: NDArray[np.float64], labels: NDArray[np.int64], fold: NDArray[np.int64], classes: int, neutral: float
) -> float:
    if not (np.ptp(x, axis=0) > _CONSTANT * np.abs(x).max(initial=0.0)).any():
        return neutral
    predictions = np.empty_like(labels)
    for held_out in range(int(fold.max()) + 1):
        test = fold == held_out
        predictions[test] = _fit_predict(x[~test], labels[~test], x[test])
    return float(balanced_accuracy(confusion_matrix(labels, predictions, classes)))


def _fit_predict(x: NDArray[np.float64], labels: NDArray[np.int64], test: NDArray[np.float64]) -> NDArray[np.int64]:
    from sklearn.linear_model import LogisticRegression

    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > _CONSTANT * np.abs(x).max(initial=0.0)
    if len(np.unique(labels)) < 2 or not varies.any():
        return np.full(len(test), np.bincount(labels).argmax())
    scale = np.where(varies, deviation, 1.0)
    probe = LogisticRegression(C=1.0, class_weight="balanced", max_iter=300, tol=1e-3)
    probe.fit((x - mean)[:, varies] / scale[varies], labels)
    predicted: NDArray[np.int64] = probe.predict((test - mean)[:, varies] / scale[varies])
    return predicted


def _held_out(part: NDArray[np.float64], width: int, classes: int, folds: int, ridge: float) -> float:
    """The score of one position from its folds' moments."""
    extended = width + 1
    upper, corner = np.triu_indices(extended), extended * (extended + 1) // 2
    grams, crosses = [], []
    for fold in part.reshape(folds, -1):
        triangle = np.zeros((extended, extended))
        triangle[upper] = fold[:corner]
        grams.append(triangle + np.triu(triangle, 1).T)
        crosses.append(fold[corner:].reshape(extended, classes))
    gram, cross = np.sum(grams, axis=0), np.sum(crosses, axis=0)
    if sum(g[-1, -1] > 0 for g in grams) < 2 or np.count_nonzero(cross[-1] > 0) < 2:
        raise SelectionError(
            "the probe's moments can't be judged",
            why="fewer than two folds have windows, or only one pseudo-label occurs",
            fix="take more patients or fewer folds, or mode 'scores'",
        )
    sse = sst = 0.0
    for g, c in zip(grams, crosses, strict=True):
        weights = _ridge_fit(gram - g, cross - c, ridge)
        shares = np.zeros_like(weights)
        shares[-1] = (cross - c)[-1] / (gram - g)[-1, -1]
        sse += _squared_error(g, c, weights)
        sst += _squared_error(g, c, shares)
    return 1.0 - sse / sst


def _ridge_fit(gram: NDArray[np.float64], cross: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """`(width + 1, classes)` weights, the intercept last, from X'X and X'Y of the training folds."""
    n, mean, shares = gram[-1, -1], gram[:-1, -1] / gram[-1, -1], cross[-1] / gram[-1, -1]
    scatter = gram[:-1, :-1] - n * np.outer(mean, mean)
    strength = np.trace(scatter) / len(scatter)
    slopes = np.zeros((len(scatter), cross.shape[1]))
    if strength > _CONSTANT**2 * np.trace(gram[:-1, :-1]):
        penalised = scatter + ridge * strength * np.eye(len(scatter))
        slopes = np.linalg.solve(penalised, cross[:-1] - n * np.outer(mean, shares))
    return np.vstack([slopes, shares - mean @ slopes])


def _squared_error(gram: NDArray[np.float64], cross: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Sum over windows of |y - W'x|^2; one-hot labels have |y|^2 = 1."""
    return float(gram[-1, -1] - 2 * (weights * cross).sum() + (weights * (gram @ weights)).sum())
