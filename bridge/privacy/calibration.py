"""Noise for a wanted epsilon: phase by phase, or what a total leaves to the main phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil, exp, floor, log, log10
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

    def gap(log_noise: float, price: Callable[[Releases, float], float]) -> float:
        return price((*fixed, replace(template, noise_multiplier=exp(log_noise))), delta) - target

    low, high = log(_SMALLEST), log(_LARGEST)
    if gap(high, epsilon) > 0:
        raise ConfigError(
            f"epsilon {target:g} at delta {delta:g} can't be met by any noise",
            why=f"what else is planned for these patients costs {epsilon(fixed, delta):.4g} by itself",
            fix="raise the epsilon, or give the other phases less",
        )
    # Epsilon is slow to compute where noise is small, so the search comes from above, on the coarse grid first.
    least, step = 0.0, 0.7
    for price, tolerance in ((coarse_epsilon, 1e-3), (epsilon, _TOLERANCE)):
        least = _root(partial(gap, price=price), least, step, (low, high), tolerance)
        step = 2e-3
    noise, unit = _rounded_up(exp(least))
    while gap(log(noise), epsilon) > 0:
        noise, unit = _rounded_up(noise + unit / 2)
    return noise


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


def _root(
    gap: Callable[[float], float], start: float, step: float, ends: tuple[float, float], tolerance: float
) -> float:
    """Where a falling function crosses zero, looked for about `start`; the end of the interval where it does not."""
    from scipy.optimize import brentq

    low, high = ends
    right = start
    while gap(right) > 0:
        start, right, step = right, min(right + step, high), step * 2
        if start == high:
            return high
    left = start if start < right else max(right - step, low)
    while gap(left) <= 0:
        if left == low:
            return low
        right, left, step = left, max(left - step, low), step * 2
    return float(brentq(gap, left, right, xtol=tolerance))


def _rounded_up(value: float) -> tuple[float, float]:
    """To five significant digits, and the value of the last of them."""
    unit = 10.0 ** (floor(log10(value)) + 1 - _DIGITS)
    up = ceil(value / unit * (1 - 1e-12)) * unit
    return float(f"{up:.{_DIGITS}g}"), unit
