"""The prototype bridge: published sizes, the map itself, and its parameters by name."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.fft import dct

from bridge.cosines import cosine_basis
from bridge.errors import WeightsError
from bridge.prototype import PrototypeBridge, initial_arrays
from bridge.shape import BridgeShape

SHAPE = BridgeShape(width_new=5, rank=3, tokens_old=4, prototypes=6, width_old=7)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        pytest.param(BridgeShape(512, 32, 181, 300, 200), 1_813_984, id="ISRUC EEG to ECG"),
        pytest.param(BridgeShape(200, 4, 46, 200, 512), 140_000, id="ISRUC ECG to EEG"),
        pytest.param(BridgeShape(512, 32, 235, 50, 128), 398_784, id="WESAD PPG to ECG"),
        pytest.param(BridgeShape(64, 8, 93, 150, 512), 188_912, id="WESAD ECG to PPG"),
        pytest.param(BridgeShape(768, 256, 19, 200, 200), 1_209_408, id="FOG EEG to EMG"),
        pytest.param(BridgeShape(200, 8, 1680, 50, 768), 712_000, id="FOG EMG to EEG"),
    ],
)
def test_parameters_are_those_of_the_six_published_bridges(shape: BridgeShape, published: int) -> None:
    assert shape.parameters == published
    assert sum(p.numel() for p in PrototypeBridge(shape).parameters()) == published


def test_the_map_is_reshape_of_hab_times_prototypes() -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPE.arrays().items()}
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(arrays)
    h = rng.normal(size=(2, 3, 5)).astype(np.float32)
    found = bridge(torch.from_numpy(h)).detach().numpy()
    assert found.shape == (2, 3, 4, 7)
    for i in range(2):
        for j in range(3):
            mixing = h[i, j] @ arrays["A"] @ arrays["B"]
            for token in range(4):
                expected = sum(mixing[token * 6 + k] * arrays["P"][k] for k in range(6))
                np.testing.assert_allclose(found[i, j, token], expected, rtol=1e-4, atol=1e-4)


def test_parameters_come_back_as_they_went_in() -> None:
    arrays = {n: np.random.default_rng(1).normal(size=s).astype(np.float32) for n, s in SHAPE.arrays().items()}
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(arrays)
    again = bridge.arrays()
    assert list(again) == ["A", "B", "P"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        again[name] += 1.0
        np.testing.assert_array_equal(bridge.arrays()[name], array)


def test_parameters_that_do_not_fit_are_refused_and_change_nothing() -> None:
    bridge = PrototypeBridge(SHAPE)
    before = bridge.arrays()
    good = {name: np.zeros(shape, np.float32) for name, shape in SHAPE.arrays().items()}
    for bad, why in (
        ({"A": good["A"], "B": good["B"]}, "a bridge has the parameters"),
        (good | {"Q": good["A"]}, "a bridge has the parameters"),
        (good | {"P": good["P"].T}, "parameter P has shape"),
        (good | {"P": np.zeros(1, np.float32)}, "parameter P has shape"),
    ):
        with pytest.raises(WeightsError, match=why):
            bridge.load_arrays(bad)
        for name, array in before.items():
            np.testing.assert_array_equal(bridge.arrays()[name], array)


def test_training_starts_at_a_zero_output() -> None:
    arrays = initial_arrays(SHAPE, seed=3)
    assert {name: array.shape for name, array in arrays.items()} == SHAPE.arrays()
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert not arrays["B"].any()
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(arrays)
    assert not bridge(torch.randn(2, 5)).any()


def test_the_start_follows_the_seed_and_its_laws() -> None:
    big = BridgeShape(400, 50, 2, 200, 300)
    arrays, again, other = (initial_arrays(big, seed=s) for s in (1, 1, 2))
    for name in ("A", "P"):
        np.testing.assert_array_equal(arrays[name], again[name])
        assert (arrays[name] != other[name]).mean() > 0.99
    # Kaiming-uniform with a = sqrt(5): uniform within 1/sqrt(d_new).
    assert np.abs(arrays["A"]).max() == pytest.approx(1 / 20, rel=0.01)
    assert arrays["A"].std() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert arrays["P"].std() == pytest.approx(1.0, rel=0.02)


def test_public_vectors_become_the_prototypes() -> None:
    public = np.arange(42, dtype=np.float64).reshape(6, 7)
    arrays = initial_arrays(SHAPE, seed=3, prototypes=public)
    np.testing.assert_array_equal(arrays["P"], public.astype(np.float32))
    np.testing.assert_array_equal(arrays["A"], initial_arrays(SHAPE, seed=3)["A"])
    with pytest.raises(WeightsError, match="public prototypes"):
        initial_arrays(SHAPE, seed=3, prototypes=public[:5])


FORMS = [
    pytest.param(dataclasses.replace(SHAPE, **changes), id=name)
    for name, changes in {
        "paper": {},
        "frozen prototypes": {"frozen_prototypes": True},
        "cosines": {"cosines": 3},
        "all cosines": {"cosines": 4},
        "whitened": {"components": 2},
        "constant": {"constant": True},
        "everything": {"cosines": 2, "components": 4, "constant": True, "frozen_prototypes": True},
    }.items()
]


def random_arrays(shape: BridgeShape, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in shape.arrays().items()}


@pytest.mark.parametrize("shape", FORMS)
def test_each_form_is_its_formula_token_by_token(shape: BridgeShape) -> None:
    arrays = random_arrays(shape, 4)
    bridge = PrototypeBridge(shape)
    bridge.load_arrays(arrays)
    h = np.random.default_rng(5).normal(size=(2, 3, shape.width_new)).astype(np.float32)
    found = bridge(torch.from_numpy(h)).detach().numpy()
    assert found.shape == (2, 3, shape.tokens_old, shape.width_old)
    terms = shape.cosines or shape.tokens_old
    for i, j in np.ndindex(2, 3):
        x = h[i, j]
        if shape.components:
            x = np.append((x - arrays["mean"]) @ arrays["whitening"], 1.0)
        mixing = x @ arrays["A"] @ arrays["B"]
        for token in range(shape.tokens_old):
            expected = np.zeros(shape.width_old)
            for term in range(terms):
                share = dct(np.eye(shape.tokens_old)[token], norm="ortho")[term] if shape.cosines else term == token
                for k in range(shape.prototypes):
                    expected += share * mixing[term * shape.prototypes + k] * arrays["P"][k]
            if shape.constant:
                expected += arrays["constant"][token]
            np.testing.assert_allclose(found[i, j, token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", FORMS)
def test_each_form_keeps_its_arrays_and_trains_what_it_declares(shape: BridgeShape) -> None:
    arrays = random_arrays(shape, 6)
    bridge = PrototypeBridge(shape)
    bridge.load_arrays(arrays)
    copied = copy.deepcopy(bridge)
    assert list(bridge.arrays()) == list(shape.arrays())
    for name, array in arrays.items():
        np.testing.assert_array_equal(copied.arrays()[name], array)
    copied.arrays()["A"] += 1.0
    np.testing.assert_array_equal(copied.arrays()["A"], arrays["A"])
    trained = {name: p for name, p in bridge.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == shape.parameters
    bridge(torch.randn(3, shape.width_new)).square().sum().backward()
    assert {name.removesuffix(".weight") for name, p in bridge.named_parameters() if p.grad is not None} == set(
        shape.trained
    )
    assert not list(bridge.buffers()), "Opacus refuses buffers"


@pytest.mark.parametrize("shape", FORMS)
def test_per_sample_gradients_are_those_of_one_patient_after_the_other(shape: BridgeShape) -> None:
    from opacus import GradSampleModule

    bridge = PrototypeBridge(shape)
    bridge.load_arrays(random_arrays(shape, 7))
    h = torch.randn(3, 2, shape.width_new, generator=torch.Generator().manual_seed(0))
    wrapped = GradSampleModule(copy.deepcopy(bridge), loss_reduction="sum", strict=True)
    wrapped(h).tanh().sum().backward()
    for name, parameter in bridge.named_parameters():
        if not parameter.requires_grad:
            continue
        per_sample = dict(wrapped.named_parameters())[f"_module.{name}"].grad_sample
        for patient in range(3):
            bridge.zero_grad()
            bridge(h[patient]).tanh().sum().backward()
            torch.testing.assert_close(per_sample[patient], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_start_takes_public_constants_and_refuses_others() -> None:
    shape = dataclasses.replace(SHAPE, cosines=2, components=3, constant=True, frozen_prototypes=True)
    constants = {name: array for name, array in random_arrays(shape, 8).items() if name not in ("A", "B", "P")}
    arrays = initial_arrays(shape, 1, constants=constants)
    assert {name: array.shape for name, array in arrays.items()} == shape.arrays()
    for name, array in constants.items():
        np.testing.assert_array_equal(arrays[name], array)
    bridge = PrototypeBridge(shape)
    bridge.load_arrays(arrays)
    np.testing.assert_array_equal(bridge(torch.randn(2, 5))[1].detach().numpy(), constants["constant"])
    with pytest.raises(WeightsError, match="a bridge has the parameters"):
        initial_arrays(shape, 1)
    with pytest.raises(WeightsError, match="whitening has shape"):
        initial_arrays(shape, 1, constants=constants | {"whitening": constants["whitening"].T})


@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (1, 9), (4, 50), (7, 7)])
def test_cosines_are_the_orthonormal_dct(count: int, tokens: int) -> None:
    expected = dct(np.eye(tokens), norm="ortho", axis=0)[:count]
    np.testing.assert_allclose(cosine_basis(count, tokens), expected, atol=1e-12)


@pytest.mark.parametrize("count", [0, 6])
def test_cosines_that_do_not_exist_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 5 cosines"):
        cosine_basis(count, 5)
