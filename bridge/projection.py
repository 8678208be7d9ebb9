"""The public random projection of wide features, before sums of their products leave a site.

A Gram matrix grows with the square of the width: at 960 features, 16 positions and 5 folds, the `moments` of the probe
would be about 300 MB. Above a job's `selection.width_limit` features pass a matrix of random signs first (Achlioptas,
J. Comput. Syst. Sci. 66, 2003), which keeps inner products up to a share of about `1/sqrt(limit)`. It hides nothing: it
is public, and follows from the job's seed, the position and the width alone.

The signs are bits of SHAKE-256, so every site has the same matrix, whatever its machine and its version of numpy.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.hashing import canonical_json

_KEY = "fedbridge.projection/1"


def projected_width(width: int, limit: int) -> int:
    """How many features are left of `width`: all of them up to `limit`."""
    return min(width, limit)


def projected(features: NDArray[Any], position: int, seed: int, limit: int) -> NDArray[Any]:
    """Features `(windows, width)` of a position, as they are up to a width of `limit`; else `(windows, limit)`
    float64."""
    width = features.shape[1]
    if width <= limit:
        return features
    values: NDArray[np.float64] = features.astype(np.float64) @ projection(seed, position, width, limit)
    return values


@lru_cache(maxsize=32)
def projection(seed: int, position: int, width: int, limit: int) -> NDArray[np.float64]:
    """The matrix `(width, limit)` of a position: every entry is `1/sqrt(limit)` or its negative (read-only)."""
    count = width * limit
    stream = hashlib.shake_256(canonical_json([_KEY, seed, position, width, limit])).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[:count]
    matrix: NDArray[np.float64] = (bits.reshape(width, limit).astype(np.float64) * 2 - 1) / sqrt(limit)
    matrix.flags.writeable = False
    return matrix
