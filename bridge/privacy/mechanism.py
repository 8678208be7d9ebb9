"""What an update is, belongs to one object: the privacy mechanism."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bridge.alignment import Align
from bridge.job import Job
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
    """The public numbers of training, the same at the server and at every site."""

    learning_rate: float
    proximal_mu: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Plan:
        """From the job; the proximal term belongs to FedProx alone."""
        mu = job.strategy.proximal_mu if job.strategy.name == "FedProx" else 0.0
        return cls(learning_rate=job.train.learning_rate, proximal_mu=mu)


@dataclass(frozen=True, kw_only=True)
class TrainPlan(Plan):
    """A site's plan: the public numbers, and how the bridge's tokens are judged."""

    align: Align


@dataclass(frozen=True)
class SiteUpdate:
    """What one site's training gave: the update by parameter name (float32), and the mean alignment loss of its
    steps."""

    update: Arrays
    loss: float


class Mechanism(Protocol):
    """How a site turns its batches into an update, what the server may make of the updates, and what a reply costs."""

    name: str

    def site_update(self, bridge: PrototypeBridge, batches: Iterable[Batch], plan: TrainPlan) -> SiteUpdate:
        """At the site: from the broadcast bridge (left as it is) and the round's batches to the update."""
        ...

    def aggregate(self, updates: list[Arrays], plan: Plan) -> list[Arrays]:
        """At the server: from the updates as they came to those that the strategy sees."""
        ...

    def event(self, plan: Plan) -> Any:
        """What one reply costs, a dp-accounting DpEvent; None where the mechanism promises nothing."""
        ...
