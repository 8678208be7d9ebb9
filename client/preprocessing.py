"""Executes the preprocessing that an encoder's card names, the same in training and in inference.

`prepare_run` takes one gap-free run of a recording at its own rate through scale, zero-phase band-pass and notch,
polyphase resampling and, where asked, normalisation over the run. `finish_windows` then normalises each window by
itself or by the whole recording, where that is asked, and clips. Filters never see a gap: a run has none.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import signal as sps

from bridge.windows import Preprocessing
from client.errors import RecordingError

Floats = NDArray[np.float64]

_NOTCH_Q = 30.0
_LARGEST_FACTOR = 10_000


def prepare_run(data: NDArray[np.floating[Any]], rate_hz: float, target_hz: float, steps: Preprocessing) -> Floats:
    """`(channels, n)` at `rate_hz`, without NaN, to float64 `(channels, n')` at `target_hz`.

    Raises `RecordingError` where a filter's edge does not lie below half the recording's rate.
    """
    values = data.astype(np.float64) * steps.scale
    for sections in filters(rate_hz, steps):
        # scipy's own padding, but never longer than the run
        padding = 3 * (2 * len(sections) + 1 - min((sections[:, 2] == 0).sum(), (sections[:, 5] == 0).sum()))
        values = sps.sosfiltfilt(sections, values, axis=-1, padlen=min(int(padding), values.shape[-1] - 1))
    values = resample(values, rate_hz, target_hz)
    return normalised(values) if steps.normalise == "segment" else values


def finish_windows(windows: Floats, steps: Preprocessing, recording: Floats | None = None) -> NDArray[np.float32]:
    """`(n, channels, samples)` of prepared runs: normalise by window or recording where asked, clip, float32.

    `recording` holds all prepared runs of the recording end to end, `(channels, n')`; needed to normalise by it.
    """
    values = normalised(windows, recording) if steps.normalise in ("window", "recording") else windows
    if steps.clip is not None:
        values = np.clip(values, -steps.clip, steps.clip)
    return values.astype(np.float32)


def normalised(values: Floats, reference: Floats | None = None) -> Floats:
    """Zero mean and unit (population) variance of `reference` (the values themselves) over the last axis.

    A constant becomes zeros.
    """
    reference = values if reference is None else reference
    centred = values - reference.mean(axis=-1, keepdims=True)
    deviation = reference.std(axis=-1, keepdims=True)
    scaled: Floats = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 1e-12)
    return scaled


def resample(values: Floats, rate_hz: float, target_hz: float) -> Floats:
    """Polyphase resampling along the last axis; sample 0 keeps its time."""
    ratio = Fraction(target_hz / rate_hz).limit_denominator(_LARGEST_FACTOR)
    if abs(float(ratio) * rate_hz - target_hz) > 1e-6 * target_hz:
        raise RecordingError(
            f"{rate_hz:g} Hz can't be resampled to {target_hz:g} Hz",
            why=f"the ratio is no fraction with a denominator up to {_LARGEST_FACTOR}",
            fix="correct rate_hz in the site file",
        )
    if ratio == 1:
        return values
    return np.asarray(sps.resample_poly(values, ratio.numerator, ratio.denominator, axis=-1), dtype=np.float64)


@lru_cache(maxsize=64)
def filters(rate_hz: float, steps: Preprocessing) -> list[Floats]:
    """Second-order sections of the band-pass and the notch, in the order in which they are applied."""
    low, high = steps.bandpass_hz
    for edge in (low, high, steps.notch_hz):
        if edge is not None and edge >= rate_hz / 2:
            raise RecordingError(
                f"a filter at {edge:g} Hz does not fit a recording at {rate_hz:g} Hz",
                why=f"it must lie below half the rate, {rate_hz / 2:g} Hz",
                fix="record at a higher rate, or use an encoder whose preprocessing fits",
            )
    found = []
    if low is not None or high is not None:
        kind = "bandpass" if low and high else "highpass" if low else "lowpass"
        edges = (low, high) if low and high else low or high
        found.append(sps.butter(steps.filter_order, edges, btype=kind, fs=rate_hz, output="sos"))
    if steps.notch_hz is not None:
        found.append(sps.tf2sos(*sps.iirnotch(steps.notch_hz, _NOTCH_Q, fs=rate_hz)))
    return found
