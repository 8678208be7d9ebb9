"""`local`: DP-SGD at the site (Abadi et al. 2016), for those who trust neither the server nor anyone behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch

from bridge.errors import ConfigError
from bridge.privacy.accounting import Release, event
from bridge.privacy.gradients import clipped_sum
from bridge.privacy.mechanism import Batch, Plan, SiteUpdate, TrainPlan
from bridge.prototype import Arrays, PrototypeBridge

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from bridge.privacy.noise import NoiseSource


class LocalPrivacy:
    """Adam steps on noised sums of clipped gradients; the update is local minus broadcast, float32.

    For each of the plan's `local_steps` Poisson draws of patients, also for a draw of nobody:

    1. each drawn patient's gradient is clipped to the L2 norm C, and they are summed: one patient, added or removed,
       moves the sum by at most C;
    2. Gaussian noise of standard deviation z C is added to every entry;
    3. the result is divided by the plan's public divisor and given to Adam.

    The guarantee is for the patient, of all steps together, and holds for whatever is done with the update after it.
    Adam's moments start fresh and never leave; no loss is released.
    """

    name = "local"
    noised_at: Literal["nowhere", "site", "server"] = "site"

    def site_update(self, bridge: PrototypeBridge, batches: Iterable[Batch], plan: TrainPlan) -> SiteUpdate:
        """Raises `ConfigError` where the plan brings no noise, or the draws are not as many as it accounts for."""
        noise = plan.noise
        if noise is None or not plan.noise_multiplier > 0:
            raise ConfigError(
                "an update under privacy.mechanism 'local' needs noise",
                why="the plan has no source of noise, or a noise multiplier of 0",
                fix="resolve the job (fedbridge-sim prepare does), and give the site's plan its noise source",
            )
        start = bridge.arrays()
        local = copy.deepcopy(bridge).train()
        weights = {name: getattr(local, name).weight for name in local.shape.trained}
        optimiser = torch.optim.Adam(list(weights.values()), lr=plan.learning_rate)
        taken = 0
        for batch in batches:
            taken += 1
            check_draws(taken, plan, at_end=False)
            sums = clipped_sum(local, batch, plan.align, plan.clip)
            for name, weight in weights.items():
                noised = sums[name] + noise.normal(sums[name].shape, plan.noise_multiplier * plan.clip)
                weight.grad = torch.from_numpy(noised / plan.divisor).T.to(weight.dtype)
            optimiser.step()
        check_draws(taken, plan, at_end=True)
        end = local.arrays()
        return SiteUpdate(update={name: end[name] - start[name] for name in weights}, loss=None)

    def aggregate(
        self, updates: Mapping[str, Arrays], weights: Mapping[str, float], plan: Plan, noise: NoiseSource | None
    ) -> tuple[dict[str, Arrays], dict[str, float]]:
        """The updates are noised already: the strategy sees every one as it came."""
        return dict(updates), dict(weights)

    def event(self, plan: Plan) -> DpEvent:
        """`local_steps` Gaussian releases to Poisson-sampled patients."""
        return training_event(plan, plan.local_steps)


def training_event(plan: Plan, count: int) -> DpEvent:
    """`count` noised sums of the plan's clipped gradients."""
    return event((Release("training", "pair", plan.noise_multiplier, plan.sampling_rate, count),))


def check_draws(taken: int, plan: Plan, *, at_end: bool) -> None:
    """Raise `ConfigError` unless a message looks at as many draws as it is charged for."""
    if taken > plan.local_steps or (at_end and taken != plan.local_steps):
        raise ConfigError(
            f"{taken} draws of patients, where the plan accounts for {plan.local_steps}",
            why="each draw is charged to the patients' budget",
            fix="draw as many as train.local_steps",
        )
