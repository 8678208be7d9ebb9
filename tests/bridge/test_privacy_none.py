"""The plain mechanism: what its update is, that it is fresh each time, and FedProx's term."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge.alignment import aligner
from bridge.encoders.compact import CompactEncoder
from bridge.errors import ConfigError
from bridge.job import AlignmentJob, Job, Models, StrategyJob, TrainJob
from bridge.privacy import Batch, NoPrivacy, Plan, TrainPlan, mechanism
from bridge.prototype import PrototypeBridge, initial_arrays
from bridge.shape import BridgeShape

SHAPE = BridgeShape(width_new=8, rank=2, tokens_old=10, prototypes=4, width_old=16)


def batches(encoder: CompactEncoder, count: int = 12, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        x = torch.randn(4 * 3, 1, 100, generator=generator).cumsum(dim=-1) / 5
        features = x.squeeze(1).unfold(1, 13, 12).mean(dim=-1)[:, :8].unflatten(0, (4, 3))
        targets = encoder.prefix(x, 2).unflatten(0, (4, 3))
        mask = torch.rand(4, 3, generator=generator) > 0.3
        mask[3] = False
        out.append(Batch(features, targets, mask))
    return out


def start(seed: int = 0) -> PrototypeBridge:
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(initial_arrays(SHAPE, seed))
    return bridge


def plan(encoder: CompactEncoder, mu: float = 0.0, rate: float = 1e-2) -> TrainPlan:
    return TrainPlan(learning_rate=rate, proximal_mu=mu, align=aligner(AlignmentJob(), encoder, 1))


def by_hand(bridge: PrototypeBridge, data: list[Batch], p: TrainPlan) -> tuple[dict[str, np.ndarray], list[float]]:
    """Adam (Kingma and Ba 2015, algorithm 1) written out on the method's matrices."""
    weights = {n: torch.tensor(a, requires_grad=True) for n, a in bridge.arrays().items()}
    first = {n: w.detach().clone() for n, w in weights.items()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    losses = []
    for step, batch in enumerate(data, start=1):
        tokens = (batch.features @ weights["A"] @ weights["B"]).unflatten(-1, (10, 4)) @ weights["P"]
        present = int(batch.mask.any(dim=1).sum())
        loss = p.align(tokens, batch).sum() / present
        losses.append(loss.item())
        proximal = sum(((w - first[n]) ** 2).sum() for n, w in weights.items())
        gradients = torch.autograd.grad(loss + p.proximal_mu / 2 * proximal, list(weights.values()))
        with torch.no_grad():
            for (name, weight), g in zip(weights.items(), gradients, strict=True):
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                move = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                weight -= p.learning_rate * move
    return {n: (w.detach() - first[n]).numpy() for n, w in weights.items()}, losses


@pytest.mark.parametrize("mu", [0.0, 5.0])
def test_the_update_is_local_adam_minus_broadcast(encoder: CompactEncoder, mu: float) -> None:
    bridge, data, p = start(), batches(encoder), plan(encoder, mu)
    result = NoPrivacy().site_update(bridge, data, p)
    expected, losses = by_hand(bridge, data, p)
    for name, array in result.update.items():
        assert array.dtype == np.float32
        # Adam divides by the root of tiny second moments, so rounding shows in the last digits of single weights.
        np.testing.assert_allclose(array, expected[name], atol=2e-5)
        assert np.abs(array).max() > 5e-3
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_rounds_on_the_same_batches_lower_the_loss(encoder: CompactEncoder) -> None:
    bridge, data, losses = start(), batches(encoder), []
    for _ in range(6):
        result = NoPrivacy().site_update(bridge, data, plan(encoder))
        bridge.load_arrays({n: a + result.update[n] for n, a in bridge.arrays().items()})
        losses.append(result.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_the_broadcast_bridge_stays_as_it_is(encoder: CompactEncoder) -> None:
    bridge = start()
    before = bridge.arrays()
    NoPrivacy().site_update(bridge, batches(encoder, 3), plan(encoder))
    for name, array in before.items():
        np.testing.assert_array_equal(bridge.arrays()[name], array)


def test_each_call_starts_fresh_and_gives_the_same_bits(encoder: CompactEncoder) -> None:
    torch.set_num_threads(1)
    data, rule = batches(encoder), NoPrivacy()
    first = rule.site_update(start(), data, plan(encoder))
    again = rule.site_update(start(), data, plan(encoder))
    other = mechanism("none").site_update(start(), iter(data), plan(encoder))
    for result in (again, other):
        assert result.loss == first.loss
        for name, array in first.update.items():
            np.testing.assert_array_equal(result.update[name], array)


def test_two_rounds_differ_from_one_round_of_twice_the_steps(encoder: CompactEncoder) -> None:
    """The optimiser is fresh each round: its moments must not live on."""
    data, rule, p = batches(encoder), NoPrivacy(), plan(encoder)
    whole = rule.site_update(start(), data, p).update
    bridge = start()
    half = rule.site_update(bridge, data[:6], p).update
    bridge.load_arrays({n: a + half[n] for n, a in bridge.arrays().items()})
    rest = rule.site_update(bridge, data[6:], p).update
    assert np.abs(half["B"] + rest["B"] - whole["B"]).max() > 1e-3


def test_the_proximal_term_holds_the_bridge_near_its_start(encoder: CompactEncoder) -> None:
    data = batches(encoder, 40)
    lengths = []
    for mu in (0.0, 1.0, 100.0):
        update = NoPrivacy().site_update(start(), data, plan(encoder, mu, rate=5e-3)).update
        lengths.append(float(np.sqrt(sum((array**2).sum() for array in update.values()))))
    assert lengths[0] > 1.1 * lengths[1] > 1.21 * lengths[2]


def test_a_batch_of_nobody_moves_nothing(encoder: CompactEncoder) -> None:
    empty = [Batch(b.features, b.targets, torch.zeros_like(b.mask)) for b in batches(encoder, 2)]
    result = NoPrivacy().site_update(start(), empty, plan(encoder))
    assert result.loss == 0.0
    assert all(not array.any() for array in result.update.values())


def test_the_server_sees_updates_as_they_came_and_nothing_is_accounted(encoder: CompactEncoder) -> None:
    updates = {f"site{seed}": initial_arrays(SHAPE, seed) for seed in range(3)}
    weights = {"site0": 1.0, "site1": 0.5, "site2": 1.0}
    seen, kept = NoPrivacy().aggregate(updates, weights, Plan(learning_rate=1e-3), None)
    assert kept == weights
    assert all(seen[site] is updates[site] for site in updates)
    assert seen.keys() == updates.keys()
    assert NoPrivacy().event(Plan(learning_rate=1e-3)) is None
    assert mechanism("none").name == "none"


def test_the_plan_follows_the_job() -> None:
    models = Models(old_encoder="a", new_encoder="b", task_head="c")
    job = Job(name="j", models=models, train=TrainJob(learning_rate=0.5), strategy=StrategyJob(proximal_mu=0.3))
    assert Plan.of(job) == Plan(learning_rate=0.5, proximal_mu=0.0, local_steps=20)
    job = job.model_copy(update={"strategy": StrategyJob(name="FedProx", proximal_mu=0.3)})
    assert Plan.of(job) == Plan(learning_rate=0.5, proximal_mu=0.3, local_steps=20)


def test_an_unknown_mechanism_is_refused() -> None:
    with pytest.raises(ConfigError, match="'secret' is unknown"):
        mechanism("secret")
