"""The weighted sum of bounded items over sites, with its noise: the first thing that the server makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.job import Job
from bridge.privacy import mechanism

if TYPE_CHECKING:
    from bridge.privacy.noise import NoiseSource

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoisedSum:
    """A noised sum, and the standard deviation of the noise in each of its numbers."""

    values: Floats
    deviation: float


def noised_sum(per_site: Mapping[str, Floats], job: Job, deviation: float, noise: NoiseSource | None) -> NoisedSum:
    """Sum of public weight times item, in the order of the site names; `per_site` holds at least one.

    `deviation` is the noise multiplier times the item's sensitivity to one patient. Where the sites add the noise
    (`local`), each has added as much and nothing is added here. Where the server does (`central`), a patient moves the
    weighted sum by no more than the sensitivity times the largest weight, so the noise is `deviation` times that.
    Raises `ValueError` where the server has to add noise and has no source of it.
    """
    names = sorted(per_site)
    weights = [job.sites.weight(name) for name in names]
    total = np.sum([weight * per_site[name] for weight, name in zip(weights, names, strict=True)], axis=0)
    if mechanism(job.privacy.mechanism).noised_at != "server":
        return NoisedSum(total, deviation * float(np.linalg.norm(weights)))
    if noise is None:
        raise ValueError(f"mechanism '{job.privacy.mechanism}' needs the server's noise")
    added = deviation * max(weights)
    return NoisedSum(total + noise.normal(total.shape, added), added)
