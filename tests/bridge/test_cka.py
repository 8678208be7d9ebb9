"""Debiased CKA against its definition, and where it must be 0, 1 or refuse."""

from __future__ import annotations

import numpy as np
import pytest

from bridge.cka import scores_from_similarity_moments, similarity_moments, similarity_scores
from bridge.errors import SelectionError
from tests.bridge.reference import biased_cka, block_cka, u_centred, u_statistic


def draw(seed: int, n: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


@pytest.mark.parametrize(("n", "d_new", "d_old"), [(4, 3, 2), (8, 3, 5), (9, 20, 4), (8, 2, 30)])
def test_moments_are_the_u_statistic_by_its_definition(n: int, d_new: int, d_old: int) -> None:
    x, y = draw(1, n, d_new).astype(np.float64) + 2.0, draw(2, n, d_old).astype(np.float64) ** 2
    expected = [n * (n - 3) * u_statistic(a, b) for a, b in ((x, y), (x, x), (y, y))]
    np.testing.assert_allclose(similarity_moments(x, [y])[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "d_new", "d_old"), [(60, 7, 5), (60, 80, 5), (30, 64, 64), (65, 64, 64)])
def test_features_and_gram_matrices_give_the_same(n: int, d_new: int, d_old: int) -> None:
    x, y = draw(3, n, d_new), draw(4, n, d_old)
    k, g = u_centred(x), u_centred(y)
    expected = [(k * g).sum(), (k * k).sum(), (g * g).sum()]
    np.testing.assert_allclose(similarity_moments(x, [y])[0], expected, rtol=1e-9, atol=1e-6)
    assert similarity_scores(x, [y])[0] == pytest.approx(block_cka([(x, y)]), abs=1e-9)


def test_independent_features_are_about_zero_at_twenty_windows() -> None:
    pairs = [(draw(seed, 20, 256), draw(seed + 1000, 20, 256)) for seed in range(50)]
    debiased = [similarity_scores(x, [y])[0] for x, y in pairs]
    assert np.mean([biased_cka(x, y) for x, y in pairs]) > 0.9
    assert abs(np.mean(debiased)) < 0.02
    assert np.abs(debiased).max() < 0.25


def test_invariances_of_cka() -> None:
    x = draw(5, 50, 10)
    rotation = np.linalg.qr(draw(6, 10, 10).astype(np.float64))[0]
    same = [x, 3.0 * x, x + 100.0, x @ rotation, -x]
    np.testing.assert_allclose(similarity_scores(x, same), 1.0, atol=1e-5)
    y = x + 0.7 * draw(7, 50, 10)
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_allclose(similarity_scores(x, [y]), similarity_scores(x[order], [y[order]]), atol=1e-12)


def test_scores_fall_with_noise() -> None:
    x = draw(8, 100, 16)
    scores = similarity_scores(x, [x + noise * draw(9, 100, 16) for noise in (0.0, 0.5, 1.0, 2.0, 8.0)])
    assert (np.diff(scores) < 0).all()
    assert scores[0] == pytest.approx(1.0, abs=1e-12)
    assert abs(scores[-1]) < 0.1


def test_a_large_offset_does_not_cancel_the_sums() -> None:
    x, y = draw(10, 40, 8).astype(np.float64), draw(11, 40, 8).astype(np.float64)
    np.testing.assert_allclose(similarity_moments(x + 1e5, [y - 1e5]), similarity_moments(x, [y]), rtol=1e-5)


def test_constant_features_score_zero() -> None:
    x = draw(12, 30, 6)
    np.testing.assert_array_equal(similarity_scores(x, [np.full((30, 4), 0.1, np.float32), np.zeros((30, 1))]), 0.0)
    np.testing.assert_array_equal(similarity_scores(np.full((30, 4), 0.1, np.float32), [x]), 0.0)


def test_scores_are_clipped() -> None:
    np.testing.assert_array_equal(
        scores_from_similarity_moments(
            np.array([[3.0, 1.0, 4.0], [-3.0, 1.0, 4.0], [1.0, 1.0, 4.0], [1.0, -1.0, 4.0]])
        ),
        [1.0, -1.0, 0.5, 0.0],
    )


def test_too_few_windows_or_other_rows_are_refused() -> None:
    broken = draw(1, 10, 3)
    broken[2, 1] = np.inf
    for x, y in ((draw(1, 3, 3), draw(2, 3, 3)), (draw(1, 10, 3), draw(2, 9, 3)), (draw(1, 10, 3), draw(2, 10, 3)[0])):
        with pytest.raises(SelectionError, match="can't be compared"):
            similarity_scores(x, [y])
    with pytest.raises(SelectionError) as caught:
        similarity_moments(broken, [draw(2, 10, 3)])
    assert "NaN or infinity" in caught.value.why
