"""The forecast: its arithmetic against direct simulation of noised sums, and its words at the thresholds."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from bridge.privacy.forecast import (
    FEASIBLE,
    HOPELESS,
    SHARES,
    Forecast,
    forecast,
    metric_half_width,
    metric_outlook,
    outlook,
)

NoisedAt = Literal["site", "server"]


def training(patients: float = 40, noised_at: NoisedAt = "server", **changes: float) -> Forecast:
    return forecast(
        "training",
        changes.get("noise", 1.5),
        int(changes.get("numbers", 6656)),
        patients=patients,
        sites=int(changes.get("sites", 8)),
        sampling_rate=changes.get("rate", 0.25),
        count=int(changes.get("count", 80)),
        noised_at=noised_at,
    )


@pytest.mark.parametrize("noised_at", ["site", "server"])
def test_one_release_is_what_a_simulated_sum_gives(noised_at: NoisedAt) -> None:
    """Unit vectors whose mean has length `share`: the mean's part of the sum over the length of the added noise."""
    rng = np.random.default_rng(0)
    share, sites, patients, numbers, noise = SHARES["training"], 4, 50, 2000, 1.5
    common = rng.normal(size=numbers)
    common /= np.linalg.norm(common)
    own = rng.normal(size=(sites * patients, numbers))
    own -= np.outer(own @ common, common)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    vectors = share * common + math.sqrt(1 - share**2) * own
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    signal = float(vectors.sum(axis=0) @ common)
    noises = rng.normal(scale=noise, size=(sites if noised_at == "site" else 1, numbers)).sum(axis=0)
    found = forecast("training", noise, numbers, patients=patients, sites=sites, noised_at=noised_at)
    assert found.one == pytest.approx(signal / np.linalg.norm(noises), rel=0.05)


def test_how_the_ratio_grows() -> None:
    base = training()
    assert base.run == pytest.approx(base.one * math.sqrt(80))
    assert training(patients=80).one == pytest.approx(2 * base.one)
    assert training(noise=3.0).one == pytest.approx(base.one / 2)
    assert training(numbers=4 * 6656).one == pytest.approx(base.one / 2)
    assert training(rate=0.5).one == pytest.approx(2 * base.one)
    assert training(noised_at="site").one == pytest.approx(base.one / math.sqrt(8))
    assert training(noised_at="site", sites=2).one == pytest.approx(base.one * math.sqrt(2) / 8)


@pytest.mark.parametrize("patients", [3, 17, 40, 300])
@pytest.mark.parametrize("noised_at", ["site", "server"])
def test_the_patients_needed_are_the_fewest(patients: int, noised_at: NoisedAt) -> None:
    needed = training(patients=patients, noised_at=noised_at, noise=4.0).patients_needed
    assert training(patients=needed, noised_at=noised_at, noise=4.0).run >= FEASIBLE - 1e-9
    assert training(patients=needed - 1, noised_at=noised_at, noise=4.0).run < FEASIBLE


def test_a_groups_bound_is_half_the_sensitivity() -> None:
    found = forecast("probe", 2.0, 5, patients=8, sites=6, noised_at="server")
    assert found.one == pytest.approx(SHARES["probe"] * 48 * 0.5 / (2.0 * math.sqrt(5)))


def test_the_words() -> None:
    assert [outlook(ratio) for ratio in (0, HOPELESS - 1e-9, HOPELESS, FEASIBLE - 1e-9, FEASIBLE)] == [
        "hopeless",
        "hopeless",
        "doubtful",
        "doubtful",
        "feasible",
    ]
    assert [metric_outlook(width) for width in (0.01, 0.05, 0.06, 0.15, 0.2, math.inf)] == [
        "feasible",
        "feasible",
        "doubtful",
        "doubtful",
        "hopeless",
        "hopeless",
    ]


@pytest.mark.parametrize("noised_at", ["site", "server"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_metrics_interval_is_that_of_simulated_tables(classes: int, noised_at: NoisedAt) -> None:
    """Tables of three kinds scaled to a joint norm of one, half of each row on the diagonal, noised and read."""
    rng = np.random.default_rng(1)
    sites, patients, noise, trials = 6, 40, 0.8, 4000
    table = np.full((classes, classes), 0.5 / (classes - 1))
    np.fill_diagonal(table, 0.5)
    clean = table / classes * patients * sites / math.sqrt(3)
    scale = noise * (math.sqrt(sites) if noised_at == "site" else 1)
    noised = clean + rng.normal(scale=scale, size=(trials, classes, classes))
    figures = (np.diagonal(noised, axis1=1, axis2=2) / noised.sum(axis=2)).mean(axis=1)
    found = metric_half_width(noise, classes, patients=patients, sites=sites, noised_at=noised_at)
    assert found == pytest.approx(1.96 * figures.std(), rel=0.06)


def test_nobody_to_test_means_no_figure() -> None:
    assert metric_half_width(1.0, 3, patients=0, sites=4, noised_at="server") == math.inf
