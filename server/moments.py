"""Could a site's moments be those of any windows? A sum that fits the schema can still be garbage, and would end the
selection of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ReplyError

_LARGEST = 1e60
"""Far above the sums of any features (similarity is of the fourth power), far below where products of sums overflow."""
_ROUNDING = 1e-6


def check_probe_moments(moments: NDArray[Any], widths: Sequence[int], classes: int, folds: int) -> None:
    """Raise `ReplyError` unless each fold's numbers at each position could be X'X and X'Y of one-hot Y.

    That is: X'X is positive semi-definite, its corner (the number of windows) is the sum of the class counts, and no
    count is negative. The layout is that of `bridge.messages.moments_length`, position after position, fold after fold.
    """
    _check_size(moments, "probe_moments")
    start = 0
    for width in widths:
        extended = width + 1
        corner = extended * (extended + 1) // 2
        stop = start + folds * (corner + extended * classes)
        parts = moments[start:stop].reshape(folds, -1)
        start = stop
        gram = np.zeros((folds, extended, extended))
        rows, columns = np.triu_indices(extended)
        gram[:, rows, columns] = gram[:, columns, rows] = parts[:, :corner]
        windows, counts = gram[:, -1, -1], parts[:, -classes:]
        if (counts < 0).any() or not np.allclose(counts.sum(axis=1), windows, rtol=_ROUNDING, atol=_ROUNDING):
            raise _implausible("probe_moments", "its counts are negative or do not add up")
        if not _semi_definite(gram):
            raise _implausible("probe_moments", "its X'X has a negative direction")


def check_similarity_moments(moments: NDArray[Any]) -> None:
    """Raise `ReplyError` unless each row could be <K,L>, <K,K>, <L,L>: squares not negative, Cauchy-Schwarz held."""
    _check_size(moments, "similarity_moments")
    cross, left, right = moments.T
    if (left < 0).any() or (right < 0).any() or (np.abs(cross) > np.sqrt(left * right) * (1 + _ROUNDING)).any():
        raise _implausible("similarity_moments", "a product is larger than its factors allow")


def _semi_definite(gram: NDArray[np.float64]) -> bool:
    """Up to rounding: a Cholesky factor exists once a millionth of the mean square is added to the diagonal."""
    size = gram.shape[-1]
    scale = np.trace(gram, axis1=1, axis2=2) / size
    empty = ~gram.any(axis=(1, 2))
    try:
        np.linalg.cholesky(gram + (_ROUNDING * scale + empty)[:, None, None] * np.eye(size))
    except np.linalg.LinAlgError:
        return False
    return True


def _check_size(moments: NDArray[Any], item: str) -> None:
    if moments.size and np.abs(moments).max() > _LARGEST:
        raise _implausible(item, f"it holds numbers beyond {_LARGEST:g}")


def _implausible(item: str, why: str) -> ReplyError:
    return ReplyError(f"item '{item}' can't be the sums of any windows", why=why)
