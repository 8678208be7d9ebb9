"""The local and the central mechanism: steps, noise of the claimed scale, sensitivity, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats

from bridge.alignment import Align, aligner
from bridge.encoders.compact import CompactEncoder
from bridge.errors import ConfigError
from bridge.job import AlignmentJob
from bridge.privacy import Batch, CentralPrivacy, LocalPrivacy, TrainPlan, mechanism
from bridge.privacy.noise import NoiseSource
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape

from .made import Sums, length, made_batch, made_bridge, microbatches

SHAPE = BridgeShape(width_new=8, rank=3, tokens_old=10, prototypes=4, width_old=16)
FROZEN = BridgeShape(8, 2, 10, 4, 16, cosines=3, components=5, constant=True, frozen_prototypes=True)
WIDE = BridgeShape(width_new=60, rank=20, tokens_old=10, prototypes=30, width_old=16)


def align(encoder: CompactEncoder) -> Align:
    return aligner(AlignmentJob(), encoder, 1)


def plan(encoder: CompactEncoder, **more: object) -> TrainPlan:
    numbers: dict[str, object] = {
        "learning_rate": 1e-2,
        "local_steps": 1,
        "clip": 0.15,
        "noise_multiplier": 2.0,
        "sampling_rate": 0.5,
        "divisor": 4.0,
        "align": align(encoder),
        "noise": NoiseSource.seeded(1),
    }
    return TrainPlan(**(numbers | more))  # type: ignore[arg-type]


def silent(encoder: CompactEncoder, **more: object) -> TrainPlan:
    """Noise too small to be seen in float32."""
    return plan(encoder, noise_multiplier=1e-12, **more)


def nobody(shape: BridgeShape, windows: int = 4) -> Batch:
    return made_batch(shape, 0, windows)


def draws(shape: BridgeShape, count: int = 5) -> list[Batch]:
    """Of 6, 1, 0, 7, ... patients; one of them without a window."""
    found = [made_batch(shape, patients, 4, seed) for seed, patients in enumerate((6, 1, 0, 7, 5)[:count])]
    found[0].mask[1] = False
    return found


def by_opacus(bridge: PrototypeBridge, batches: list[Batch], p: TrainPlan) -> Sums:
    """The update of Opacus' own optimiser with the plan's numbers and no noise."""
    wrapped = GradSampleModule(copy.deepcopy(bridge), loss_reduction="sum", strict=True)
    parameters = [w for w in wrapped.parameters() if w.requires_grad]
    optimiser = DPOptimizer(
        torch.optim.Adam(parameters, lr=p.learning_rate),
        noise_multiplier=0.0,
        max_grad_norm=p.clip,
        expected_batch_size=p.divisor,  # type: ignore[arg-type]
        loss_reduction="mean",
    )
    for batch in batches:
        optimiser.zero_grad()
        p.align(wrapped(batch.features.requires_grad_()), batch).sum().backward()
        optimiser.step()
    local = wrapped.to_standard_module()
    return {n: local.arrays()[n] - bridge.arrays()[n].astype(np.float64) for n in bridge.shape.trained}


@pytest.mark.parametrize("shape", [SHAPE, FROZEN], ids=["prototype", "factored"])
def test_local_steps_are_those_of_opacus_optimiser(encoder: CompactEncoder, shape: BridgeShape) -> None:
    bridge, batches = made_bridge(shape), draws(shape)
    p = silent(encoder, local_steps=5)
    found = LocalPrivacy().site_update(bridge, batches, p)
    # Opacus can't take a draw of nobody through the suffix: one patient without windows is the same.
    empty = made_batch(shape, 1, 4, present=0.0)
    expected = by_opacus(bridge, [empty if not len(b.mask) else b for b in batches], p)
    assert found.loss is None
    assert tuple(found.update) == shape.trained
    for name, array in found.update.items():
        assert array.dtype == np.float32
        # Opacus clips at C / (norm + 1e-6), and Adam magnifies rounding where gradients are tiny.
        np.testing.assert_allclose(array, expected[name], atol=2e-4)
        assert np.abs(array).max() > 1e-2


def test_local_steps_by_hand(encoder: CompactEncoder) -> None:
    """Adam on the noised sums, with the seeded noise drawn a second time in the order of the parameters."""
    bridge, batches = made_bridge(SHAPE), draws(SHAPE, 3)
    p = plan(encoder, local_steps=3, noise_multiplier=0.7)
    found = LocalPrivacy().site_update(bridge, batches, p).update
    noise, work = NoiseSource.seeded(1), copy.deepcopy(bridge)
    start = {n: a.astype(np.float64) for n, a in bridge.arrays().items()}
    now, m, v = dict(start), {n: 0.0 * a for n, a in start.items()}, {n: 0.0 * a for n, a in start.items()}
    for step, batch in enumerate(batches, start=1):
        work.load_arrays(now)
        sums, _ = microbatches(work, batch, p.align, p.clip)
        for name in ("A", "B", "P"):
            g = (sums[name] + noise.normal(sums[name].shape, 0.7 * p.clip)) / p.divisor
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            move = (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
            now[name] = now[name] - p.learning_rate * move
    for name, array in found.items():
        np.testing.assert_allclose(array, now[name] - start[name], atol=2e-5)


def noise_of_adam(update: Sums, rate: float) -> np.ndarray:
    """The gradient of Adam's first step, `-rate g / (|g| + 1e-8)`, found back from the step."""
    u = np.concatenate([array.ravel() for array in update.values()]) / -rate
    return 1e-8 * u / (1 - np.abs(u))


def rejects(found: np.ndarray, scale: float) -> None:
    assert found.size > 3000
    assert stats.kstest(found, stats.norm(scale=scale).cdf).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(found, stats.norm(scale=wrong * scale).cdf).pvalue < 1e-12


@pytest.mark.parametrize("people", [0, 3])
def test_local_noise_has_the_claimed_scale(encoder: CompactEncoder, people: int) -> None:
    """Of a draw of nobody, and of patients without windows: the noise alone is what leaves."""
    divisor = 0.15 * 2.0 / 1e-8  # the noised gradient is then about as large as Adam's 1e-8, which makes it visible
    p = plan(encoder, learning_rate=1.0, divisor=divisor, noise=NoiseSource.from_system())
    batch = made_batch(WIDE, people, 4, present=0.0)
    start = made_bridge(WIDE, scale=1e-3)
    found = LocalPrivacy().site_update(start, [batch], p).update
    rejects(noise_of_adam({n: a.astype(np.float64) for n, a in found.items()}, 1.0), 2.0 * 0.15 / divisor)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.25, "b": 0.5, "c": 0.1}])
def test_central_noise_has_the_claimed_scale(encoder: CompactEncoder, weights: dict[str, float]) -> None:
    p = plan(encoder, learning_rate=0.3)
    zeros = {n: np.zeros(s, np.float32) for n, s in WIDE.arrays().items()}
    seen, shares = CentralPrivacy().aggregate(dict.fromkeys(weights, zeros), weights, p, NoiseSource.from_system())
    assert shares == {"sum": 1.0}
    found = np.concatenate([array.ravel() for array in seen["sum"].values()])
    scale = 2.0 * 0.15 * max(weights.values()) * 0.3 / (4.0 * sum(weights.values()))
    rejects(found, scale)
    assert found.std() == pytest.approx(scale, rel=0.05)


def test_two_releases_never_have_the_same_noise(encoder: CompactEncoder) -> None:
    p, zeros = plan(encoder), {"A": np.zeros((40, 40), np.float32)}
    drawn = []
    for _ in range(2):
        seen, _ = CentralPrivacy().aggregate({"a": zeros, "b": zeros}, {"a": 1, "b": 1}, p, NoiseSource.from_system())
        drawn.append(seen["sum"]["A"].ravel())
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.15


def test_central_is_one_step_on_the_weighted_sum(encoder: CompactEncoder) -> None:
    bridge, weights = made_bridge(FROZEN), {"b": 0.5, "a": 1.0}
    batches = {"a": made_batch(FROZEN, 6, 4), "b": made_batch(FROZEN, 3, 4, 1)}
    p, rule = silent(encoder), CentralPrivacy()
    replies = {site: rule.site_update(bridge, [batch], p) for site, batch in batches.items()}
    sums = {site: microbatches(bridge, batch, p.align, p.clip)[0] for site, batch in batches.items()}
    for site, reply in replies.items():
        assert reply.loss is None
        assert tuple(reply.update) == ("A", "B")
        for name, array in reply.update.items():
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, sums[site][name], atol=1e-6)
    seen, _ = rule.aggregate({site: reply.update for site, reply in replies.items()}, weights, p, NoiseSource.seeded(0))
    for name, array in seen["sum"].items():
        assert array.dtype == np.float32
        expected = -1e-2 * (sums["a"][name] + 0.5 * sums["b"][name]) / (4.0 * 1.5)
        np.testing.assert_allclose(array, expected, atol=1e-8)
        assert np.abs(expected).max() > 1e-5


def test_one_patient_moves_a_central_reply_by_at_most_the_bound(encoder: CompactEncoder) -> None:
    bridge, p, rule = made_bridge(SHAPE), plan(encoder, clip=0.05), CentralPrivacy()
    for people in (1, 2, 5):
        batch = made_batch(SHAPE, people, 4, present=1.0)
        fewer = Batch(batch.features[1:], batch.targets[1:], batch.mask[1:])
        one, other = (rule.site_update(bridge, [b], p).update for b in (batch, fewer))
        moved = length({n: one[n].astype(np.float64) - other[n] for n in one})
        assert 0.999 * 0.05 < moved <= 0.05
        assert {n: (a.shape, a.dtype) for n, a in one.items()} == {n: (a.shape, a.dtype) for n, a in other.items()}


def test_one_patient_of_any_site_moves_the_weighted_sum_by_at_most_what_the_noise_stands_for(
    encoder: CompactEncoder,
) -> None:
    bridge, p, rule, weights = made_bridge(SHAPE), silent(encoder), CentralPrivacy(), {"a": 0.3, "b": 0.9}
    sums = {s: rule.site_update(bridge, [made_batch(SHAPE, 5, 4, i)], p).update for i, s in enumerate(weights)}
    moved = []
    for i, site in enumerate(weights):
        batch = made_batch(SHAPE, 5, 4, i)
        fewer = Batch(batch.features[1:], batch.targets[1:], batch.mask[1:])
        others = sums | {site: rule.site_update(bridge, [fewer], p).update}
        one, other = (rule.aggregate(u, weights, p, NoiseSource.seeded(3))[0]["sum"] for u in (sums, others))
        step = length({n: one[n].astype(np.float64) - other[n] for n in one})
        moved.append(step * p.divisor * sum(weights.values()) / p.learning_rate)
    assert max(moved) <= p.clip * 0.9 * (1 + 1e-5)
    assert max(moved) > 0.5 * p.clip * 0.9


@pytest.mark.parametrize("name", ["local", "central"])
def test_a_site_of_nobody_answers_like_any_other(encoder: CompactEncoder, name: str) -> None:
    bridge, rule = made_bridge(SHAPE), mechanism(name)
    full = rule.site_update(bridge, [made_batch(SHAPE, 4, 4)], plan(encoder)).update
    none = rule.site_update(bridge, [nobody(SHAPE)], plan(encoder)).update
    assert {n: (a.shape, a.dtype) for n, a in full.items()} == {n: (a.shape, a.dtype) for n, a in none.items()}
    assert any(array.any() for array in none.values()) == (name == "local")


def test_the_broadcast_bridge_stays_as_it_is_and_local_updates_pass_the_server_unchanged(
    encoder: CompactEncoder,
) -> None:
    bridge = made_bridge(SHAPE)
    before = bridge.arrays()
    updates = {}
    for name in ("local", "central"):
        updates[name] = mechanism(name).site_update(bridge, [made_batch(SHAPE, 4, 4)], plan(encoder)).update
        for key, array in before.items():
            np.testing.assert_array_equal(bridge.arrays()[key], array)
    weights = {"local": 0.5, "central": 1.0}
    seen, kept = LocalPrivacy().aggregate(updates, weights, plan(encoder), None)
    assert kept == weights
    assert seen.keys() == updates.keys()
    assert all(seen[site] is updates[site] for site in updates)


def test_one_bad_patient_does_not_poison_a_step(encoder: CompactEncoder) -> None:
    batch = made_batch(SHAPE, 5, 4, present=1.0)
    rest = torch.arange(5) != 2
    good = Batch(batch.features[rest], batch.targets[rest], batch.mask[rest])
    batch.features[2, 0] = float("nan")
    for name in ("local", "central"):
        found, expected = (
            mechanism(name).site_update(made_bridge(SHAPE), [b], plan(encoder, noise=NoiseSource.seeded(2))).update
            for b in (batch, good)
        )
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-6)


def test_what_a_reply_costs(encoder: CompactEncoder) -> None:
    p = plan(encoder, local_steps=7)
    one = PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0))
    assert LocalPrivacy().event(p).events == [SelfComposedDpEvent(one, 7)]
    assert CentralPrivacy().event(p).events == [SelfComposedDpEvent(one, 1)]
    assert (mechanism("local").noised_at, mechanism("central").noised_at) == ("site", "server")
    assert (mechanism("local").name, mechanism("central").name) == ("local", "central")


def test_noise_is_never_left_out(encoder: CompactEncoder) -> None:
    bridge, batch = made_bridge(SHAPE), made_batch(SHAPE, 2, 4)
    update = {"a": {"A": np.zeros((2, 2), np.float32)}}
    for wrong in ({"noise": None}, {"noise_multiplier": 0.0}):
        with pytest.raises(ConfigError, match="needs noise"):
            LocalPrivacy().site_update(bridge, [batch], plan(encoder, **wrong))
    with pytest.raises(ConfigError, match="need noise"):
        CentralPrivacy().aggregate(update, {"a": 1.0}, plan(encoder), None)
    with pytest.raises(ConfigError, match="need noise"):
        CentralPrivacy().aggregate(update, {"a": 1.0}, plan(encoder, noise_multiplier=0.0), NoiseSource.seeded(0))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_message_looks_at_as_many_draws_as_it_is_charged_for(encoder: CompactEncoder, taken: int) -> None:
    batches, p = [made_batch(SHAPE, 2, 4)] * taken, plan(encoder, local_steps=2)
    with pytest.raises(ConfigError, match=f"{taken} draws of patients, where the plan accounts for 2"):
        LocalPrivacy().site_update(made_bridge(SHAPE), batches, p)
    with pytest.raises(ConfigError, match="2 local steps"):
        CentralPrivacy().site_update(made_bridge(SHAPE), batches, p)
    if taken != 1:
        with pytest.raises(ConfigError, match="draws of patients, where the plan accounts for 1"):
            CentralPrivacy().site_update(made_bridge(SHAPE), batches, dataclasses.replace(p, local_steps=1))
