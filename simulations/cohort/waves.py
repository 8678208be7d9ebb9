"""Clean signals from beats: an ECG of Gaussian waves and a PPG of pulses with a reflected wave (docs/cohort.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulations.cohort.physiology import Floats, Heart, Traits

# P, Q, R, S, T of lead II after McSharry et al. 2003 (IEEE Trans Biomed Eng 50:289), in seconds at 75 a minute.
_HEIGHT = np.array([0.12, -0.10, 1.0, -0.22, 0.30])
_OFFSET = np.array([-0.17, -0.035, 0.0, 0.035, 0.27])
_WIDTH = np.array([0.022, 0.010, 0.011, 0.010, 0.045])
_P, _R, _T = 0, 2, 4


def ecg(heart: Heart, traits: Traits, rate_hz: float, seconds: float, rng: np.random.Generator) -> Floats:
    """Clean ECG in mV, `(samples,)`."""
    samples = round(seconds * rate_hz)
    stretch = np.sqrt(np.clip(heart.intervals, 0.3, 1.6) / 0.8)
    height = np.repeat(_HEIGHT[:, None] * traits.waves[:, :1], len(heart.times), axis=1)
    height[_P] *= np.exp(heart.effects["p_wave"])
    height[_T] *= np.exp(heart.effects["t_wave"])
    height[_R] *= 1 + 0.06 * np.sin(np.interp(heart.times, heart.grid, heart.breath))
    offset = np.repeat(_OFFSET[:, None] + traits.waves[:, 1:2], len(heart.times), axis=1)
    offset[_R] = 0.0
    offset[_T] *= stretch
    width = np.repeat(_WIDTH[:, None] * traits.waves[:, 2:], len(heart.times), axis=1)
    width[_T] *= stretch
    # A ventricular beat: no P wave, broad and tall QRS, T wave the other way.
    early = heart.ectopic
    height[_P, early] = 0.0
    height[1:4, early] *= np.array([[1.0], [1.3], [2.2]])
    width[1:4, early] *= 2.6
    height[_T, early] *= -1.2
    out = np.zeros(samples)
    for wave in range(5):
        _add(out, heart.times + offset[wave], height[wave], width[wave], width[wave], rate_hz)
    level = traits.st + heart.effects["st"]
    _add(out, heart.times + 0.14 * stretch, level, np.full(len(level), 0.045), np.full(len(level), 0.05), rate_hz)
    return out + _flutter(heart, samples, rate_hz, rng)


def ppg(heart: Heart, traits: Traits, rate_hz: float, seconds: float) -> Floats:
    """Clean PPG, 1 for the height of an average pulse, `(samples,)`."""
    samples = round(seconds * rate_hz)
    tone = traits.tone + heart.effects["tone"]
    usual = np.median(heart.intervals)
    # A heart that had less time to fill ejects less: the pulse deficit of early and irregular beats.
    filling = np.clip(1 + 0.8 * (heart.intervals / usual - 1), 0.15, 1.5) * np.where(heart.ectopic, 0.55, 1.0)
    breath = np.sin(np.interp(heart.times, heart.grid, heart.breath))
    height = np.exp(-0.6 * tone) * filling * (1 + 0.08 * breath)
    stretch = np.sqrt(np.clip(heart.intervals, 0.3, 1.6) / 0.8)
    foot = heart.times + traits.transit * np.exp(-0.3 * tone)
    rise = 0.115 * np.exp(-0.2 * tone)
    out = np.zeros(samples)
    _add(out, foot + rise, height, rise / 2.2, 0.115 * stretch * np.exp(-0.15 * tone), rate_hz)
    reflected = height * traits.notch * np.exp(0.45 * tone)
    delay = 0.26 * stretch * np.exp(-0.25 * tone)
    _add(out, foot + rise + delay, reflected, 0.06 * stretch, 0.13 * stretch, rate_hz)
    seconds_at = np.arange(samples) / rate_hz
    return out + 0.10 * np.sin(np.interp(seconds_at, heart.grid, heart.breath) + 0.7)


def _add(out: Floats, centre: Floats, height: Floats, left: Floats, right: Floats, rate_hz: float) -> None:
    """Add one Gaussian a beat, of different widths (seconds) before and after its centre, in place."""
    reach = int(np.ceil(3.5 * float(max(left.max(), right.max())) * rate_hz)) + 1
    steps = np.arange(-reach, reach + 1)
    first = np.round(centre * rate_hz).astype(np.int64)
    index = first[:, None] + steps
    distance = index / rate_hz - centre[:, None]
    width = np.where(distance < 0, left[:, None], right[:, None])
    values = height[:, None] * np.exp(-0.5 * (distance / width) ** 2)
    inside: NDArray[np.bool_] = (index >= 0) & (index < len(out))
    out += np.bincount(index[inside], weights=values[inside], minlength=len(out))


def _flutter(heart: Heart, samples: int, rate_hz: float, rng: np.random.Generator) -> Floats:
    """Fibrillatory waves: a tone that wanders between 4 and 8 Hz, as high as the state makes it."""
    seconds_at = np.arange(samples) / rate_hz
    knots = np.arange(0, seconds_at[-1] + 2, 1.0)
    hertz = np.interp(seconds_at, knots, rng.uniform(4, 8, len(knots)))
    size = np.interp(seconds_at, heart.grid, heart.flutter)
    return np.asarray(size * np.sin(2 * np.pi * np.cumsum(hertz) / rate_hz))
