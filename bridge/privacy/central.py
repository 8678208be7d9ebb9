"""`central`: clipped sums from the sites, noise by the server, for those who trust the server with a site's sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from bridge.errors import ConfigError
from bridge.privacy.gradients import clipped_sum
from bridge.privacy.local import check_draws, training_event
from bridge.privacy.mechanism import Batch, Plan, SiteUpdate, TrainPlan
from bridge.prototype import Arrays, PrototypeBridge

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from bridge.privacy.noise import NoiseSource


class CentralPrivacy:
    """One gradient evaluation a message: a step of DP-SGD whose batch is spread over the sites.

    1. A site's reply is the sum of its drawn patients' gradients at the broadcast bridge, each clipped to the L2 norm
       C: one patient, added or removed, moves it by at most C. It is NOT noised: the server must be trusted with it.
    2. The server adds up the sites' sums by their public weights and adds Gaussian noise of standard deviation
       z C max(weight): one patient of any site moves that sum by at most C max(weight).
    3. Divided by the public divisor and the sum of the weights, times minus the learning rate, it is the update.

    The guarantee is for the patient, against everybody who sees only what comes after step 2. Several local steps
    without noise would have no bounded sensitivity, so there is exactly one.
    """

    name = "central"
    noised_at: Literal["nowhere", "site", "server"] = "server"

    def site_update(self, bridge: PrototypeBridge, batches: Iterable[Batch], plan: TrainPlan) -> SiteUpdate:
        """The raw sum of clipped gradients by trained parameter, float32. Raises `ConfigError` unless there is exactly
        one draw."""
        if plan.local_steps != 1:
            raise ConfigError(
                f"{plan.local_steps} local steps under privacy.mechanism 'central'",
                why="several steps without noise have no bounded sensitivity to a patient",
                fix="use train.local_steps: 1",
            )
        sums, taken = {}, 0
        for batch in batches:
            taken += 1
            check_draws(taken, plan, at_end=False)
            sums = clipped_sum(bridge, batch, plan.align, plan.clip)
        check_draws(taken, plan, at_end=True)
        return SiteUpdate(update={name: array.astype(np.float32) for name, array in sums.items()}, loss=None)

    def aggregate(
        self, updates: Mapping[str, Arrays], weights: Mapping[str, float], plan: Plan, noise: NoiseSource | None
    ) -> tuple[dict[str, Arrays], dict[str, float]]:
        """One update named `sum` with weight 1, float32: the noised step that the strategy adds to the broadcast.

        Raises `ConfigError` where there is no noise to add.
        """
        if noise is None or not plan.noise_multiplier > 0:
            raise ConfigError(
                "sums under privacy.mechanism 'central' need noise",
                why="the server has no source of noise, or the plan a noise multiplier of 0",
                fix="resolve the job (fedbridge-sim prepare does), and give the server its noise source",
            )
        sites = sorted(updates)
        deviation = plan.noise_multiplier * plan.clip * max(weights[site] for site in sites)
        scale = -plan.learning_rate / (plan.divisor * sum(weights[site] for site in sites))
        step: Arrays = {}
        for name in updates[sites[0]]:
            total = np.sum([weights[site] * updates[site][name].astype(np.float64) for site in sites], axis=0)
            step[name] = ((total + noise.normal(total.shape, deviation)) * scale).astype(np.float32)
        return {"sum": step}, {"sum": 1.0}

    def event(self, plan: Plan) -> DpEvent:
        """One Gaussian release to Poisson-sampled patients, at whichever site they are."""
        return training_event(plan, 1)
