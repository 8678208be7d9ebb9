"""No privacy mechanism: the plain update of local training. It hides nothing from the server (docs/threat-model.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bridge.privacy.mechanism import Batch, Plan, SiteUpdate, TrainPlan
from bridge.prototype import Arrays, PrototypeBridge

if TYPE_CHECKING:
    from bridge.privacy.noise import NoiseSource


class NoPrivacy:
    """Local Adam steps from the broadcast bridge; the update is local minus broadcast, float32.

    The optimiser is new in every call, so a round depends on the broadcast and the batches alone, and a resumed run
    equals an unbroken one. A step's loss is the mean over the batch's patients that have a window. With one torch
    thread the result is the same to the last bit each time.
    """

    name = "none"
    noised_at: Literal["nowhere", "site", "server"] = "nowhere"

    def site_update(self, bridge: PrototypeBridge, batches: Iterable[Batch], plan: TrainPlan) -> SiteUpdate:
        """One Adam step a batch; with `proximal_mu > 0` FedProx's term `mu/2 |w - broadcast|^2` is added to the
        loss."""
        start = bridge.arrays()
        local = copy.deepcopy(bridge).train()
        broadcast = [weight.detach().clone() for weight in local.parameters()]
        optimiser = torch.optim.Adam(local.parameters(), lr=plan.learning_rate)
        losses: list[float] = []
        for batch in batches:
            per_patient = plan.align(local(batch.features), batch)
            loss = per_patient.sum() / batch.mask.any(dim=1).sum().clamp(min=1)
            losses.append(float(loss.detach()))
            if plan.proximal_mu > 0:
                loss = loss + plan.proximal_mu / 2 * _distance(list(local.parameters()), broadcast)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        end = local.arrays()
        return SiteUpdate(
            update={name: end[name] - start[name] for name in bridge.shape.trained},
            loss=sum(losses) / max(1, len(losses)),
        )

    def aggregate(
        self, updates: Mapping[str, Arrays], weights: Mapping[str, float], plan: Plan, noise: NoiseSource | None
    ) -> tuple[dict[str, Arrays], dict[str, float]]:
        """The strategy sees every site's update as it came."""
        return dict(updates), dict(weights)

    def event(self, plan: Plan) -> None:
        """Nothing is promised, so nothing is accounted."""
        return None


def _distance(weights: list[torch.nn.Parameter], broadcast: list[Tensor]) -> Tensor:
    return torch.stack([(w - b).square().sum() for w, b in zip(weights, broadcast, strict=True)]).sum()
