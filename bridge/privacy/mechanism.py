"""What an update is, belongs to one object: the privacy mechanism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from bridge.job import Job

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from torch import Tensor

    from bridge.alignment import Align
    from bridge.privacy.noise import NoiseSource
    from bridge.prototype import Arrays, PrototypeBridge


@dataclass(frozen=True)
class Batch:
    """One mini-batch of a site, shaped by patient, since the patient is the unit of everything.

    `features (patients, windows, d_new)` pooled outputs of the new encoder's block `m`; `targets (patients, windows,
    tokens, width)` the old encoder's tokens that the bridge should reach; `mask (patients, windows)` True where a
    window exists.
    """

    features: Tensor
    targets: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Plan:
    """The public numbers of training, the same at the server and at every site.

    Those of a private mechanism are 0 where there is none: `clip` (C), `noise_multiplier` (z), `sampling_rate` (q),
    `divisor` of a site's sum.
    """

    learning_rate: float
    proximal_mu: float = 0.0
    local_steps: int = 1
    clip: float = 0.0
    noise_multiplier: float = 0.0
    sampling_rate: float = 0.0
    divisor: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Plan:
        """From the job; the proximal term belongs to FedProx alone."""
        mu = job.strategy.proximal_mu if job.strategy.name == "FedProx" else 0.0
        public = cls(learning_rate=job.train.learning_rate, proximal_mu=mu, local_steps=job.train.local_steps)
        if not job.privacy.private:
            return public
        asked = job.privacy.training
        return replace(
            public,
            clip=asked.clip,
            noise_multiplier=asked.noise_multiplier or 0.0,
            sampling_rate=asked.sampling_rate,
            divisor=asked.divisor,
        )


@dataclass(frozen=True, kw_only=True)
class TrainPlan(Plan):
    """A site's plan: the public numbers, how the bridge's tokens are judged, and where a site's own noise comes from
    (None under a mechanism that adds none at the site)."""

    align: Align
    noise: NoiseSource | None = None


@dataclass(frozen=True)
class SiteUpdate:
    """What one site's training gave: the update by parameter name (float32), and the mean alignment loss of its steps
    (None under a private mechanism, which releases none)."""

    update: Arrays
    loss: float | None


class Mechanism(Protocol):
    """How a site turns its batches into an update, what the server may make of the updates, and what a reply costs.

    `noised_at` says who adds the noise: nobody, the site, or the server.
    """

    name: str
    noised_at: Literal["nowhere", "site", "server"]

    def site_update(self, bridge: PrototypeBridge, batches: Iterable[Batch], plan: TrainPlan) -> SiteUpdate:
        """At the site: from the broadcast bridge (left as it is) and the round's batches to the update.

        Under a private mechanism a batch is one Poisson draw of patients, possibly of none.
        """
        ...

    def aggregate(
        self, updates: Mapping[str, Arrays], weights: Mapping[str, float], plan: Plan, noise: NoiseSource | None
    ) -> tuple[dict[str, Arrays], dict[str, float]]:
        """At the server: from the sites' updates and public weights to those that the strategy sees."""
        ...

    def event(self, plan: Plan) -> DpEvent | None:
        """What one train reply costs; None where the mechanism promises nothing."""
        ...
