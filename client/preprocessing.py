"""Executes the preprocessing that an encoder's card names, the same in training and in inference.

`prepare_run` takes one gap-free run of a recording at its own rate through scale, zero-phase band-pass and notch,
polyphase resampling and, where asked, normalisation over the run. `finish_windows` then normalises each window by
itself or by the whole recording, where that is asked, and clips. Filters never see a gap: a run has none.

A published model's own steps (`Preprocessing.stages`) stand in for band-pass, notch and resampling where its card names
them. They are its authors' arithmetic to the sample, whatever one may think of it: linear interpolation that stretches
the ends onto each other, and a number of samples that is rounded down.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.windows import FirBandpass, Preprocessing, Resampling, Stage
from client.errors import RecordingError

Floats = NDArray[np.float64]

_NOTCH_Q = 30.0
_LARGEST_FACTOR = 10_000


def _signal() -> Any:
    """`scipy.signal`, which takes most of a second to load: a message whose features lie in the cache needs none."""
    from scipy import signal

    return signal


def prepare_run(data: NDArray[np.floating[Any]], rate_hz: float, target_hz: float, steps: Preprocessing) -> Floats:
    """`(channels, n)` at `rate_hz`, without NaN, to float64 `(channels, n')` at `target_hz`.

    Raises `RecordingError` where a filter's edge does not lie below half the recording's rate.
    """
    values = data.astype(np.float64) * steps.scale
    for sections in filters(rate_hz, steps):
        values = _both_ways(sections, values)
    for stage in steps.stages:
        values, rate_hz = _run_stage(stage, values, rate_hz, target_hz)
    values = resample(values, rate_hz, target_hz)
    return normalised(values) if steps.normalise == "segment" else values


def _run_stage(stage: Stage, values: Floats, rate_hz: float, target_hz: float) -> tuple[Floats, float]:
    """What a stage makes of `(channels, n)`, and the rate that it has then."""
    if isinstance(stage, Resampling):
        new_hz = target_hz if stage.rate_hz is None else stage.rate_hz
        return _resample_whole(values, rate_hz, new_hz, stage.method), new_hz
    _check_edges(rate_hz, stage.band_hz)
    if isinstance(stage, FirBandpass):
        taps = _signal().firwin(stage.taps, stage.band_hz, pass_zero=False, fs=rate_hz)
        padding = min(3 * stage.taps, values.shape[-1] - 1)
        return np.asarray(_signal().filtfilt(taps, 1.0, values, axis=-1, padlen=padding)), rate_hz
    sections = _signal().cheby1(stage.order, stage.ripple_db, stage.band_hz, "bandpass", fs=rate_hz, output="sos")
    return _both_ways(sections, values), rate_hz


def _resample_whole(values: Floats, rate_hz: float, new_hz: float, method: str) -> Floats:
    """Resampling of `(channels, n)` as a whole, to `int(n * new_hz / rate_hz)` samples but at least one."""
    if new_hz == rate_hz:
        return values
    count = values.shape[-1]
    wanted = max(1, int(count * new_hz / rate_hz))
    if method == "fourier":
        return np.asarray(_signal().resample(values, wanted, axis=-1), dtype=np.float64)
    # The last old sample is laid on the last new one: time is stretched by less than a sample over the whole.
    places = np.linspace(0, wanted - 1, count)
    return np.stack([np.interp(np.arange(wanted), places, channel) for channel in values])


def _both_ways(sections: Floats, values: Floats) -> Floats:
    """Second-order sections forwards and backwards, with scipy's own padding, but never longer than the run."""
    padding = 3 * (2 * len(sections) + 1 - min((sections[:, 2] == 0).sum(), (sections[:, 5] == 0).sum()))
    padding = min(int(padding), values.shape[-1] - 1)
    return np.asarray(_signal().sosfiltfilt(sections, values, axis=-1, padlen=padding))


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
    return np.asarray(_signal().resample_poly(values, ratio.numerator, ratio.denominator, axis=-1), dtype=np.float64)


@lru_cache(maxsize=64)
def filters(rate_hz: float, steps: Preprocessing) -> list[Floats]:
    """Second-order sections of the band-pass and the notch, in the order in which they are applied."""
    low, high = steps.bandpass_hz
    _check_edges(rate_hz, (low, high, steps.notch_hz))
    found = []
    if low is not None or high is not None:
        kind = "bandpass" if low and high else "highpass" if low else "lowpass"
        edges = (low, high) if low and high else low or high
        found.append(_signal().butter(steps.filter_order, edges, btype=kind, fs=rate_hz, output="sos"))
    if steps.notch_hz is not None:
        found.append(_signal().tf2sos(*_signal().iirnotch(steps.notch_hz, _NOTCH_Q, fs=rate_hz)))
    return found


def _check_edges(rate_hz: float, edges: Iterable[float | None]) -> None:
    for edge in edges:
        if edge is not None and edge >= rate_hz / 2:
            raise RecordingError(
                f"a filter at {edge:g} Hz does not fit a recording at {rate_hz:g} Hz",
                why=f"it must lie below half the rate, {rate_hz / 2:g} Hz",
                fix="record at a higher rate, or use an encoder whose preprocessing fits",
            )
