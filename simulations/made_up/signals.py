"""Signals whose state can be read in either modality, so that a head and a bridge have something to learn.

ECG and PPG come from the built-in cohort's bodies (docs/cohort.md). EEG is a rhythm of the state in noise; EMG is noise
that swells in the state's rhythm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridge.hashing import keyed_hash
from simulations.cohort.config import CohortConfig
from simulations.cohort.physiology import Floats, Segment, beat, draw_traits
from simulations.cohort.waves import ecg, ppg

CALM, ROUSED, IRREGULAR = 0, 1, 2
"""The cohort's states, whatever they stand for in a set."""

_SEPARATION = 2.5
"""Stronger than in the cohort: there are few windows to learn from."""
_NOISE = 0.03
"""Of the ECG in mV, and of the PPG in pulses' heights."""


@dataclass(frozen=True)
class Stretch:
    """A state of the body that holds for some seconds."""

    state: int
    seconds: float


def heart_signals(
    stretches: Sequence[Stretch], ecg_hz: float, ppg_hz: float, key: tuple[int, str]
) -> tuple[Floats, Floats]:
    """ECG in mV `(samples,)` and PPG, 1 for a pulse's height, of the same heart; `key` is seed and patient."""
    rng = _stream(key, "heart")
    seconds = sum(stretch.seconds for stretch in stretches)
    config = CohortConfig(
        seconds=seconds, window_seconds=seconds, step_seconds=seconds, dwell_seconds=seconds,
        state_separation=_SEPARATION,
    )  # fmt: skip
    edges = np.cumsum([0.0, *(stretch.seconds for stretch in stretches)])
    segments = [Segment(float(edges[i]), float(edges[i + 1]), stretch.state) for i, stretch in enumerate(stretches)]
    traits = draw_traits(config, rng)
    heart = beat(config, traits, segments, rng)
    electric = ecg(heart, traits, ecg_hz, seconds, rng)
    pulse = ppg(heart, traits, ppg_hz, seconds)
    return electric + _NOISE * rng.standard_normal(len(electric)), pulse + _NOISE * rng.standard_normal(len(pulse))


def rhythm(
    stretches: Sequence[Stretch], hertz: Mapping[int, tuple[float, float]], rate_hz: float, key: tuple[int, str]
) -> Floats:
    """One EEG channel in microvolts: noise, and each state's wave of `(Hz, microvolts)`."""
    rng = _stream(key, "rhythm")
    gain = np.exp(0.2 * rng.standard_normal())
    parts = []
    for stretch in stretches:
        frequency, height = hertz[stretch.state]
        time = np.arange(round(stretch.seconds * rate_hz)) / rate_hz
        wave = np.sin(2 * np.pi * (frequency * np.exp(0.03 * rng.standard_normal()) * time + rng.random()))
        parts.append(gain * height * wave + 10 * rng.standard_normal(len(time)))
    return np.concatenate(parts)


def bursts(stretches: Sequence[Stretch], hertz: Mapping[int, float], rate_hz: float, key: tuple[int, str]) -> Floats:
    """One EMG channel in microvolts: noise that comes and goes in each state's rhythm."""
    rng = _stream(key, "bursts")
    gain = 40 * np.exp(0.3 * rng.standard_normal())
    parts = []
    for stretch in stretches:
        time = np.arange(round(stretch.seconds * rate_hz)) / rate_hz
        swell = 0.2 + np.sin(np.pi * (hertz[stretch.state] * time + rng.random())) ** 4
        parts.append(gain * swell * rng.standard_normal(len(time)))
    return np.concatenate(parts)


def _stream(key: tuple[int, str], what: str) -> np.random.Generator:
    """Random numbers of one channel: the same however many others there are."""
    return np.random.default_rng(keyed_hash("made-up", *key, what))
