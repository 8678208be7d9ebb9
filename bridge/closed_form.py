"""The one-shot bridge: a ridge regression from whitened new features to coefficients of old tokens, solved from sums.

For a window, `x = [(h - mean) whitening, 1]` (`rows` numbers) is what A reads, and `c` (`columns` numbers) are the
coefficients of its old tokens at position `l`, less the public constant, in the basis of K cosines times the frozen
prototypes (least squares). The bridge that predicts them best is `W = (G + ridge I)^-1 X` with `G = E[x x']` and
`X = E[x c']`, means over patients of each patient's mean over windows; cut to rank r it is `A B`.

So a patient says all in one vector: a weight, X, and G or what is asked of it. Vectors of patients are added up, at a
site and over sites, and with the whole of G the sum gives exactly what one machine with all patients would get. The
fewer numbers, the less noise: without G that of the public whitening stands for it, the identity, and with the inputs'
means and squares alone (`diagonal`) the identity moved and scaled to them.

Unit: the patient. Entries are scaled by public numbers (`Layout`), such that the norm of a usual patient's vector is
about one, and under a private mechanism each patient's whole vector is clipped to an L2 norm of R. Adding or removing
one patient then moves the sum by at most R, which is the sensitivity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.cosines import cosine_basis
from bridge.job_privacy import GramName
from bridge.messages import closed_form_length
from bridge.prototype import Arrays
from bridge.shape import BridgeShape

Floats = NDArray[np.float64]

_WEIGHT = 0.25
"""A patient's entry for its weight of one: small beside the rest of the vector, since a sum over patients of it needs
little precision."""


@dataclass(frozen=True)
class Layout:
    """Where what stands in the statistics, and by which public numbers it is scaled (`messages.closed_form_length`)."""

    rows: int
    columns: int
    gram: GramName

    @property
    def cross_scale(self) -> float:
        """Of X: inputs and coefficients have about unit variance, so the norm of `x c'` is about its inverse."""
        return float(1.0 / np.sqrt(self.rows * self.columns))

    @property
    def gram_scale(self) -> float:
        """Of G: the norm of `x x'` is about its inverse."""
        return 1.0 / self.rows

    @property
    def mean_scale(self) -> float:
        """Of the means in a `diagonal` layout: an input's mean over a patient is mostly below one."""
        return float(0.5 / np.sqrt(self.rows))

    def pack(self, x: Floats, c: Floats) -> Floats:
        """One patient's vector, from its windows' inputs `(windows, rows)` and coefficients `(windows, columns)`."""
        windows = len(x)
        parts = [np.array([_WEIGHT]), (x.T @ c).ravel() / windows * self.cross_scale]
        if self.gram == "diagonal":
            varying = x[:, :-1]
            parts += [varying.mean(axis=0) * self.mean_scale, np.square(varying).mean(axis=0) * self.gram_scale]
        elif self.gram == "released":
            parts.append((x.T @ x)[np.triu_indices(self.rows)] / windows * self.gram_scale)
        return np.concatenate(parts)

    def unpack(self, total: Floats, deviation: float = 0.0) -> tuple[float, Floats, Floats]:
        """Weight, and means over patients of X `(rows, columns)` and G `(rows, rows)`, from a sum of vectors whose
        every number holds noise of standard deviation `deviation`. The weight must be positive."""
        weight, cells = float(total[0]) / _WEIGHT, self.rows * self.columns
        cross = total[1 : 1 + cells].reshape(self.rows, self.columns) / self.cross_scale / weight
        return weight, cross, self._gram(total[1 + cells :] / weight, deviation / weight)

    def _gram(self, part: Floats, noise: float) -> Floats:
        """G from the vector's last part; what noise of standard deviation `noise` drowns is as after whitening."""
        size = self.rows - 1
        if self.gram == "public":
            return np.eye(self.rows)
        if self.gram == "diagonal":
            means, squares = np.split(part, 2)
            means = shrunk(means / self.mean_scale, 0.0, noise / self.mean_scale)
            squares = shrunk(squares / self.gram_scale, 1.0, noise / self.gram_scale)
            return _composed(means, squares, np.zeros((size, size)))
        upper = np.zeros((self.rows, self.rows))
        upper[np.triu_indices(self.rows)] = part / self.gram_scale
        deviation = noise / self.gram_scale
        means = shrunk(upper[:-1, -1], 0.0, deviation)
        squares = shrunk(np.diag(upper)[:-1], 1.0, deviation)
        pairs = np.triu_indices(size, 1)
        covariances = np.zeros((size, size))
        covariances[pairs] = shrunk(upper[pairs] - np.outer(means, means)[pairs], 0.0, deviation)
        return _composed(means, squares, covariances + covariances.T)


@dataclass(frozen=True)
class Regression:
    """The regression's two sides, from public arrays of a bridge that has whitening and frozen prototypes."""

    shape: BridgeShape
    layout: Layout
    mean: Floats
    whitening: Floats
    to_coefficients: Floats
    cosines: Floats
    constant: Floats | None

    @classmethod
    def of(cls, shape: BridgeShape, arrays: Mapping[str, NDArray[Any]], gram: GramName) -> Regression:
        """From the broadcast; raises `ValueError` where the shape is not of a bridge with a closed form."""
        if not (shape.cosines and shape.components and shape.frozen_prototypes):
            raise ValueError("the closed form needs cosines, whitening and frozen prototypes")
        return cls(
            shape=shape,
            layout=Layout(shape.rows, shape.columns, gram),
            mean=np.asarray(arrays["mean"], np.float64),
            whitening=np.asarray(arrays["whitening"], np.float64),
            to_coefficients=np.linalg.pinv(np.asarray(arrays["P"], np.float64)),
            cosines=cosine_basis(shape.cosines, shape.tokens_old),
            constant=np.asarray(arrays["constant"], np.float64) if shape.constant else None,
        )

    @property
    def length(self) -> int:
        """Numbers in the statistics."""
        return closed_form_length(self.shape, self.layout.gram)

    def inputs(self, h: NDArray[Any]) -> Floats:
        """Of pooled features `(windows, d_new)`: what A reads, `(windows, rows)`."""
        white = (np.asarray(h, np.float64) - self.mean) @ self.whitening
        return np.concatenate([white, np.ones((len(white), 1))], axis=1)

    def coefficients(self, tokens: NDArray[Any]) -> Floats:
        """Of old tokens `(windows, tokens_old, d_old)`: `(windows, columns)`, cosine by cosine."""
        values = np.asarray(tokens, np.float64)
        if self.constant is not None:
            values = values - self.constant
        return (self.cosines @ values @ self.to_coefficients).reshape(len(values), self.shape.columns)

    def patient(self, h: NDArray[Any], tokens: NDArray[Any], clip: float | None = None) -> Floats:
        """One patient's vector, from all its windows (at least one).

        With a `clip` R its norm is at most R; a vector that is not finite is zeros, as if the patient were not there.
        """
        vector = self.layout.pack(self.inputs(h), self.coefficients(tokens))
        if clip is None:
            return vector
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm):
            return np.zeros(len(vector))
        return vector * min(1.0, clip / norm) if norm > 0 else vector


def solve(
    statistics: Floats, layout: Layout, *, rank: int, ridge: float, deviation: float = 0.0, drop: bool = False
) -> tuple[Floats, Floats]:
    """A `(rows, rank)` and B `(rank, columns)` from the summed statistics, whose every number holds Gaussian noise of
    standard deviation `deviation`.

    With `drop`, singular values of X that noise alone would reach (`noise_edge`) are dropped. All this is computed from
    what was released, and costs nothing more. Noise that leaves no weight gives a bridge of zeros.
    """
    if statistics[0] <= 0:
        return np.zeros((layout.rows, rank)), np.zeros((rank, layout.columns))
    weight, cross, gram = layout.unpack(statistics, deviation)
    noise = deviation / layout.cross_scale / weight
    moments = _denoised(cross, noise) if drop and noise > 0 else cross
    # Noise may take a symmetric matrix out of the positive ones; back to the nearest.
    values, vectors = np.linalg.eigh(gram)
    matrix = (vectors * np.maximum(values, 0.0)) @ vectors.T
    full = np.linalg.solve(matrix + ridge * np.eye(layout.rows), moments)
    return factors(np.asarray(full, np.float64), rank)


def shrunk(values: Floats, towards: float, deviation: float) -> Floats:
    """Noisy numbers drawn towards what was known before, the more the less they stand out of noise of standard
    deviation `deviation` (James and Stein 1961, the positive part)."""
    apart = values - towards
    square = float(np.sum(np.square(apart)))
    if square == 0.0:
        return values
    return np.asarray(towards + apart * max(0.0, 1.0 - len(values) * deviation**2 / square), np.float64)


def _composed(means: Floats, squares: Floats, covariances: Floats) -> Floats:
    """The Gram matrix `(rows, rows)` of inputs with these means, mean squares and, off the diagonal, covariances; and
    of the one. No mean square is below the square of its mean."""
    extended = np.append(means, 1.0)
    gram = np.outer(extended, extended)
    gram[:-1, :-1] += covariances
    inner = np.arange(len(means))
    gram[inner, inner] = np.maximum(squares, np.square(means))
    return np.asarray(gram, np.float64)


def factors(matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """A and B whose product is the best approximation of rank `rank`, `A = U sqrt(S)`, `B = sqrt(S) V'`; where the
    matrix has fewer than `rank` singular values the rest are zeros."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(s))
    a, b = np.zeros((matrix.shape[0], rank)), np.zeros((rank, matrix.shape[1]))
    a[:, :kept] = u[:, :kept] * np.sqrt(s[:kept])
    b[:kept] = np.sqrt(s[:kept])[:, None] * v[:kept]
    return a, b


def noise_edge(deviation: float, rows: int, columns: int) -> float:
    """Where the singular values of a `(rows, columns)` matrix of Gaussian noise end (Bai and Yin 1993)."""
    return float(deviation * (np.sqrt(rows) + np.sqrt(columns)))


def _denoised(matrix: Floats, deviation: float) -> Floats:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = s > noise_edge(deviation, *matrix.shape)
    return np.asarray((u[:, kept] * s[kept]) @ v[kept], np.float64)


def solved_arrays(broadcast: Arrays, a: Floats, b: Floats) -> Arrays:
    """The broadcast with A and B in place of its own, float32."""
    return broadcast | {"A": a.astype(np.float32), "B": b.astype(np.float32)}
