"""Where the server's noise comes from under `central`: a fresh stream for every release."""

from __future__ import annotations

from bridge.job import Job
from bridge.privacy import mechanism
from bridge.privacy.noise import NoiseSource


def server_noise(job: Job, release: str, round_: int = 0) -> NoiseSource | None:
    """A stream for one release, keyed by the operating system; in simulation by the job's seed, where it has one.

    None where the server adds no noise.
    """
    if mechanism(job.privacy.mechanism).noised_at != "server":
        return None
    if job.privacy.simulation_seed is not None:
        return NoiseSource.seeded(job.privacy.simulation_seed, "server", release, round_)
    return NoiseSource.from_system()
