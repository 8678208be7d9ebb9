"""What a bridge takes from public patients: moments by patient, whitening, directions and their scale."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dct

from bridge.errors import WeightsError
from bridge.public_constants import directions, pooled_moments, scaled_prototypes, whitening

RNG = np.random.default_rng(0)


def test_each_patient_weighs_the_same_in_the_moments() -> None:
    h = RNG.normal(size=(48, 5)) * np.arange(1, 6)
    h[4:] += 3.0
    # Patients of one, of three and of 44 windows: a pooled mean would be the last one's.
    patients = np.array(["a", *["b"] * 3, *["c"] * 44])
    mean, covariance = pooled_moments(h, patients)
    parts = [h[:1], h[1:4], h[4:]]
    expected = sum(part.mean(0) for part in parts) / 3
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    spread = sum(sum(np.outer(row - mean, row - mean) for row in part) / len(part) for part in parts) / 3
    np.testing.assert_allclose(covariance, spread, atol=1e-12)
    assert np.abs(mean - h.mean(0)).min() > 0.5


def test_whitened_features_have_unit_variance_where_they_vary() -> None:
    h = RNG.normal(size=(400, 6)) @ RNG.normal(size=(6, 6)) * 20
    covariance = np.cov(h.T, ddof=0)
    for components in (6, 2):
        found = whitening(covariance, components)
        assert found.shape == (6, components)
        values = np.sort(np.linalg.eigvalsh(covariance))[::-1][:components]
        white = np.cov(((h - h.mean(0)) @ found).T, ddof=0)
        np.testing.assert_allclose(white, np.diag(values / (values + 1e-3 * values[0])), atol=1e-9)
    np.testing.assert_allclose(whitening(covariance, 6)[:, :2], whitening(covariance, 2))


def test_a_direction_that_never_varies_is_not_blown_up() -> None:
    found = whitening(np.diag([4.0, 0.0]), 2)
    np.testing.assert_allclose(found, np.diag([1 / np.sqrt(4.004), 1 / np.sqrt(0.004)]), atol=1e-12)


@pytest.mark.parametrize(("covariance", "components"), [(np.eye(3), 4), (np.zeros((3, 3)), 1)])
def test_whitening_that_can_not_be_had_is_refused(covariance: np.ndarray, components: int) -> None:
    with pytest.raises(WeightsError, match="whitened components can't be had"):
        whitening(covariance, components)


def test_directions_are_the_principal_ones_of_what_the_bridge_sees() -> None:
    # Fast changes lie along axis 0, slow ones of less power along axis 1, slower and weaker ones along axis 2.
    t = np.arange(16) + 0.5
    waves = np.stack([np.cos(np.pi * k * t / 16) for k in (12, 2, 1)], axis=1)
    tokens = RNG.normal(size=(40, 1, 3)) * waves * np.array([9.0, 3.0, 1.0])
    np.testing.assert_allclose(directions(tokens, 3, cosines=0), np.eye(3), atol=0.05)
    np.testing.assert_allclose(directions(tokens, 2, cosines=4), np.eye(3)[1:], atol=0.05)
    found = directions(RNG.normal(size=(10, 4, 7)), 5, cosines=3)
    np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-12)
    with pytest.raises(WeightsError, match="principal directions can't be had"):
        directions(tokens, 4, cosines=0)


@pytest.mark.parametrize("cosines", [0, 3])
def test_scaled_prototypes_give_coefficients_of_mean_square_one(cosines: int) -> None:
    tokens, prototypes = RNG.normal(size=(30, 8, 6)) * 7, RNG.normal(size=(4, 6))
    scaled = scaled_prototypes(prototypes, tokens, cosines)
    np.testing.assert_allclose(scaled / prototypes, (scaled / prototypes)[0, 0])
    seen = dct(tokens, axis=1, norm="ortho")[:, :cosines] if cosines else tokens
    coefficients = np.linalg.lstsq(scaled.T, seen.reshape(-1, 6).T, rcond=None)[0]
    assert np.mean(coefficients**2) == pytest.approx(1.0, rel=1e-9)


def test_tokens_that_never_vary_give_no_scale() -> None:
    with pytest.raises(WeightsError, match="do not vary"):
        scaled_prototypes(np.eye(3), np.zeros((5, 4, 3)), 2)
