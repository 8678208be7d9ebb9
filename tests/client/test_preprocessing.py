"""Preprocessing against the textbook formulas, written with other routines than the product uses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal as sps

from bridge.windows import Preprocessing
from client.errors import RecordingError
from client.preprocessing import finish_windows, prepare_run, resample


def raw(channels: int = 2, seconds: int = 8, rate: float = 250.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * f * times) for f in (0.2, 3.0, 11.0, 50.0)]
    return (rng.normal(0, 0.3, (channels, len(times))) + 40 * sum(waves)).astype(np.float32)


@pytest.mark.parametrize(
    ("band", "kind"), [((0.5, 40.0), "bandpass"), ((0.5, None), "highpass"), ((None, 40.0), "lowpass")]
)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_bandpass_is_a_zero_phase_butterworth(band: tuple, kind: str, order: int) -> None:
    x = raw()
    edges = [edge for edge in band if edge is not None]
    normalised_edges = np.array(edges) / 125.0
    b, a = sps.butter(order, normalised_edges if len(edges) == 2 else normalised_edges[0], kind)
    expected = sps.filtfilt(b, a, x.astype(np.float64) * 2.0, axis=-1)
    steps = Preprocessing(scale=2.0, bandpass_hz=band, filter_order=order, normalise="none")
    found = prepare_run(x, 250.0, 250.0, steps)
    # the polynomial form of the reference loses digits for narrow, high orders
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_notch_is_a_zero_phase_notch_and_removes_the_mains() -> None:
    x = raw()
    b, a = sps.iirnotch(50.0 / 125.0, 30.0)
    found = prepare_run(x, 250.0, 250.0, Preprocessing(notch_hz=50.0, normalise="none"))
    assert np.allclose(found, sps.filtfilt(b, a, x.astype(np.float64), axis=-1), atol=1e-8)
    at_50 = [np.abs(np.fft.rfft(each[0]))[50 * 8] for each in (x.astype(np.float64), found)]
    assert at_50[1] < 0.05 * at_50[0]


@pytest.mark.parametrize(("rate", "target", "up", "down"), [(250.0, 100.0, 2, 5), (125.0, 50.0, 2, 5), (64, 128, 2, 1)])
def test_resampling_is_zero_insertion_filter_and_decimation(rate: float, target: float, up: int, down: int) -> None:
    x = raw(1, rate=rate)[0].astype(np.float64)
    longest = max(up, down)
    half = 10 * longest
    taps = np.arange(-half, half + 1)
    kernel = np.sinc(taps / longest) / longest * np.i0(5.0 * np.sqrt(1 - (taps / half) ** 2)) / np.i0(5.0)
    kernel *= up / kernel.sum()
    stuffed = np.zeros(len(x) * up)
    stuffed[::up] = x
    expected = np.convolve(stuffed, kernel)[half : half + len(stuffed)][::down]
    found = resample(x[None], rate, target)[0]
    assert len(found) == int(np.ceil(len(x) * up / down))
    assert np.allclose(found, expected[: len(found)], atol=1e-9 * np.abs(x).max())


def test_resampling_keeps_the_time_of_a_wave() -> None:
    wave = np.sin(2 * np.pi * 5 * np.arange(2500) / 250)[None]
    found = resample(wave, 250, 128)[0]
    expected = np.sin(2 * np.pi * 5 * np.arange(len(found)) / 128)
    assert np.abs(found - expected)[64:-64].max() < 0.01


def test_filters_do_not_delay() -> None:
    pulse = np.zeros((1, 1001))
    pulse[0, 500] = 1
    found = prepare_run(pulse, 250, 250, Preprocessing(bandpass_hz=(0.5, 30), notch_hz=50, normalise="none"))
    assert found[0].argmax() == 500
    assert np.allclose(found[0, 400:601], found[0, 400:601][::-1], atol=1e-6)


def test_normalising_by_window_segment_or_not_at_all() -> None:
    x = np.stack([np.arange(12.0), 100 + 3 * np.arange(12.0)])
    whole = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    assert np.allclose(prepare_run(x, 10, 10, Preprocessing(normalise="segment")), whole)
    assert np.array_equal(prepare_run(x, 10, 10, Preprocessing(normalise="none")), x)
    windows = np.stack([x[:, :6], x[:, 6:]])
    by_window = finish_windows(windows, Preprocessing(normalise="window"))
    ramp = (np.arange(6) - 2.5) / np.sqrt(35 / 12)
    assert by_window.dtype == np.float32
    assert np.allclose(by_window, np.broadcast_to(ramp, (2, 2, 6)), atol=1e-6)
    assert np.array_equal(finish_windows(windows, Preprocessing(normalise="segment")), windows.astype(np.float32))


def test_clip_bounds_what_was_normalised() -> None:
    window = np.zeros((1, 1, 100))
    window[0, 0, 3] = 50
    found = finish_windows(window, Preprocessing(clip=2.5))
    assert found.max() == np.float32(2.5)
    assert found[0, 0, 0] == pytest.approx(-0.5 / np.sqrt(50**2 / 100 - 0.25), abs=1e-6)


def test_a_constant_becomes_zeros_and_not_nan() -> None:
    found = finish_windows(np.full((1, 1, 20), 7.3), Preprocessing())
    assert np.array_equal(found, np.zeros((1, 1, 20), np.float32))


def test_a_run_of_a_few_samples_is_filtered_without_error() -> None:
    found = prepare_run(np.arange(5.0)[None], 100, 100, Preprocessing(bandpass_hz=(1, 20), filter_order=4))
    assert found.shape == (1, 5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("steps", [Preprocessing(bandpass_hz=(1, 40)), Preprocessing(notch_hz=50)])
def test_a_filter_above_half_the_rate_is_refused(steps: Preprocessing) -> None:
    with pytest.raises(RecordingError, match=r"does not fit a recording at 64 Hz(.|\n)*below half the rate, 32 Hz"):
        prepare_run(np.zeros((1, 640)), 64, 64, steps)


def test_an_impossible_ratio_of_rates_is_refused() -> None:
    with pytest.raises(RecordingError, match="can't be resampled"):
        resample(np.zeros((1, 100)), 100, 0.0001)


def test_normalising_by_the_recording_keeps_differences_between_its_segments() -> None:
    rng = np.random.default_rng(3)
    quiet, loud = rng.normal(5.0, 1.0, (2, 400)), rng.normal(5.0, 4.0, (2, 600))
    whole = np.concatenate([quiet, loud], axis=-1)
    windows = np.stack([quiet[:, :100], loud[:, :100]])
    found = finish_windows(windows, Preprocessing(normalise="recording"), whole)
    by_hand = (windows - whole.mean(axis=1)[None, :, None]) / whole.std(axis=1)[None, :, None]
    assert np.allclose(found, by_hand, atol=1e-6)
    assert found[1].std() > 3 * found[0].std()
