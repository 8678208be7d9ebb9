"""What a bridge may know beforehand, from recordings of PUBLIC patients alone: whitening, mean tokens, directions.

A server broadcasts these to everybody, so nothing here may ever be computed from a hospital's patient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.cosines import cosine_basis
from bridge.errors import WeightsError

Floats = NDArray[np.float64]

_FLOOR = 1e-3
"""Added to every eigenvalue before its root is taken, as a share of the largest: components that hardly vary among the
public patients must not be blown up."""


def pooled_moments(features: NDArray[Any], patients: NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean `(width,)` and covariance `(width, width)` of pooled features `(windows, width)`, each patient weighing the
    same however many windows there are."""
    x = np.asarray(features, np.float64)
    _, owner, counts = np.unique(patients, return_inverse=True, return_counts=True)
    weight = 1.0 / (counts[owner] * len(counts))
    mean = weight @ x
    centred = x - mean
    return mean, (centred * weight[:, None]).T @ centred


def whitening(covariance: NDArray[Any], components: int) -> Floats:
    """`(width, components)`: the covariance's eigenvectors of the largest eigenvalues, each over the root of its
    eigenvalue, so that `(h - mean) @ whitening` has about unit variance.

    Raises `WeightsError` where the covariance has no `components` directions.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    if components > len(values) or not values[-1] > 0:
        raise WeightsError(
            f"{components} whitened components can't be had",
            why=f"the public covariance has {len(values)} directions, the largest of variance {values[-1]:g}",
            fix="ask for fewer bridge.components, or use other models",
        )
    order = np.argsort(-values)[:components]
    kept = _signed(vectors[:, order].T).T
    return np.asarray(kept / np.sqrt(np.maximum(values[order], 0.0) + _FLOOR * values[-1]), np.float64)


def directions(tokens: NDArray[Any], count: int, cosines: int) -> Floats:
    """Orthonormal rows `(count, width)`: principal directions of public tokens `(windows, tokens, width)`.

    With `cosines` K > 0 those of what K cosines keep of them, since the bridge reaches nothing else. The mean tokens
    should be taken off before where the bridge adds them anyway. Raises `WeightsError` on fewer than `count`.
    """
    flat = _seen(tokens, cosines).reshape(-1, np.shape(tokens)[-1])
    rank = min(len(flat), flat.shape[1])
    if count > rank:
        raise WeightsError(
            f"{count} principal directions can't be had",
            why=f"public tokens of width {flat.shape[1]} have {rank}",
            fix="use fewer bridge.prototypes",
        )
    _, _, rows = np.linalg.svd(flat, full_matrices=False)
    return _signed(rows[:count])


def scaled_prototypes(prototypes: NDArray[Any], tokens: NDArray[Any], cosines: int) -> Floats:
    """`prototypes (n, width)` times ONE number, such that the coefficients of public tokens `(windows, tokens, width)`
    in them have a mean square of one: a frozen P sets the scale of what B has to learn.

    The coefficients are those of the bridge: of K cosines, or of each token where `cosines` is 0.
    """
    basis = np.asarray(prototypes, np.float64)
    coefficients = _seen(tokens, cosines) @ np.linalg.pinv(basis)
    scale = float(np.sqrt(np.mean(np.square(coefficients))))
    if not np.isfinite(scale) or scale <= 0:
        raise WeightsError("the public tokens do not vary", fix="use other models, or bridge.constant none")
    return basis * scale


def _seen(tokens: NDArray[Any], cosines: int) -> Floats:
    """What the bridge's token axis sees of tokens: `(windows, K, width)`, or all of them."""
    values = np.asarray(tokens, np.float64)
    return np.asarray(cosine_basis(cosines, values.shape[1]) @ values if cosines else values, np.float64)


def _signed(rows: Floats) -> Floats:
    """Each row with the sign that makes its largest number positive: the same on every machine."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return np.asarray(rows * np.where(largest < 0, -1.0, 1.0), np.float64)
