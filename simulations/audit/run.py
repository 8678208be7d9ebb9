"""An audit of a configuration's mechanisms, and its record `audit.json`."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bridge.errors import ConfigError
from bridge.job import Job, Models
from bridge.privacy.accounting import Release, epsilon, plan_releases
from bridge.privacy.calibration import resolved
from bridge.privacy.noise import NoiseSource
from server.audit_record import CONFIDENCE, AuditRecord, Claim, PhaseAudit
from simulations.audit.bound import correct_guesses, lower_bound
from simulations.audit.canaries import Canaries, Noise, closed_form_scores, training_scores
from simulations.config import SimulationConfig

DELTA = 1e-5
"""Of the comparison. One run audits many canaries at once, and its proof pays for each with delta: at the plan's own,
much larger one, it would prove next to nothing. Claim and bound are both taken at this delta."""
_GUESSED = 0.1
"""Share of canaries that are guessed about: half of it the highest scores, half the lowest."""

_COVERED = {
    "training": "sampling of patients, clipping of their gradients, the sum, its noise and the server's step",
    "closed_form": "clipping of patients' statistics, the sum and its noise",
}


def audit(
    config: SimulationConfig,
    canaries: int = 2000,
    *,
    seed: int | None = None,
    noise: Noise = NoiseSource.from_system,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> AuditRecord:
    """Audit the training and the closed form that a private configuration asks for.

    `canaries` patients are each put in or left out by a fair coin; `noise` is where the mechanisms take theirs.
    `seed` fixes coins and sampling (None: the operating system). Raises `ConfigError` where there is no mechanism.
    """
    job = resolved(config.job(Models(old_encoder="", new_encoder="", task_head="")))
    if job.privacy.mechanism == "none":
        raise ConfigError(
            f"{config.name}: there is nothing to audit",
            why="privacy.mechanism 'none' claims nothing",
            fix="use --set privacy.mechanism=central, or local, with an epsilon",
        )
    releases = plan_releases(job)
    pair = [release for release in releases if release.cohort == "pair"]
    phases: list[PhaseAudit] = []
    asked = [release for release in pair if release.phase in ("training", "closed_form")]
    for number, release in enumerate(asked):
        progress("canaries", number, len(asked))
        phases.append(_phase(job, release, canaries, seed, noise))
    progress("canaries", len(asked), len(asked))
    delta = job.privacy.delta
    return AuditRecord(
        name=config.name,
        threat_model=job.privacy.mechanism,
        phases=phases,
        plan=Claim(epsilon=epsilon(pair, delta), delta=delta),
    )


def _phase(job: Job, release: Release, count: int, seed: int | None, noise: Noise) -> PhaseAudit:
    assert release.phase in ("training", "closed_form")
    canaries = Canaries.drawn(count, seed)
    guesses = 2 * max(1, round(count * _GUESSED / 2))
    found = {}
    for name, source in (("full", noise), ("half", _halved(noise))):
        scores = _scores(job, release, canaries, seed, source)
        correct = correct_guesses(scores, canaries.inserted, guesses)
        found[name] = correct, lower_bound(count, guesses, correct, DELTA, CONFIDENCE)
    return PhaseAudit(
        phase="training" if release.phase == "training" else "closed_form",
        claim=Claim(epsilon=epsilon([release], DELTA), delta=DELTA),
        lower_bound=found["full"][1],
        canaries=count,
        inserted=int(canaries.inserted.sum()),
        guesses=guesses,
        correct=found["full"][0],
        half_noise_bound=found["half"][1],
        covers=_COVERED[release.phase],
    )


def _scores(job: Job, release: Release, canaries: Canaries, seed: int | None, noise: Noise) -> NDArray[np.float64]:
    if release.phase == "closed_form":
        return closed_form_scores(job, canaries, noise)
    return training_scores(job, canaries, noise, lambda message: _key(seed, message))


def _key(seed: int | None, message: int) -> bytes:
    return os.urandom(32) if seed is None else np.random.default_rng([seed, message]).bytes(32)


def _halved(noise: Noise) -> Noise:
    return lambda: _HalfNoise(noise())


class _HalfNoise(NoiseSource):
    """The fault that an audit should see: noise of half the deviation."""

    def __init__(self, whole: NoiseSource) -> None:
        self._whole = whole

    def uniform(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        return self._whole.uniform(shape)

    def normal(self, shape: int | tuple[int, ...], deviation: float) -> NDArray[np.float64]:
        return self._whole.normal(shape, deviation / 2)
