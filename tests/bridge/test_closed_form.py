"""The one-shot bridge: equal to a plain ridge regression on all data, bounded by patient, and told from its noise."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from sklearn.linear_model import Ridge

from bridge.closed_form import Layout, Regression, factors, noise_edge, shrunk, solve, solved_arrays
from bridge.job_privacy import GramName
from bridge.messages import closed_form_length
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape

SHAPE = BridgeShape(9, 3, 10, 4, 7, cosines=3, components=5, constant=True, frozen_prototypes=True)
LAYOUT = Layout(SHAPE.rows, SHAPE.columns, "released")
FULL = min(SHAPE.rows, SHAPE.columns)
Patient = tuple[NDArray[np.float32], NDArray[np.float32]]


def public_arrays(seed: int = 0, shape: BridgeShape = SHAPE) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in shape.arrays().items()}


ARRAYS = public_arrays()


def patients(count: int, seed: int = 1, rank: int | None = None) -> list[Patient]:
    """Patients of 1 to 12 windows, each shifted; their tokens follow their features, with noise unless `rank`."""
    rng = np.random.default_rng(seed)
    found = []
    for windows in rng.integers(1, 13, count):
        h = (rng.normal(size=(windows, SHAPE.width_new)) + rng.normal(size=SHAPE.width_new)).astype(np.float32)
        if rank is None:
            tokens = np.tanh(h @ np.random.default_rng(9).normal(size=(SHAPE.width_new, 70))).reshape(-1, 10, 7)
            found.append((h, (tokens + rng.normal(size=tokens.shape)).astype(np.float32)))
        else:
            found.append((h, truth(h)))
    return found


def truth(h: NDArray[np.float32]) -> NDArray[np.float32]:
    """Tokens that a bridge of rank 3 makes of the features."""
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(ARRAYS)
    with torch.no_grad():
        return bridge(torch.from_numpy(h)).numpy()


def sums(members: list[Patient], *, gram: GramName = "released", clip: float | None = None) -> NDArray[np.float64]:
    regression = Regression.of(SHAPE, ARRAYS, gram)
    return np.sum([regression.patient(*member, clip) for member in members], axis=0)


def plain_ridge(members: list[Patient], ridge: float) -> NDArray[np.float64]:
    """`(rows, columns)`: scikit-learn on all windows at once, each weighing one over its patient's windows."""
    inputs, targets, weights = [], [], []
    for h, tokens in members:
        x = (h.astype(np.float64) - ARRAYS["mean"]) @ ARRAYS["whitening"].astype(np.float64)
        inputs.append(np.c_[x, np.ones(len(x))])
        waves = dct(tokens.astype(np.float64) - ARRAYS["constant"], axis=1, norm="ortho")[:, : SHAPE.cosines]
        solved = np.linalg.lstsq(ARRAYS["P"].T.astype(np.float64), waves.reshape(-1, 7).T, rcond=None)[0]
        targets.append(solved.T.reshape(len(x), SHAPE.columns))
        weights.append(np.full(len(x), 1.0 / len(x)))
    model = Ridge(alpha=ridge * len(members), fit_intercept=False, solver="cholesky")
    model.fit(np.concatenate(inputs), np.concatenate(targets), sample_weight=np.concatenate(weights))
    return np.asarray(model.coef_.T)


@pytest.mark.parametrize("sites", [(40,), (1, 2, 37), (13, 13, 14), tuple([1] * 40)])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_without_noise_it_is_the_ridge_of_one_machine_however_unequal_the_sites(
    sites: tuple[int, ...], ridge: float
) -> None:
    members = patients(40)
    edges = np.cumsum([0, *sites])
    total = np.sum([sums(members[a:b]) for a, b in itertools.pairwise(edges)], axis=0)
    a, b = solve(total, LAYOUT, rank=FULL, ridge=ridge)
    expected = plain_ridge(members, ridge)
    np.testing.assert_allclose(a @ b, expected, atol=1e-6 * np.abs(expected).max())


def test_a_cut_rank_is_the_best_approximation() -> None:
    members = patients(40)
    a, b = solve(sums(members), LAYOUT, rank=3, ridge=0.1)
    assert (a.shape, b.shape) == ((6, 3), (3, 12))
    expected = plain_ridge(members, 0.1)
    singular = np.linalg.svd(expected, compute_uv=False)
    assert np.linalg.norm(a @ b - expected) == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1))


def test_a_bridge_is_found_again_from_what_it_makes() -> None:
    members = patients(60, rank=3)
    arrays = solved_arrays(ARRAYS, *solve(sums(members), LAYOUT, rank=3, ridge=1e-10))
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        name: (size, "float32") for name, size in SHAPE.arrays().items()
    }
    bridge = PrototypeBridge(SHAPE)
    bridge.load_arrays(arrays)
    for h, tokens in patients(5, seed=2, rank=3):
        np.testing.assert_allclose(bridge(torch.from_numpy(h)).detach().numpy(), tokens, rtol=1e-2, atol=2e-2)


def test_a_public_gram_is_the_identity() -> None:
    members = patients(20)
    layout = dataclasses.replace(LAYOUT, gram="public")
    a, b = solve(sums(members, gram="public"), layout, rank=FULL, ridge=0.25)
    _, cross, _ = LAYOUT.unpack(sums(members))
    np.testing.assert_allclose(a @ b, cross / 1.25, atol=1e-9)


def test_means_and_squares_move_and_scale_the_identity() -> None:
    members = patients(20)
    layout = dataclasses.replace(LAYOUT, gram="diagonal")
    a, b = solve(sums(members, gram="diagonal"), layout, rank=FULL, ridge=0.25)
    _, cross, gram = LAYOUT.unpack(sums(members))
    means, squares = gram[:5, 5], np.diag(gram)[:5]
    expected = np.outer(np.append(means, 1), np.append(means, 1))
    expected[np.arange(5), np.arange(5)] = squares
    np.testing.assert_allclose(a @ b, np.linalg.solve(expected + 0.25 * np.eye(6), cross), rtol=1e-9, atol=1e-9)


def test_a_mean_square_below_the_square_of_the_mean_is_not_believed() -> None:
    layout = dataclasses.replace(LAYOUT, gram="diagonal")
    vector = layout.pack(np.append(np.full(5, 2.0), 1.0)[None], np.ones((1, 12)))
    vector[-5:] /= 10
    gram = layout.unpack(vector)[2]
    np.testing.assert_allclose(np.diag(gram), [4.0] * 5 + [1.0])
    np.testing.assert_allclose(gram[:5, 5], 2.0)
    np.testing.assert_allclose(gram[0, 1], 4.0)


@pytest.mark.parametrize("gram", ["diagonal", "released"])
def test_a_gram_matrix_that_noise_drowns_is_that_of_the_public_whitening(gram: GramName) -> None:
    layout = dataclasses.replace(LAYOUT, gram=gram)
    total = sums(patients(20), gram=gram)
    np.testing.assert_array_equal(layout.unpack(total, deviation=1e6)[2], np.eye(6))
    np.testing.assert_allclose(layout.unpack(total, deviation=1e-7)[2], layout.unpack(total)[2], atol=1e-6)


def test_numbers_are_believed_as_far_as_they_stand_out_of_noise() -> None:
    rng = np.random.default_rng(11)
    values = rng.normal(size=(400, 50)) * 3.0
    pulled = np.array([shrunk(row, 0.0, 3.0) for row in values])
    assert np.square(pulled).mean() < 0.1 * np.square(values).mean()
    strong = np.array([shrunk(row + 40.0, 0.0, 3.0) for row in values])
    assert np.square(strong - 40.0).mean() < 1.02 * np.square(values).mean()


@pytest.mark.parametrize("gram", ["public", "diagonal", "released"])
def test_the_vector_has_its_declared_length_and_comes_apart_again(gram: GramName) -> None:
    rng = np.random.default_rng(3)
    layout = Layout(SHAPE.rows, SHAPE.columns, gram)
    x, c = np.c_[rng.normal(size=(9, 5)), np.ones(9)], rng.normal(size=(9, 12))
    vector = layout.pack(x, c)
    extra = {"public": 0, "diagonal": 10, "released": 21}[gram]
    assert len(vector) == Regression.of(SHAPE, ARRAYS, gram).length == closed_form_length(SHAPE, gram) == 73 + extra
    weight, cross, found = layout.unpack(17 * vector)
    assert weight == 17.0
    np.testing.assert_allclose(cross, x.T @ c / 9)
    whole = x.T @ x / 9
    if gram == "released":
        np.testing.assert_allclose(found, whole)
    elif gram == "diagonal":
        np.testing.assert_allclose(np.diag(found), np.diag(whole))
        np.testing.assert_allclose(found[5], whole[5])
    else:
        np.testing.assert_array_equal(found, np.eye(6))


@pytest.mark.parametrize("gram", ["public", "diagonal", "released"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_one_patient_moves_the_sum_by_no_more_than_the_clip(gram: GramName, scale: float) -> None:
    regression = Regression.of(SHAPE, ARRAYS, gram)
    for h, tokens in patients(30, seed=4):
        free = regression.patient(h * scale, tokens * scale)
        clipped = regression.patient(h * scale, tokens * scale, clip=0.7)
        norm = np.linalg.norm(free)
        assert np.linalg.norm(clipped) <= 0.7 * (1 + 1e-12)
        np.testing.assert_allclose(clipped, free * min(1.0, 0.7 / norm))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_patient_that_is_not_finite_counts_as_zeros(bad: float, where: int) -> None:
    member = patients(1)[0]
    member[where].ravel()[3] = bad
    with np.errstate(invalid="ignore"):
        assert not Regression.of(SHAPE, ARRAYS, "released").patient(*member, clip=1.0).any()


def test_the_edge_is_where_the_singular_values_of_noise_end() -> None:
    rng = np.random.default_rng(5)
    for rows, columns in ((30, 30), (17, 64), (65, 16)):
        largest = [np.linalg.norm(rng.normal(scale=2.5, size=(rows, columns)), 2) for _ in range(40)]
        assert noise_edge(2.5, rows, columns) == pytest.approx(np.mean(largest), rel=0.08)


def test_noise_is_dropped_and_what_stands_out_of_it_is_kept() -> None:
    layout, rng = Layout(20, 40, "public"), np.random.default_rng(6)
    u, v = np.linalg.qr(rng.normal(size=(20, 2)))[0], np.linalg.qr(rng.normal(size=(40, 2)))[0]
    deviation = 0.05
    edge = noise_edge(deviation / layout.cross_scale, 20, 40)
    signal = (u * np.array([4 * edge, 0.2 * edge])) @ v.T
    noise = rng.normal(size=1 + 20 * 40) * deviation
    noise[0] = 0.0
    statistics = np.append(0.25, signal.ravel() * layout.cross_scale) + noise
    a, b = solve(statistics, layout, rank=20, ridge=1e-9, deviation=deviation, drop=True)
    assert np.linalg.matrix_rank(a @ b, tol=1e-6) == 1
    assert abs(u[:, 0] @ (a @ b) @ v[:, 0]) == pytest.approx(4 * edge, rel=0.15)
    kept = solve(statistics, layout, rank=20, ridge=1e-9, deviation=deviation)
    assert np.linalg.matrix_rank(kept[0] @ kept[1], tol=1e-6) == 20
    assert np.linalg.norm(a @ b - signal) < 0.6 * np.linalg.norm(kept[0] @ kept[1] - signal)


@pytest.mark.parametrize("gram", ["public", "diagonal", "released"])
def test_noise_alone_gives_a_finite_bridge(gram: GramName) -> None:
    layout = dataclasses.replace(LAYOUT, gram=gram)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=closed_form_length(SHAPE, gram)) * 30
        a, b = solve(noise, layout, rank=3, ridge=0.1, deviation=30.0, drop=seed % 2 == 0)
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()
        if noise[0] <= 0:
            assert not (a @ b).any()
    assert (a.shape, b.shape) == ((6, 3), (3, 12))


def test_more_rank_than_there_is_leaves_zeros() -> None:
    matrix = np.random.default_rng(7).normal(size=(4, 6))
    a, b = factors(matrix, 9)
    assert (a.shape, b.shape) == ((4, 9), (9, 6))
    np.testing.assert_allclose(a @ b, matrix)
    assert not a[:, 4:].any()
    assert not b[4:].any()


@pytest.mark.parametrize("changes", [{"cosines": 0}, {"components": 0}, {"frozen_prototypes": False}])
def test_other_bridges_have_no_closed_form(changes: dict[str, int]) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    with pytest.raises(ValueError, match="the closed form needs"):
        Regression.of(shape, public_arrays(0, shape), "released")
