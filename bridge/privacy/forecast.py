"""What a private run can be expected to reach, from the public numbers of its plan: no data is looked at.

The signal of a sum over patients is their common part: `share * patients * bound`, where `share` is how much of the
bound patients have in common (of unit vectors, the square root of their mean cosine). Its noise has the expected length
`noise multiplier * bound * sqrt(numbers)`, from every site under `local`, once under `central`. Over independent
releases the ratio grows with the square root of their number. The shares and the two thresholds below were read off
experiments on the built-in cohort and on PhysioNet/CinC 2015 (docs/reference/privacy.md); they are a rule of thumb.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt
from types import MappingProxyType
from typing import Literal

from bridge.privacy.accounting import Phase, signal_to_noise

Outlook = Literal["hopeless", "doubtful", "feasible"]

SHARES: MappingProxyType[Phase, float] = MappingProxyType(
    {"probe": 0.3, "similarity": 0.3, "closed_form": 0.3, "training": 0.45}
)
"""Assumed common part of what patients (in selection: groups of them) contribute, in units of the clipping bound."""

HOPELESS, FEASIBLE = 0.75, 2.0
"""Signal-to-noise over the run: below the first little is learnt, from the second on most of what is without noise."""

TABLES = 3
"""Confusion tables that share a patient's bound in a private evaluation."""
WIDE, NARROW = 0.15, 0.05
"""Half width of the interval that the noise alone gives balanced accuracy: above the first a figure says nothing, up to
the second it says what it would without noise."""


@dataclass(frozen=True)
class Forecast:
    """The signal-to-noise ratio of one release, of all `count` of them, and what that promises.

    `patients_needed`: per site, at which the ratio reaches `FEASIBLE`, all else equal.
    """

    share: float
    one: float
    run: float
    outlook: Outlook
    patients_needed: int


def forecast(
    phase: Phase,
    noise_multiplier: float,
    numbers: int,
    *,
    patients: float,
    sites: int,
    sampling_rate: float = 1.0,
    count: int = 1,
    noised_at: Literal["site", "server"],
) -> Forecast:
    """Of a phase that releases `count` sums of so many `numbers` over about `patients` of each of `sites`.

    In selection the unit that adds up is a group, whose bound is half the sensitivity: `patients` is then the number of
    groups of a site.
    """
    bounds = patients * sampling_rate * sites * (0.5 if phase in ("probe", "similarity") else 1.0)
    noises = sites if noised_at == "site" else 1
    share = SHARES[phase]
    one = share * signal_to_noise(bounds, numbers, noise_multiplier, noises)
    run = one * sqrt(count)
    needed = ceil(patients * FEASIBLE / run - 1e-9) if run > 0 else 0
    return Forecast(share, one, run, outlook(run), needed)


def outlook(ratio: float) -> Outlook:
    """A signal-to-noise ratio over the run, in a word."""
    return "hopeless" if ratio < HOPELESS else "doubtful" if ratio < FEASIBLE else "feasible"


def metric_half_width(
    noise_multiplier: float, classes: int, *, patients: float, sites: int, noised_at: Literal["site", "server"]
) -> float:
    """About half the 95 % interval that noise alone gives a balanced accuracy near one half, with `patients` tested at
    each site: infinite where there is none.

    A row of the summed table holds about `patients / classes` of the weight, scaled by `1 / sqrt(TABLES)`; its share on
    the diagonal errs by the noise of `classes` cells, and balanced accuracy is the mean over the rows.
    """
    weight = patients * sites / sqrt(TABLES) / classes
    if weight <= 0:
        return inf
    noise = noise_multiplier * sqrt(sites if noised_at == "site" else 1)
    # Share p = 1/2 of a row: the diagonal's noise counts (1 - p), that of the other cells p each.
    per_row = noise * sqrt(0.25 + 0.25 * (classes - 1)) / weight
    return 1.96 * per_row / sqrt(classes)


def metric_outlook(half_width: float) -> Outlook:
    """How far the noise blurs a balanced accuracy, in a word."""
    return "hopeless" if half_width > WIDE else "doubtful" if half_width > NARROW else "feasible"
