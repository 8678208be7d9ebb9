"""What a job costs a patient: its releases, and the epsilon of any list of them.

A release is one Gaussian noise addition to a sum that one patient moves by at most the sensitivity (the noise
multiplier is the standard deviation over it); unit: the patient, adjacency: add or remove one. Training samples
patients by Poisson draws (Abadi et al. 2016), everything else asks all. Epsilon comes from privacy loss distributions
(Doroshenko et al. 2022, dp-accounting); Renyi's differential privacy serves where plans are composed whose parameters
may depend on what came before (Feldman and Zrnic 2021). Imports no torch, and dp-accounting where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, sqrt
from typing import TYPE_CHECKING, Literal

from bridge.errors import ConfigError
from bridge.job import Job
from bridge.messages import CLOSED_FORM, EVALUATE, PROBE, SIMILARITY, TRAIN

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Phase = Literal["probe", "similarity", "closed_form", "training", "metrics"]
Cohort = Literal["pair", "validation", "test"]

_WIDEST = 1e-3
"""Width of the privacy loss' grid for few noise additions. The grid's pessimism grows with count x width^2."""
_PESSIMISM = 3e-4
"""Count x width^2 of the fine grid; what an epsilon is too high by stays below this, however many additions."""
_COARSER = 4.0
"""For a first look: about four times faster, and too high rather than too low."""

_ORDERS = (*(2 + quarter / 4 for quarter in range(36)), *range(11, 65), 80, 96, 128, 256, 512, 1024)
"""Of Renyi's divergence. Below 2 the series for sampled Gaussians often fails to converge."""

FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Release:
    """`count` noise additions of one kind to sums over one cohort of a site's patients.

    Each patient of the cohort is in a sum with chance `sampling_rate`, by an own Poisson draw each time.
    """

    phase: Phase
    cohort: Cohort
    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not self.noise_multiplier > 0 or not 0 < self.sampling_rate <= 1 or self.count < 1:
            raise ConfigError(
                f"a release of noise multiplier {self.noise_multiplier:g}, sampling rate {self.sampling_rate:g} and "
                f"count {self.count} has no finite price",
                why="noise_multiplier > 0, 0 < sampling_rate <= 1 and count >= 1 are needed",
                fix="correct the job's privacy section",
            )


Releases = tuple[Release, ...]


def plan_releases(job: Job) -> Releases:
    """All that a private job may release of a site's patients; empty where the mechanism is `none`.

    Test patients judge one bridge, whichever is kept, so one evaluation is reserved for them. Raises `ConfigError`
    where a noise multiplier that is needed is missing.
    """
    if not job.privacy.private:
        return ()
    found: list[Release] = []
    if job.selection.mode == "scores":
        found += [*message_releases(job, PROBE), *message_releases(job, SIMILARITY)]
    if job.train.solves:
        found += message_releases(job, CLOSED_FORM)
    if job.rounds:
        found.append(_training(job, job.rounds * _steps(job)))
    found += [_metrics(job, cohort, count) for cohort, count in evaluations(job) if count]
    return tuple(found)


def evaluations(job: Job) -> tuple[tuple[Literal["validation", "test"], int], ...]:
    """How many evaluations a job may ask of each cohort of metrics."""
    validation = sum(job.evaluates("validation", round_) for round_ in range(1, job.rounds + 1))
    return (("validation", validation), ("test", int(job.evaluate.final)))


def message_releases(job: Job, message: str, split: str | None = None) -> Releases:
    """What one message of that type costs under a private mechanism; nothing where it looks at no recording.

    `split` is that of an `evaluate` message. Raises `ConfigError` where a noise multiplier is missing.
    """
    if not job.privacy.private:
        return ()
    if message == PROBE:
        return (Release("probe", "pair", needed(job, "selection")),)
    if message == SIMILARITY:
        return (Release("similarity", "pair", needed(job, "selection")),)
    if message == CLOSED_FORM:
        return (Release("closed_form", "pair", needed(job, "closed_form")),)
    if message == TRAIN:
        return (_training(job, _steps(job)),)
    if message == EVALUATE:
        if split not in ("validation", "test"):
            raise ConfigError(f"an evaluation has no price on '{split}'", why="splits: validation, test")
        return (_metrics(job, "validation" if split == "validation" else "test", 1),)
    return ()


def releases_of(job: Job, cohort: Cohort) -> Releases:
    """Those of a job's releases that a cohort pays for."""
    return tuple(release for release in plan_releases(job) if release.cohort == cohort)


def needed(job: Job, phase: Literal["training", "selection", "closed_form", "metrics"]) -> float:
    """A phase's noise multiplier; raises `ConfigError` where the job has none."""
    value: float | None = getattr(job.privacy, phase).noise_multiplier
    if value is None:
        raise ConfigError(
            f"the job has no privacy.{phase}.noise_multiplier",
            why=f"its {phase.replace('_', ' ')} runs under privacy.mechanism '{job.privacy.mechanism}'",
            fix="resolve the job's epsilons first (fedbridge-sim prepare does), or write the noise multiplier",
        )
    return value


def event(releases: Iterable[Release]) -> DpEvent:
    """The releases as dp-accounting composes them."""
    import dp_accounting

    return dp_accounting.ComposedDpEvent([_event(release) for release in releases])


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Epsilon of all releases together at `delta`, rounded up by less than 1e-3; 0 where there is none.

    Raises `ConfigError` where delta is not in (0, 1).
    """
    return _epsilon(_merged(releases), _checked(delta), 1.0)


def coarse_epsilon(releases: Iterable[Release], delta: float) -> float:
    """The same on a grid four times coarser: for searches."""
    return _epsilon(_merged(releases), _checked(delta), _COARSER)


def rdp_epsilon(plans: Iterable[Iterable[Release]], delta: float) -> float:
    """Epsilon at `delta` of plans that were chosen one after another, by Renyi's differential privacy: its orders add
    up even where a plan's parameters depend on what earlier ones released (Feldman and Zrnic 2021)."""
    return _rdp_epsilon(_merged(release for plan in plans for release in plan), _checked(delta))


def true_positive_rate(epsilon: float, delta: float, false_positives: float = FALSE_POSITIVES) -> float:
    """The best share of patients that an attacker can tell to be in the data, when `false_positives` of the others are
    taken for in it (Kairouz, Oh and Viswanath 2015): what (epsilon, delta) allows, not what an attack reaches."""
    grown = exp(min(epsilon, 700.0)) * false_positives + delta
    return min(grown, 1.0 - exp(-epsilon) * (1.0 - delta - false_positives), 1.0)


def signal_to_noise(patients: float, numbers: int, noise_multiplier: float, noises: int = 1) -> float:
    """Largest possible length of a noised sum over the expected length of its noise.

    `patients` at the bound, all in one direction, in a sum of `numbers` entries to which `noises` sources (one a site
    under `local`, one in all under `central`) add noise. The bound itself cancels. What is reached is lower, since
    patients disagree and most are below the bound.
    """
    return patients / (noise_multiplier * sqrt(numbers * noises))


def _steps(job: Job) -> int:
    """Noise additions of one train message: one at each local step, or the server's one."""
    return job.train.local_steps if job.privacy.mechanism == "local" else 1


def _training(job: Job, count: int) -> Release:
    return Release("training", "pair", needed(job, "training"), job.privacy.training.sampling_rate, count)


def _metrics(job: Job, cohort: Literal["validation", "test"], count: int) -> Release:
    return Release("metrics", cohort, needed(job, "metrics"), count=count)


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta:g} is not a probability", why="it lies in (0, 1)", fix="correct privacy.delta")
    return delta


_Terms = tuple[tuple[float, float, int], ...]
"""Noise multiplier, sampling rate and count, sorted."""


def _merged(releases: Iterable[Release]) -> _Terms:
    """The same cost with as few terms as possible: equal ones counted together, and all unsampled Gaussians as one,
    whose squared inverse noise multiplier is the sum of theirs (exact: they are one Gaussian of a longer vector)."""
    counts: dict[tuple[float, float], int] = {}
    precision = 0.0
    for release in releases:
        if release.sampling_rate == 1.0:
            precision += release.count / release.noise_multiplier**2
        else:
            key = (release.noise_multiplier, release.sampling_rate)
            counts[key] = counts.get(key, 0) + release.count
    terms = [(z, q, count) for (z, q), count in counts.items()]
    if precision:
        terms.append((precision**-0.5, 1.0, 1))
    return tuple(sorted(terms))


@lru_cache(maxsize=4096)
def _epsilon(terms: _Terms, delta: float, coarser: float) -> float:
    from dp_accounting import NeighboringRelation, pld

    if not terms:
        return 0.0
    grid = coarser * min(_WIDEST, sqrt(_PESSIMISM / sum(count for _, _, count in terms)))
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    return float(accountant.compose(_composed(terms)).get_epsilon(delta))


@lru_cache(maxsize=4096)
def _rdp_epsilon(terms: _Terms, delta: float) -> float:
    from dp_accounting import NeighboringRelation, rdp

    if not terms:
        return 0.0
    accountant = rdp.RdpAccountant(_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(_composed(terms)).get_epsilon(delta))


def _composed(terms: _Terms) -> DpEvent:
    return event(Release("training", "pair", z, q, count) for z, q, count in terms)


def _event(release: Release) -> DpEvent:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
    if release.sampling_rate < 1.0:
        gaussian = dp_accounting.PoissonSampledDpEvent(release.sampling_rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(gaussian, release.count)
