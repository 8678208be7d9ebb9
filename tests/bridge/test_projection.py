"""The public projection: signs that anybody can compute again, and a probe that judges nearly as before."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from bridge.messages import moments_length
from bridge.probe import probe_moments, scores_from_moments
from bridge.projection import projected, projected_width, projection


def signs_by_hand(seed: int, position: int, width: int, limit: int) -> list[list[int]]:
    """Bit by bit, as docs/reference/messages.md has it."""
    text = json.dumps(["fedbridge.projection/1", seed, position, width, limit], separators=(",", ":"))
    stream = hashlib.shake_256(text.encode()).digest(width * limit // 8 + 1)
    bits = [(byte >> (7 - place)) & 1 for byte in stream for place in range(8)]
    return [[2 * bits[row * limit + column] - 1 for column in range(limit)] for row in range(width)]


@pytest.mark.parametrize(("seed", "position", "width", "limit"), [(0, 0, 9, 4), (7, 3, 21, 5), (2**31 - 1, 15, 960, 3)])
def test_the_matrix_is_the_documented_one(seed: int, position: int, width: int, limit: int) -> None:
    expected = np.array(signs_by_hand(seed, position, width, limit)) / np.sqrt(limit)
    assert np.array_equal(projection(seed, position, width, limit), expected)


def test_up_to_the_limit_the_features_themselves_come_back() -> None:
    x = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    assert projected(x, 3, 0, 128) is x
    assert (projected_width(128, 128), projected_width(129, 128), projected_width(3, 128)) == (128, 128, 3)


def test_seed_and_position_give_other_matrices_and_none_can_be_changed() -> None:
    first = projection(0, 0, 300, 64)
    for other in (projection(1, 0, 300, 64), projection(0, 1, 300, 64)):
        assert abs((other == first).mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 0


def test_inner_products_hold_up_to_one_over_the_root_of_the_limit() -> None:
    x = np.random.default_rng(1).normal(size=(200, 960))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = projected(x, 2, 5, 128)
    assert y.shape == (200, 128)
    assert y.dtype == np.float64
    errors = (y @ y.T - x @ x.T)[np.triu_indices(200)]
    # Of unit vectors a product's variance is at most 2 / limit; its mean is exact.
    assert abs(errors.mean()) < 0.01
    assert 0.5 / np.sqrt(128) < errors.std() < np.sqrt(2 / 128)
    assert np.abs(errors).max() < 6 * np.sqrt(2 / 128)


def test_sites_that_project_add_up_and_the_best_position_stays_the_best() -> None:
    rng = np.random.default_rng(3)
    labels, patients = rng.integers(0, 2, 600), np.array([f"p{i // 10}" for i in range(600)])
    # Position 2 tells the classes best: along directions that are spread over all 400 features.
    direction = rng.normal(size=400)
    outputs = [
        (rng.normal(size=(600, 400)) + strength * np.outer(labels - 0.5, direction)).astype(np.float32)
        for strength in (0.0, 0.2, 0.6)
    ]
    wide = [projected(x, position, 11, 48) for position, x in enumerate(outputs)]
    whole = probe_moments(wide, labels, patients, 2, 5, "key")
    assert whole.shape == (3 * 5 * moments_length(48, 2),)
    half = patients < "p3"
    parts = [
        probe_moments(
            [projected(x[rows], position, 11, 48) for position, x in enumerate(outputs)],
            labels[rows],
            patients[rows],
            2,
            5,
            "key",
        )
        for rows in (half, ~half)
    ]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-9, atol=1e-9)
    scores = scores_from_moments(whole, [48] * 3, 2, 5, 1e-2)
    assert scores[0] < 0.02 < scores[1] < scores[2]
    assert scores[2] > 0.5
