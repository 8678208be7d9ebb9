"""A fixed basis of cosines over the token axis: slow changes along a window first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cosine_basis(count: int, tokens: int) -> NDArray[np.float64]:
    """The first `count` rows `(count, tokens)` of the orthonormal DCT-II basis (Ahmed, Natarajan and Rao 1974).

    Row 0 is constant, row k has k half waves; with `count = tokens` the basis spans everything.
    """
    if not 1 <= count <= tokens:
        raise ValueError(f"a basis over {tokens} tokens has 1 to {tokens} cosines, not {count}")
    waves: NDArray[np.float64] = np.cos(np.pi / tokens * np.outer(np.arange(count), np.arange(tokens) + 0.5)) * np.sqrt(
        2.0 / tokens
    )
    waves[0] = 1.0 / np.sqrt(tokens)
    return waves
