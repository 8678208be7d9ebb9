"""Judges one window of a raw signal: NaN, flat, clipped. Thresholds are the site file's `quality` keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.site_file import QualitySection


def judge(window: NDArray[np.float32], quality: QualitySection) -> str:
    """Why `(channels, samples)` can't be used: `nan`, `flat`, `clipped`, or nothing (""). One bad channel is enough."""
    if not np.isfinite(window).all():
        return "nan"
    samples = window.shape[1]
    still = np.abs(np.diff(window, axis=1)) <= quality.flat_tolerance
    # k unchanged steps are k + 1 equal samples
    if np.any(longest_run(still) + 1 > max(1.0, quality.flat_share * samples)):
        return "flat"
    if np.any(share_at_extremes(window, quality.clipped_run) > quality.clipped_share):
        return "clipped"
    return ""


def longest_run(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Length of the longest stretch of true values in each row of `(rows, n)`."""
    if mask.shape[1] == 0:
        return np.zeros(len(mask), dtype=np.int64)
    index = np.arange(mask.shape[1])
    last_false = np.maximum.accumulate(np.where(mask, -1, index), axis=1)
    longest: NDArray[np.int64] = (index - last_false).max(axis=1)
    return longest


def share_at_extremes(window: NDArray[np.float32], run: int) -> NDArray[np.float64]:
    """Share of samples, in each row, at the row's largest or smallest value in stretches of `run` samples or more."""
    share = np.zeros(len(window))
    for extreme in (window.max(axis=1, keepdims=True), window.min(axis=1, keepdims=True)):
        at = window == extreme
        for row in np.flatnonzero(at.sum(axis=1) >= run):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], at[row].view(np.int8), [0]])))
            lengths = edges[1::2] - edges[::2]
            share[row] += lengths[lengths >= run].sum() / window.shape[1]
    return share
