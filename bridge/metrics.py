"""Figures from confusion matrices, over any leading axes, so that thousands of bootstrap resamples cost one call.

Every matrix is `(..., classes, classes)`: rows are labels, columns predictions. Absent classes are handled as
scikit-learn does. A matrix without a window has no figures: NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def confusion_matrix(labels: NDArray[Any], predictions: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """`(classes, classes)` counts of windows; windows without a label (-1) are left out."""
    known = labels >= 0
    cells = labels[known].astype(np.int64) * classes + predictions[known].astype(np.int64)
    return np.bincount(cells, minlength=classes * classes).astype(np.int64).reshape(classes, classes)


def balanced_accuracy(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Mean recall over the classes that occur among the labels."""
    hits, support, _ = _margins(confusion)
    return _mean_where(_ratio(hits, support), support > 0)


def f1_macro(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Mean F1 over the classes that occur among labels or predictions."""
    hits, support, predicted = _margins(confusion)
    return _mean_where(_ratio(2 * hits, support + predicted), support + predicted > 0)


def f1_weighted(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """F1 averaged by each class's number of labels."""
    hits, support, predicted = _margins(confusion)
    f1 = _ratio(2 * hits, support + predicted)
    return _over((f1 * support).sum(axis=-1), support.sum(axis=-1))


def accuracy(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Share on the diagonal: with pseudo-labels as rows, the agreement."""
    hits, support, _ = _margins(confusion)
    return _over(hits.sum(axis=-1), support.sum(axis=-1))


def _margins(confusion: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    counts = np.asarray(confusion, dtype=np.float64)
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2)


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0)


def _over(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(top, bottom, out=np.full_like(bottom, np.nan), where=bottom > 0)


def _mean_where(values: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    return _over(np.where(present, values, 0.0).sum(axis=-1), present.sum(axis=-1).astype(np.float64))
