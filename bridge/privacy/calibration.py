"""Noise for a wanted epsilon: phase by phase, or what a total leaves to the main phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor, log10
from typing import Literal

from bridge.errors import ConfigError
from bridge.job import Job
from bridge.privacy.accounting import (
    Release,
    Releases,
    coarse_epsilon,
    epsilon,
    evaluations,
    releases_of,
)

Phase = Literal["training", "selection", "closed_form", "metrics"]

_SMALLEST, _LARGEST = 0.2, 1e4
"""Noise multipliers that are looked at. Below the smallest an epsilon means nothing, and its computation takes long."""
_TOLERANCE = 1e-5
_DIGITS = 5
"""Significant digits of a noise multiplier: it is rounded up to them, so it is at most 1e-4 above the least one."""


def noise_for(target: float, delta: float, fixed: Releases, template: Release) -> float:
    """The least noise multiplier of `template`, within 1e-4 of itself and rounded up, at which it costs no more than
    `target` at `delta` together with the releases that are there already.

    A target that is met with hardly any noise gets the multiplier 0.2. Raises `ConfigError` where the target is out
    of reach: what is there spends it, or epsilon is too small.
    """

    def meets(noise: float, price: Callable[[Releases, float], float] = epsilon) -> bool:
        return price((*fixed, replace(template, noise_multiplier=noise)), delta) <= target

    if not meets(_LARGEST):
        raise ConfigError(
            f"epsilon {target:g} at delta {delta:g} can't be met by any noise",
            why=f"what else is planned for these patients costs {epsilon(fixed, delta):.4g} by itself",
            fix="raise the epsilon, or give the other phases less",
        )
    high = _least(lambda noise: meets(noise, coarse_epsilon), _SMALLEST, _LARGEST, 1e-3)
    # The coarse grid answers within a fraction of a percent and mostly too high; the fine one decides.
    while not meets(high):
        high = min(high * 1.01, _LARGEST)
    low = high
    while low > _SMALLEST and meets(low):
        high, low = low, max(low / 1.005, _SMALLEST)
    return _rounded_up(_least(meets, low, high, _TOLERANCE))


def resolved(job: Job) -> Job:
    """The job with every noise multiplier that it needs, found from the epsilons that its configuration names.

    A phase's own epsilon is what it costs alone (selection: probe and similarity together; metrics: the cohort that is
    asked more often). `privacy.epsilon` is what all releases of the paired patients cost together: the main phase,
    training or else the closed form, gets the noise that meets it. A phase that the job does not use keeps what it
    has. A resolved job comes back as it is. Raises `ConfigError` where a phase that is used has neither, or where the
    total can't be met.
    """
    privacy = job.privacy
    if not privacy.private:
        return job
    main: Phase = "training" if job.rounds else "closed_form"
    for phase, template in _templates(job):
        if phase != main:
            job = _with_noise(job, phase, _own_noise(job, phase, template))
    template = dict(_templates(job))[main]
    asked = getattr(privacy, main)
    if privacy.epsilon is None or asked.noise_multiplier is not None or asked.epsilon is not None:
        job = _with_noise(job, main, _own_noise(job, main, template))
        _check_total(job, main)
        return job
    fixed = _others(job, main)
    return _with_noise(job, main, noise_for(privacy.epsilon, privacy.delta, fixed, template))


def _templates(job: Job) -> tuple[tuple[Phase, Release], ...]:
    """The phases that a job uses, each with the release whose noise is to be found; noise 1 stands for any."""
    found: list[tuple[Phase, Release]] = []
    if job.selection.mode == "scores":
        found.append(("selection", Release("probe", "pair", 1.0, count=2)))
    if job.train.solves:
        found.append(("closed_form", Release("closed_form", "pair", 1.0)))
    if job.rounds:
        steps = job.train.local_steps if job.privacy.mechanism == "local" else 1
        rate = job.privacy.training.sampling_rate
        found.append(("training", Release("training", "pair", 1.0, rate, job.rounds * steps)))
    asked = max(count for _, count in evaluations(job))
    if asked:
        found.append(("metrics", Release("metrics", "test", 1.0, count=asked)))
    return tuple(found)


def _own_noise(job: Job, phase: Phase, template: Release) -> float:
    asked = getattr(job.privacy, phase)
    if asked.noise_multiplier is not None:
        return float(asked.noise_multiplier)
    if asked.epsilon is None:
        total = ", or privacy.epsilon" if phase in ("training", "closed_form") else ""
        raise ConfigError(
            f"neither privacy.{phase}.noise_multiplier nor privacy.{phase}.epsilon is given{total}",
            why=f"the job uses it under privacy.mechanism '{job.privacy.mechanism}'",
            fix=f"write what {phase.replace('_', ' ')} may cost a patient, such as privacy.{phase}.epsilon: 1",
        )
    return noise_for(asked.epsilon, job.privacy.delta, (), template)


def _others(job: Job, main: Phase) -> Releases:
    """What the paired patients pay beside the main phase."""
    stand_in = _with_noise(job, main, 1.0)
    return tuple(release for release in releases_of(stand_in, "pair") if release.phase != main)


def _check_total(job: Job, main: Phase) -> None:
    privacy = job.privacy
    if privacy.epsilon is None:
        return
    total = epsilon(releases_of(job, "pair"), privacy.delta)
    if total > privacy.epsilon:
        raise ConfigError(
            f"the phases cost epsilon {total:.4g} together, more than privacy.epsilon {privacy.epsilon:g}",
            why=f"privacy.{main} has a noise_multiplier or an epsilon of its own",
            fix=f"leave both out, so that privacy.{main} takes what is left, or raise privacy.epsilon",
        )


def _with_noise(job: Job, phase: Phase, noise: float) -> Job:
    asked = getattr(job.privacy, phase).model_copy(update={"noise_multiplier": noise, "epsilon": None})
    return job.model_copy(update={"privacy": job.privacy.model_copy(update={phase: asked})})


def _least(meets: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """The least noise between two that meets, within a relative tolerance from above; `high` is known to meet."""
    if meets(low):
        return low
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _rounded_up(value: float) -> float:
    """To five significant digits."""
    unit = 10.0 ** (floor(log10(value)) + 1 - _DIGITS)
    up = ceil(value / unit) * unit
    return float(f"{up:.{_DIGITS}g}")
