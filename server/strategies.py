"""Flower's strategies by name, as one step: broadcast and updates in, next broadcast out, always float32.

What Flower does around that step is done elsewhere: replies are checked before, and no metric goes through Flower's own
averaging, since a strategy would end the run on a reply whose metrics differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx, FedTrimmedAvg, FedYogi, Krum

from bridge.job import StrategyJob
from bridge.messages import ARRAYS, METRICS, TRAIN
from bridge.prototype import Arrays
from server.errors import RunError

_BUILD: dict[str, Callable[[StrategyJob], FedAvg]] = {
    "FedAvg": lambda job: FedAvg(weighted_by_key="weight"),
    "FedProx": lambda job: FedProx(weighted_by_key="weight", proximal_mu=job.proximal_mu),
    "FedAdam": lambda job: FedAdam(weighted_by_key="weight", eta=job.server_learning_rate),
    "FedYogi": lambda job: FedYogi(weighted_by_key="weight", eta=job.server_learning_rate),
    "FedMedian": lambda job: FedMedian(weighted_by_key="weight"),
    "FedTrimmedAvg": lambda job: FedTrimmedAvg(weighted_by_key="weight", beta=job.trim),
    "Krum": lambda job: Krum(weighted_by_key="weight", num_malicious_nodes=job.malicious_sites),
}


class Aggregator:
    """One of Flower's strategies; FedAdam and FedYogi keep their moments from round to round (`state`, `restore`)."""

    def __init__(self, job: StrategyJob) -> None:
        self._strategy = _BUILD[job.name](job)

    def aggregate(
        self, round_: int, broadcast: Arrays, updates: Mapping[str, Arrays], weights: Mapping[str, float]
    ) -> Arrays:
        """The next broadcast, float32, from this round's `updates` (site to local minus broadcast).

        Sites are added up in the order of their names. `round_` is the true round, also after a resume: FedAdam's bias
        correction depends on it. FedMedian and FedTrimmedAvg have no use for `weights`. Raises `RunError` where the
        result is not finite.
        """
        strategy = self._strategy
        if isinstance(strategy, FedAdam | FedYogi):
            strategy.current_arrays = dict(broadcast)
        replies = [_as_reply(broadcast, updates[site], weights[site]) for site in sorted(updates)]
        arrays, _ = strategy.aggregate_train(round_, replies)
        assert arrays is not None  # there is at least one reply
        # FedAdam and FedMedian answer in float64 for float32.
        result = {name: arrays[name].numpy().astype(np.float32) for name in broadcast}
        if not all(np.isfinite(array).all() for array in result.values()):
            raise RunError(
                f"round {round_}: the aggregated bridge is not finite",
                why="the strategy's step has overflowed float32",
                fix="lower the learning rates in a new job",
            )
        return result

    def state(self) -> dict[str, Arrays]:
        """The server optimiser's moments by name, for a checkpoint; empty where there are none (yet)."""
        if not isinstance(self._strategy, FedAdam | FedYogi):
            return {}
        found = {"m_t": self._strategy.m_t, "v_t": self._strategy.v_t}
        return {name: dict(value) for name, value in found.items() if value}

    def restore(self, state: Mapping[str, Arrays]) -> None:
        """Go on with the moments of a checkpoint, or of before a round that did not count."""
        if isinstance(self._strategy, FedAdam | FedYogi):
            self._strategy.m_t = dict(state["m_t"]) if "m_t" in state else None
            self._strategy.v_t = dict(state["v_t"]) if "v_t" in state else None


def cautions(job: StrategyJob, sites: int) -> list[str]:
    """What a strategy does not do with so few sites, in words for the log."""
    if job.name == "FedTrimmedAvg" and int(job.trim * sites) == 0:
        return [f"trim {job.trim:g} of {sites} sites cuts none: this is a plain mean"]
    if job.name == "Krum" and sites < 2 * job.malicious_sites + 3:
        return [f"Krum promises nothing against {job.malicious_sites} malicious of {sites} sites: 2f + 3 are needed"]
    return []


def _as_reply(broadcast: Arrays, update: Arrays, weight: float) -> Message:
    """What Flower's strategies want to see: the site's parameters and exactly one weight."""
    arrays = ArrayRecord({name: Array(broadcast[name] + update[name]) for name in broadcast})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({"weight": weight})})
    return Message(content, dst_node_id=0, message_type=TRAIN)
