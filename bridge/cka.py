"""Stage 2: how alike the chosen new position and each old position are, by debiased linear CKA.

The biased estimator scores independent features near 1 when there are more features than windows (0.94 at 20
windows); the unbiased HSIC of Song et al. (JMLR 13, 2012, eq. 5) scores them about 0. With K = XX' and L = YY', both
with a zero diagonal:

    n(n-3) HSIC_u = tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1 = <K~, L~>

where ~ is U-centring. The right side is a plain sum, so it adds over sites: the inner product of block-diagonal Gram
matrices, centred within a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SelectionError

MINIMUM_WINDOWS = 4
"""The unbiased HSIC divides by n(n-3)."""

_CONSTANT = 1e-9


def similarity_scores(chosen: NDArray[Any], inputs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Debiased CKA in [-1, 1] between `chosen (windows, d_new)` and each of `inputs`, `(windows, d_old)`:
    `(positions_old,)`.

    Constant features score 0. Raises `SelectionError` on fewer than four windows, unequal rows or values not finite.
    """
    return scores_from_similarity_moments(similarity_moments(chosen, inputs))


def similarity_moments(chosen: NDArray[Any], inputs: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """`(positions_old, 3)`: columns <K~,L~>, <K~,K~>, <L~,L~> with K of `chosen` and L of the position; additive over
    sites.

    Raises `SelectionError` as `similarity_scores` does.
    """
    _check(chosen, inputs)
    x = _centred(chosen)
    xx = _u_product(x, x)
    others = [_centred(each) for each in inputs]
    return np.asarray([[_u_product(x, y), xx, _u_product(y, y)] for y in others], dtype=np.float64)


def scores_from_similarity_moments(summed: NDArray[np.float64]) -> NDArray[np.float64]:
    """CKA by position from moments summed over sites, clipped to [-1, 1]; 0 where either side is constant."""
    cross, left, right = summed[:, 0], summed[:, 1], summed[:, 2]
    scale = np.sqrt(np.maximum(left, 0.0)) * np.sqrt(np.maximum(right, 0.0))
    ratio: NDArray[np.float64] = np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)
    return ratio.clip(-1.0, 1.0)


def _check(chosen: NDArray[Any], inputs: Sequence[NDArray[Any]]) -> None:
    n = len(chosen)
    if n < MINIMUM_WINDOWS or any(each.ndim != 2 or len(each) != n for each in (chosen, *inputs)):
        raise SelectionError(
            "positions can't be compared",
            why=f"features of shapes {[each.shape for each in (chosen, *inputs)]}; at least {MINIMUM_WINDOWS} windows "
            "are needed, the same in all",
            fix="give more windows a patient (selection.windows_per_patient) or more patients",
        )
    if any(not np.isfinite(each).all() for each in (chosen, *inputs)):
        raise SelectionError(
            "positions can't be compared",
            why="features hold NaN or infinity",
            fix="check the recordings and the encoder",
        )


def _centred(features: NDArray[Any]) -> NDArray[np.float64]:
    """U-centring undoes any shift of the features; taking it away first keeps the sums free of cancellation."""
    x = np.asarray(features, dtype=np.float64)
    largest = np.abs(x).max(initial=0.0)
    x = x - x.mean(axis=0)
    return x if np.abs(x).max(initial=0.0) > _CONSTANT * largest else np.zeros_like(x)


def _u_product(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """<K~, L~>, from the features where there are more windows than features, else from the Gram matrices."""
    n = len(x)
    if n > max(x.shape[1], y.shape[1]):
        full = np.square(x.T @ y).sum()
    else:
        full = ((x @ x.T) * (y @ y.T)).sum()
    k, l = np.square(x).sum(axis=1), np.square(y).sum(axis=1)  # noqa: E741
    k_rows, l_rows = x @ x.sum(axis=0) - k, y @ y.sum(axis=0) - l
    product = full - k @ l + k_rows.sum() * l_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_rows @ l_rows)
    return float(product)
