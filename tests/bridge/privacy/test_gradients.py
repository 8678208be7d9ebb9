"""Sums of clipped gradients by each method, against a loop over patients on the method's formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.alignment import Align, aligner
from bridge.compute import Compute
from bridge.encoders.compact import CompactEncoder
from bridge.encoders.placed import PlacedEncoder
from bridge.job import AlignmentJob
from bridge.privacy import Batch, gradients
from bridge.privacy.gradients import Method, clipped_sum
from bridge.shape import BridgeShape

from .made import Sums, length, made_batch, made_bridge, microbatches, one_gradient, only

METHODS: tuple[Method, ...] = ("ghost", "materialised", "loop")
PLAIN = BridgeShape(width_new=6, rank=3, tokens_old=5, prototypes=4, width_old=7)
FACTORED = BridgeShape(8, 2, 10, 4, 16, cosines=3, components=5, constant=True, frozen_prototypes=True)
BETWEEN = 0.17
"""A bound between the norms of the patients' gradients through the suffix."""
DEEP = dataclasses.replace(PLAIN, width_new=8, tokens_old=10, width_old=16)


def shallow(loss: str, encoder: CompactEncoder) -> Align:
    spec: Any = {"layer": "bridge", "loss": loss, "negatives": "patient"}
    return aligner(AlignmentJob(**spec), encoder, 1)


def deep(encoder: CompactEncoder) -> Align:
    return aligner(AlignmentJob(), encoder, 1)


def agree(found: Sums, expected: Sums, scale: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float64
        assert array.shape == expected[name].shape
    assert length({name: found[name] - expected[name] for name in found}) <= 1e-5 * scale


@st.composite
def shapes(draw: Any) -> BridgeShape:
    tokens, width = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    return BridgeShape(
        width_new=width,
        rank=draw(st.integers(1, 4)),
        tokens_old=tokens,
        prototypes=draw(st.integers(1, 6)),
        width_old=draw(st.integers(2, 8)),
        cosines=draw(st.sampled_from([0, 1, tokens])),
        components=draw(st.sampled_from([0, 1, width])),
        constant=draw(st.booleans()),
        frozen_prototypes=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes(),
    patients=st.integers(0, 6),
    windows=st.integers(1, 6),
    present=st.sampled_from([0.0, 0.4, 1.0]),
    loss=st.sampled_from(["cosine", "mse", "l1", "infonce"]),
    share=st.floats(0.1, 3.0),
    seed=st.integers(0, 2**16),
)
def test_every_method_equals_the_loop_over_patients(
    encoder: CompactEncoder,
    shape: BridgeShape,
    patients: int,
    windows: int,
    present: float,
    loss: str,
    share: float,
    seed: int,
) -> None:
    bridge, batch = made_bridge(shape, seed), made_batch(shape, patients, windows, seed, present)
    align = shallow(loss, encoder)
    _, norms = microbatches(bridge, batch, align, 1.0)
    # A bound among the norms that occur, so that some patients are clipped and others are not.
    clip = share * float(np.median(norms)) if norms and np.median(norms) > 0 else share
    expected, _ = microbatches(bridge, batch, align, clip)
    scale = sum(min(clip, norm) for norm in norms)
    for method in METHODS:
        agree(clipped_sum(bridge, batch, align, clip, method), expected, scale)


@pytest.mark.parametrize("shape", [DEEP, FACTORED], ids=["prototype", "factored"])
@pytest.mark.parametrize("patients", [0, 1, 9])
def test_through_the_frozen_suffix(encoder: CompactEncoder, shape: BridgeShape, patients: int) -> None:
    bridge, batch = made_bridge(shape), made_batch(shape, patients, 4)
    if patients > 1:
        batch.mask[2] = False
    expected, norms = microbatches(bridge, batch, deep(encoder), BETWEEN)
    assert patients < 9 or min(n for n in norms if n) < BETWEEN < max(norms)
    for method in METHODS:
        agree(clipped_sum(bridge, batch, deep(encoder), BETWEEN, method), expected, sum(min(BETWEEN, n) for n in norms))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 100_000, 10**12])
def test_memory_changes_no_gradient(encoder: CompactEncoder, method: Method, budget: int) -> None:
    bridge, batch = made_bridge(DEEP), made_batch(DEEP, 9, 4)
    expected, norms = microbatches(bridge, batch, deep(encoder), BETWEEN)
    align = aligner(AlignmentJob(), PlacedEncoder(encoder, Compute(budget)), 1)
    agree(clipped_sum(bridge, batch, align, BETWEEN, method), expected, sum(min(BETWEEN, n) for n in norms))
    if budget == 10**12:
        plain = clipped_sum(bridge, batch, deep(encoder), BETWEEN, method)
        found = clipped_sum(bridge, batch, align, BETWEEN, method)
        assert all(np.array_equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("method", METHODS)
def test_no_patient_moves_the_sum_by_more_than_the_bound(encoder: CompactEncoder, method: Method) -> None:
    bridge, batch, align = made_bridge(DEEP, scale=3.0), made_batch(DEEP, 6, 3), deep(encoder)
    clip = 1e-3
    whole = clipped_sum(bridge, batch, align, clip, method)
    moved = []
    for patient in range(6):
        rest = torch.arange(6) != patient
        neighbour = Batch(batch.features[rest], batch.targets[rest], batch.mask[rest])
        without = clipped_sum(bridge, neighbour, align, clip, method)
        moved.append(length({name: whole[name] - without[name] for name in whole}))
    assert max(moved) <= clip
    assert max(moved) > 0.999 * clip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", ["features", "targets"])
def test_a_patient_whose_gradient_is_not_finite_counts_as_zero(
    encoder: CompactEncoder, method: Method, bad: float, place: str
) -> None:
    bridge, batch = made_bridge(DEEP), made_batch(DEEP, 5, 3, present=1.0)
    rest = torch.tensor([True, True, False, True, True])
    good = Batch(batch.features[rest], batch.targets[rest], batch.mask[rest])
    expected, norms = microbatches(bridge, good, shallow("mse", encoder), 0.5)
    getattr(batch, place)[2, 1] = bad
    found = clipped_sum(bridge, batch, shallow("mse", encoder), 0.5, method)
    if length({n: found[n] - expected[n] for n in found}) <= 1e-5 * sum(norms):
        return
    # A huge finite value may leave a finite gradient: that one is clipped like any other.
    assert bad == 1e30
    assert length({n: found[n] - expected[n] for n in found}) <= 0.5


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_behind_the_mask_does_not_matter(encoder: CompactEncoder, method: Method) -> None:
    bridge, batch = made_bridge(DEEP), made_batch(DEEP, 4, 3)
    batch.mask[:, 1] = False
    expected = clipped_sum(bridge, batch, deep(encoder), 0.5, method)
    batch.features[~batch.mask] = float("nan")
    agree(clipped_sum(bridge, batch, deep(encoder), 0.5, method), expected, length(expected))


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_one_patients_data_counts_as_zero(encoder: CompactEncoder, method: Method) -> None:
    bridge, batch = made_bridge(DEEP), made_batch(DEEP, 5, 3, present=1.0)
    batch.targets[3, 0, 0, 0] = 77.0

    def align(tokens: torch.Tensor, part: Batch) -> torch.Tensor:
        if (part.targets == 77.0).any():
            raise ArithmeticError("no such signal")
        return deep(encoder)(tokens, part)

    rest = torch.tensor([True, True, True, False, True])
    good = Batch(batch.features[rest], batch.targets[rest], batch.mask[rest])
    expected, norms = microbatches(bridge, good, deep(encoder), 0.5)
    agree(clipped_sum(bridge, batch, align, 0.5, method), expected, sum(norms))
    assert all(not array.any() for array in clipped_sum(bridge, only(batch, 3), align, 0.5, method).values())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_on_the_bridge(encoder: CompactEncoder, method: Method) -> None:
    bridge = made_bridge(DEEP)
    before = bridge.arrays()
    clipped_sum(bridge, made_batch(DEEP, 3, 2), deep(encoder), 0.5, method)
    assert all(parameter.grad is None for parameter in bridge.parameters())
    assert not any(hasattr(parameter, "grad_sample") for parameter in bridge.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in bridge.modules())
    for name, array in bridge.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_chunks_do_not_change_the_sum(encoder: CompactEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, batch = made_bridge(DEEP), made_batch(DEEP, 11, 3)
    whole = clipped_sum(bridge, batch, deep(encoder), 0.2)
    monkeypatch.setattr(gradients, "NUMBERS_AT_ONCE", 7 * 10 * 16)
    seen = []

    def align(tokens: torch.Tensor, part: Batch) -> torch.Tensor:
        seen.append(len(part.mask))
        return deep(encoder)(tokens, part)

    agree(clipped_sum(bridge, batch, align, 0.2), whole, length(whole))
    assert seen == [2, 2, 2, 2, 2, 1]


def test_a_large_old_encoder_takes_one_patient_at_a_time() -> None:
    compact, large = BridgeShape(64, 8, 50, 32, 64), BridgeShape(768, 8, 200, 32, 768)
    assert gradients.patients_at_once(compact, 8) == 20
    assert gradients.patients_at_once(large, 8) == 1
    assert gradients.patients_at_once(large, 0) > 1


def test_a_norm_that_cancels_is_not_underestimated(encoder: CompactEncoder) -> None:
    """Two windows pull in opposite directions: what is left of a patient's gradient is a millionth of its parts, and
    the pairwise way of computing a norm must still see it."""
    shape = BridgeShape(width_new=40, rank=30, tokens_old=1, prototypes=40, width_old=40, frozen_prototypes=True)
    bridge, batch = made_bridge(shape), made_batch(shape, 1, 2, present=1.0)
    batch.features[0, 1] = batch.features[0, 0]

    def align(tokens: torch.Tensor, part: Batch) -> torch.Tensor:
        signs = torch.tensor([1e4, -1e4 * (1 + 1e-5)])
        return (tokens.sum(dim=(2, 3)) * signs).sum(dim=1)

    norm = length(one_gradient(bridge, batch, align))
    clip = norm / 2
    assert length(clipped_sum(bridge, batch, align, clip, "ghost")) == pytest.approx(clip, rel=1e-2)


@pytest.mark.parametrize(
    ("features", "mask", "clip", "says"),
    [
        ((3, 2, 8), (3, 3), 1.0, "are not"),
        ((3, 8), (3,), 1.0, "are not"),
        ((3, 2, 8), (3, 2), 0.0, "not positive"),
        ((3, 2, 8), (3, 2), float("nan"), "not positive"),
    ],
)
def test_a_mistake_of_the_caller_is_not_taken_for_a_patients(
    encoder: CompactEncoder, features: tuple[int, ...], mask: tuple[int, ...], clip: float, says: str
) -> None:
    batch = Batch(torch.zeros(features), torch.zeros(3, 2, 10, 16), torch.ones(mask, dtype=torch.bool))
    with pytest.raises(ValueError, match=says):
        clipped_sum(made_bridge(DEEP), batch, deep(encoder), clip)
