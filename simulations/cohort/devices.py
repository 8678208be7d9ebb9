"""From the clean signal to what a monitor stores: filters, hum, noise, movement, lost contact, clipping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulations.cohort.config import CohortConfig
from simulations.cohort.physiology import Floats


@dataclass(frozen=True)
class Device:
    """One kind of monitor. Frequencies in Hz, heights in mV (ECG) or pulses (PPG)."""

    ecg_band: tuple[float, float]
    ppg_band: tuple[float, float]
    ecg_gain: float
    ppg_gain: float
    ppg_delay: float
    """Seconds by which the PPG comes late, inside the monitor."""
    ecg_rate_hz: float
    """Rate at which the monitor itself samples; what it stores is interpolated to the file's rate."""
    ppg_rate_hz: float
    mains_hz: float
    hum: float
    ecg_noise: float
    ppg_noise: float
    movement: float
    """Factor on the rate of movement artefacts: a clip on a finger or a strap on a wrist."""
    ecg_range: float
    """The converter clips beyond +- this."""
    ppg_range: float


@dataclass(frozen=True)
class Stored:
    """One signal as a file holds it: int16 `(1, samples)`, its unit, and one mark a second (0: missing)."""

    samples: NDArray[np.int16]
    scale: float
    ok: NDArray[np.uint8]


def draw_device(config: CohortConfig, rng: np.random.Generator) -> Device:
    """A monitor, away from the usual one by `device_variability`."""
    spread = config.device_variability

    def log(usual: float, size: float, low: float, high: float) -> float:
        return float(np.clip(usual * np.exp(spread * size * rng.standard_normal()), low, high))

    return Device(
        ecg_band=(log(0.15, 0.8, 0.03, 0.7), log(32, 0.25, 18, 45)),
        ppg_band=(log(0.15, 0.8, 0.03, 0.7), log(6.5, 0.35, 3.0, 12)),
        ecg_gain=log(1, 0.25, 0.4, 2.5),
        ppg_gain=log(1, 0.4, 0.3, 3),
        ppg_delay=log(0.08, 0.6, 0, 0.4),
        ecg_rate_hz=log(250, 0.4, 100, 500),
        ppg_rate_hz=log(75, 0.4, 32, 250),
        mains_hz=float(rng.choice([50.0, 60.0])),
        hum=log(0.012, 0.8, 0, 0.08),
        ecg_noise=log(0.012, 0.5, 0.003, 0.05),
        ppg_noise=log(0.012, 0.5, 0.003, 0.05),
        movement=log(1, 0.4, 0.3, 3),
        ecg_range=log(3.0, 0.2, 1.8, 6),
        ppg_range=log(3.5, 0.2, 2, 6),
    )


def store_ecg(clean: Floats, device: Device, config: CohortConfig, rng: np.random.Generator) -> Stored:
    """The ECG (mV) as this monitor stores it."""
    rate = config.ecg_rate_hz
    signal = clean + config.noise * (0.10 * _wander(len(clean), rate, rng) + _muscle(len(clean), rate, rng))
    signal = _passband(signal, device.ecg_band, rate)
    signal += config.noise * device.hum * _hum(len(clean), rate, device.mains_hz, rng)
    signal += config.noise * device.ecg_noise * rng.standard_normal(len(clean))
    for start, end in _stretches(config.artefacts_per_minute / 3, (1.0, 5.0), len(clean), rate, rng):
        signal[start:end] += rng.uniform(0.3, 1.5) * _burst(end - start, rate, (0.5, 12.0), rng)
    signal = _resample(signal * device.ecg_gain, rate, device.ecg_rate_hz)
    return _digitise(signal, device.ecg_range, rate, config, rng)


def store_ppg(clean: Floats, device: Device, config: CohortConfig, rng: np.random.Generator) -> Stored:
    """The PPG (pulses) as this monitor stores it."""
    rate = config.ppg_rate_hz
    signal = clean + config.noise * 0.20 * _wander(len(clean), rate, rng)
    per_minute = config.artefacts_per_minute * device.movement
    for start, end in _stretches(per_minute, (2.0, 9.0), len(clean), rate, rng):
        signal[start:end] += rng.uniform(0.3, 2.5) * _burst(end - start, rate, (0.3, 4.0), rng)
    signal = _passband(signal, device.ppg_band, rate)
    # Lamps flicker into the sensor; above half the rate it folds down, as in a real one.
    signal += config.noise * 0.3 * device.hum * _hum(len(clean), rate, device.mains_hz, rng)
    signal += config.noise * device.ppg_noise * rng.standard_normal(len(clean))
    signal = _delay(signal, device.ppg_delay * rate)
    signal = _resample(signal * device.ppg_gain, rate, device.ppg_rate_hz)
    return _digitise(signal, device.ppg_range, rate, config, rng)


def _passband(signal: Floats, band: tuple[float, float], rate_hz: float) -> Floats:
    """Causal second-order Butterworth, as monitors have: a high low edge bends the ST segment and the pulse."""
    from scipy.signal import butter, sosfilt, sosfilt_zi

    low, high = band[0], min(band[1], 0.45 * rate_hz)
    sections = butter(2, [low, high], btype="bandpass", fs=rate_hz, output="sos")
    settled = sosfilt_zi(sections) * float(signal[: max(1, int(rate_hz))].mean())
    out, _ = sosfilt(sections, signal, zi=settled)
    return np.asarray(out)


def _wander(samples: int, rate_hz: float, rng: np.random.Generator) -> Floats:
    """Baseline wander: a smooth random walk around zero, knots every 2 s."""
    knots = np.arange(0, samples / rate_hz + 4, 2.0)
    values = rng.standard_normal(len(knots))
    for i in range(1, len(values)):
        values[i] = 0.8 * values[i - 1] + 0.6 * values[i]
    at = np.arange(samples) / rate_hz
    width = int(rate_hz)
    smooth = np.convolve(np.pad(np.interp(at, knots, values), width, mode="edge"), np.ones(width) / width, "same")
    return np.asarray(smooth[width:-width])


def _muscle(samples: int, rate_hz: float, rng: np.random.Generator) -> Floats:
    """Muscle noise whose strength comes and goes over seconds."""
    strength = np.exp(0.7 * _wander(samples, rate_hz, rng)) * 0.02
    return np.asarray(strength * rng.standard_normal(samples))


def _hum(samples: int, rate_hz: float, mains_hz: float, rng: np.random.Generator) -> Floats:
    at = np.arange(samples) / rate_hz
    exact = mains_hz + 0.03 * rng.standard_normal()
    return np.asarray(np.sin(2 * np.pi * (exact * at + rng.random())))


def _burst(samples: int, rate_hz: float, band: tuple[float, float], rng: np.random.Generator) -> Floats:
    """Movement: noise of one band that swells and dies away, unit standard deviation at its height."""
    from scipy.signal import butter, sosfilt

    sections = butter(1, [band[0], min(band[1], 0.45 * rate_hz)], btype="bandpass", fs=rate_hz, output="sos")
    lead = int(2 * rate_hz)
    noise = sosfilt(sections, rng.standard_normal(samples + lead))[lead:]
    return np.asarray(noise / (noise.std() + 1e-9) * np.hanning(samples + 2)[1:-1])


def _stretches(
    per_minute: float, lengths: tuple[float, float], samples: int, rate_hz: float, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Random stretches `[start, end)` in samples; their count is Poisson, their length uniform in seconds."""
    count = rng.poisson(per_minute * samples / rate_hz / 60)
    starts = np.sort(rng.uniform(0, samples, count)).astype(int)
    ends = starts + (rng.uniform(*lengths, count) * rate_hz).astype(int)
    return [
        (int(start), int(min(end, samples))) for start, end in zip(starts, ends, strict=True) if start < samples - 2
    ]


def _delay(signal: Floats, samples: float) -> Floats:
    at = np.arange(len(signal))
    return np.asarray(np.interp(at - samples, at, signal))


def _resample(signal: Floats, rate_hz: float, own_hz: float) -> Floats:
    """Through the monitor's own sampling grid and back, by straight lines: a slow monitor loses its peaks."""
    at = np.arange(len(signal)) / rate_hz
    own = np.arange(0, at[-1] + 1 / own_hz, 1 / own_hz)
    return np.asarray(np.interp(at, own, np.interp(own, at, signal)))


def _digitise(signal: Floats, limit: float, rate_hz: float, config: CohortConfig, rng: np.random.Generator) -> Stored:
    """Clip, lose contact now and then, and round to int16 with 12 bits over the range."""
    scale = 2 * limit / 4096
    clipped = np.clip(signal, -limit, limit)
    ok = np.ones(int(np.ceil(len(signal) / rate_hz)), dtype=np.uint8)
    for start, end in _stretches(config.losses_per_hour / 60, (3.0, 15.0), len(signal), rate_hz, rng):
        marked = rng.random() < 0.5
        clipped[start:end] = 0.0 if marked else limit * rng.choice([-1.0, 1.0])
        if marked:
            ok[int(start / rate_hz) : int(np.ceil(end / rate_hz))] = 0
    return Stored(np.round(clipped / scale).astype(np.int16)[None], scale, ok)
