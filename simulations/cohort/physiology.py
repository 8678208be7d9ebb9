"""The body behind both signals: hidden states, traits of a patient, and the beats of the heart (docs/cohort.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from simulations.cohort.config import CohortConfig

Floats = NDArray[np.float64]

STATES = ("rest", "stress", "arrhythmia")
_GRID_HZ = 2.0
_ONSET_SECONDS = 2.0
"""Time constant with which the body follows a change of state."""


@dataclass(frozen=True)
class Effects:
    """What a state of strength 1 does to the average body. Logs are of ratios: 0.1 is about ten percent."""

    rate: float = 0.0
    """Log of the heart rate."""
    sinus: float = 0.0
    """Log of the respiratory sinus arrhythmia."""
    irregular: float = 0.0
    """Relative standard deviation of intervals without any rhythm (atrial fibrillation has about 0.2)."""
    ectopy: float = 0.0
    """Premature ventricular beats, a share of all."""
    breathing: float = 0.0
    """Log of the breathing rate."""
    st: float = 0.0
    """ST level in mV."""
    t_wave: float = 0.0
    """Log of the T wave's height."""
    p_wave: float = 0.0
    """Log of the P wave's height."""
    flutter: float = 0.0
    """Height of fibrillatory waves in mV."""
    tone: float = 0.0
    """Log of the vessels' stiffness: small quick pulses, an early and high reflected wave, a short transit."""


EFFECTS = {
    "rest": Effects(),
    "stress": Effects(rate=0.17, sinus=-0.6, breathing=0.25, st=-0.08, t_wave=-0.35, tone=0.45),
    "arrhythmia": Effects(
        rate=0.08, sinus=-0.3, irregular=0.13, ectopy=0.05, p_wave=-1.2, flutter=0.04, t_wave=-0.1, tone=-0.1
    ),
}
_NAMES = tuple(field.name for field in fields(Effects))


@dataclass(frozen=True)
class Traits:
    """One body. Heights in mV for the ECG, 1 for an average pulse; times in seconds."""

    rate: float
    """Beats a minute at rest."""
    sinus: float
    wander: float
    """Relative size of the slow (0.1 Hz) waves of the heart rate."""
    breathing_hz: float
    ectopy: float
    """Harmless premature beats, a share of all, in every state."""
    reactions: dict[str, float]
    """How strongly each measure of `Effects` follows a state in this body, around 1."""
    waves: Floats
    """ECG `(5 waves P Q R S T, 3)`: factor of height, shift of time, factor of width."""
    st: float
    tone: float
    transit: float
    notch: float
    """Height of the reflected wave, relative to the pulse."""
    mix: Floats
    """Shares of the states."""


@dataclass(frozen=True)
class Segment:
    """A stretch in one hidden state."""

    start: float
    end: float
    state: int


@dataclass(frozen=True)
class Heart:
    """Beats `(beats,)`, and what both sensors see of the body at each of them."""

    times: Floats
    """R peaks in seconds."""
    intervals: Floats
    """Seconds since the beat before."""
    ectopic: NDArray[np.bool_]
    effects: dict[str, Floats]
    """Each measure of `Effects` at each beat, reactions and strength included."""
    grid: Floats
    flutter: Floats
    """Fibrillatory waves' height on `grid` (seconds)."""
    breath: Floats
    """Phase of breathing on `grid`, radians."""


def draw_traits(config: CohortConfig, rng: np.random.Generator) -> Traits:
    """A body, away from the average one by `patient_variability`."""
    spread = config.patient_variability

    def factor(size: float) -> float:
        return float(np.exp(spread * size * rng.standard_normal()))

    waves = np.stack(
        [
            np.exp(spread * 0.25 * rng.standard_normal(5)),
            spread * 0.008 * rng.standard_normal(5),
            np.exp(spread * 0.12 * rng.standard_normal(5)),
        ],
        axis=1,
    )
    return Traits(
        rate=72 * factor(0.13),
        sinus=0.035 * factor(0.4),
        wander=0.015 * factor(0.3),
        breathing_hz=0.25 * factor(0.15),
        ectopy=0.006 * spread * float(rng.exponential()),
        reactions={name: factor(0.35) for name in _NAMES},
        waves=waves,
        st=0.03 * spread * float(rng.standard_normal()),
        tone=0.28 * spread * float(rng.standard_normal()),
        transit=0.2 * factor(0.12),
        notch=0.42 * factor(0.25),
        mix=rng.dirichlet(np.full(config.classes, config.state_balance)),
    )


def draw_segments(config: CohortConfig, mix: Floats, rng: np.random.Generator) -> list[Segment]:
    """States in stretches of `dwell_seconds`: the patient's mix in random order, each state once at least."""
    count = max(1, int(config.seconds // config.dwell_seconds))
    first = np.arange(min(config.classes, count))
    rest = rng.choice(config.classes, size=count - len(first), p=mix)
    states = rng.permutation(np.concatenate([first, rest]))
    edges = np.append(np.arange(count) * config.dwell_seconds, config.seconds)
    return [Segment(float(edges[i]), float(edges[i + 1]), int(state)) for i, state in enumerate(states)]


def beat(config: CohortConfig, traits: Traits, segments: list[Segment], rng: np.random.Generator) -> Heart:
    """The beats of one recording: intervals with breathing, slow waves, and each state's irregularity."""
    grid = np.arange(0.0, config.seconds + 1, 1 / _GRID_HZ)
    course = _course(config, traits, segments, grid, rng)
    breathing = traits.breathing_hz * np.exp(course["breathing"])
    breath = 2 * np.pi * (np.cumsum(breathing) / _GRID_HZ + rng.random())
    slow = np.sin(2 * np.pi * (0.1 * grid + rng.random()))
    mean = 60 / (traits.rate * np.exp(course["rate"]))
    swing = traits.sinus * np.exp(course["sinus"]) * np.sin(breath) + traits.wander * slow
    ectopy = np.clip(traits.ectopy + course["ectopy"], 0, 0.4)
    times, ectopic = _walk(config.seconds, mean * (1 + swing), np.clip(course["irregular"], 0, 0.3), ectopy, rng)
    at_beats = {name: np.interp(times, grid, values) for name, values in course.items()}
    return Heart(
        times=times,
        intervals=np.diff(times, prepend=times[0] - mean[0]),
        ectopic=ectopic,
        effects=at_beats,
        grid=grid,
        flutter=np.clip(course["flutter"], 0, None),
        breath=breath,
    )


def _course(
    config: CohortConfig, traits: Traits, segments: list[Segment], grid: Floats, rng: np.random.Generator
) -> dict[str, Floats]:
    """Every measure over time: state x strength of this stretch x reaction of this body, and stateless drift."""
    course = {name: np.zeros(len(grid)) for name in _NAMES}
    drift = config.patient_variability
    for segment in segments:
        inside = (grid >= segment.start) & (grid <= segment.end)
        strength = config.state_separation * float(np.clip(rng.normal(1.0, 0.4), 0.1, 2.0))
        effects = EFFECTS[STATES[segment.state]]
        for name in _NAMES:
            course[name][inside] = getattr(effects, name) * strength * traits.reactions[name]
        # Posture, temperature and thought move the body in every state, and can look like a mild state.
        course["rate"][inside] += drift * 0.05 * rng.standard_normal()
        course["tone"][inside] += drift * 0.12 * rng.standard_normal()
        course["st"][inside] += drift * 0.02 * rng.standard_normal()
        course["t_wave"][inside] += drift * 0.08 * rng.standard_normal()
    keep = np.exp(-1 / (_GRID_HZ * _ONSET_SECONDS))
    return {name: _follow(values, float(keep)) for name, values in course.items()}


def _follow(values: Floats, keep: float) -> Floats:
    """First-order lag that starts settled."""
    out = np.empty_like(values)
    level = values[0]
    for i, value in enumerate(values):
        level = keep * level + (1 - keep) * value
        out[i] = level
    return out


def _walk(
    seconds: float, mean: Floats, irregular: Floats, ectopy: Floats, rng: np.random.Generator
) -> tuple[Floats, NDArray[np.bool_]]:
    """Beat after beat; a premature one comes at 0.62 of its interval, and a pause that makes up for it follows."""
    most = int(seconds * 5) + 10
    normal, uniform = rng.standard_normal(most), rng.random(most)
    times, ectopic = [float(mean[0]) * float(rng.random())], [False]
    for z, u in zip(normal, uniform, strict=True):
        if times[-1] >= seconds:
            break
        at = min(int(times[-1] * _GRID_HZ), len(mean) - 1)
        early = bool(u < ectopy[at]) and not ectopic[-1]
        factor = 0.62 if early else 1.38 if ectopic[-1] else 1 + max(-2.2, min(2.2, z)) * (irregular[at] + 0.008)
        times.append(times[-1] + max(0.28, float(mean[at]) * float(factor)))
        ectopic.append(early)
    return np.asarray(times), np.asarray(ectopic)
