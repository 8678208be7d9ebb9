"""The hospital's bounds on a private mechanism, held against a job's plan before any data is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.errors import ConfigError
from bridge.job import Job
from bridge.messages import ReasonCode
from client.errors import JobError, PolicyError

if TYPE_CHECKING:
    from bridge.privacy.accounting import Cohort, Release
    from client.policy import PrivacyPolicy

COHORTS: tuple[Cohort, ...] = ("pair", "validation", "test")
"""Groups of a site's patients that each have a budget in a plan; a patient in two of them pays for both."""


def judge_privacy(job: Job, policy: PrivacyPolicy) -> None:
    """Raise `PolicyError` (PRIVACY_TOO_WEAK) that names the policy's line where a private job asks for a larger delta,
    clipping bound, sampling rate or epsilon, or for less noise; `JobError` where its plan is not complete."""
    asked = job.privacy
    _at_most("delta", "privacy.delta", asked.delta, policy.delta)
    clips = {
        "selection": asked.selection.clip if job.selection.mode != "fixed" else 0.0,
        "closed_form": asked.closed_form.clip if job.train.solves else 0.0,
        "training": asked.training.clip if job.rounds else 0.0,
    }
    for phase, clip in clips.items():
        _at_most(f"the {phase} clip", "privacy.clip_max", clip, policy.clip_max)
    if job.rounds:
        _at_most(
            "the sampling rate", "privacy.sampling_rate_max", asked.training.sampling_rate, policy.sampling_rate_max
        )
    for release in plan_of(job):
        if release.noise_multiplier < policy.noise_multiplier_min:
            raise _too_weak(
                f"the job asks for the noise multiplier {release.noise_multiplier:.4g} in {release.phase}",
                f"the policy's privacy.noise_multiplier_min is {policy.noise_multiplier_min:g}",
            )
    _judge_epsilon(job, policy.epsilon_cap)


def plan_of(job: Job) -> tuple[Release, ...]:
    """All that a private job will cost. Raises `JobError` where a noise multiplier is missing."""
    from bridge.privacy.accounting import plan_releases

    try:
        return plan_releases(job)
    except ConfigError as error:
        raise JobError(error.what, why=error.why, fix=error.fix) from error


def _judge_epsilon(job: Job, cap: float) -> None:
    from bridge.privacy.accounting import epsilon, releases_of

    delta = job.privacy.delta
    for cohort in COHORTS:
        releases = releases_of(job, cohort)
        if releases and (cost := epsilon(releases, delta)) > cap:
            raise _too_weak(
                f"the job costs a {cohort} patient epsilon {cost:.4g} at delta {delta:g}",
                f"the policy's privacy.epsilon_cap is {cap:g}",
            )


def _at_most(what: str, line: str, value: float, bound: float) -> None:
    if value > bound:
        raise _too_weak(f"the job asks for {what} {value:g}", f"the policy's {line} is {bound:g}")


def _too_weak(what: str, why: str) -> PolicyError:
    return PolicyError(
        ReasonCode.PRIVACY_TOO_WEAK,
        what,
        why=why,
        fix="ask for a stronger plan, or change the policy if the hospital agrees",
    )
