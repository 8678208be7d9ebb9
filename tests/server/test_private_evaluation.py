"""Figures from noised sums: at the wire, and against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from bridge.job import parse_job
from server.evaluation import Sums, private_criterion, private_evaluation_record
from server.noised import NoisedSum
from server.record import Evaluation, read_record
from tests.server.conftest import Models
from tests.server.wire import CLASSES, Site, WireGrid, arrays_of, run_server

NAMES = ("alpha", "beta", "gamma")
LABELS = ("low", "middle", "high")
Z = 0.4
KINDS = ("bridge", "teacher", "agreement")


def site_sums(name: str) -> np.ndarray:
    """About what 40 patients of one site would send."""
    rng = np.random.default_rng(NAMES.index(name))
    return rng.uniform(0, 2, size=(3, CLASSES, CLASSES)) + 8 * np.eye(CLASSES)


def job_text(models: Models, mechanism: str, **changes: Any) -> str:
    noised = {"noise_multiplier": 2.0}
    privacy = {
        "mechanism": mechanism,
        "selection": noised,
        "training": noised,
        "metrics": {"noise_multiplier": Z},
    }
    sites = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": NAMES}
    job: dict[str, Any] = {
        "sites": sites,
        "selection": {"mode": "fixed", "input_position": 1, "output_position": 2},
        "train": {"rounds": 1, "local_steps": 1},
        "privacy": privacy,
    }
    for key, value in changes.items():
        job[key] = {**job.get(key, {}), **value}
    return models.job(**job)


def member(name: str, wrong: Any = None) -> Site:
    site = Site(name, loss=False)
    honest = lambda site, message, _: arrays_of({"confusion_sums": site_sums(site.name)})  # noqa: E731
    site.wrong = {"evaluate": wrong or honest}
    return site


def evaluated(folder: Path, models: Models, text: str, members: list[Site] | None = None) -> Evaluation:
    run_server(WireGrid(members or [member(n) for n in NAMES], shuffle=2), folder, models.folder, text)
    return read_record(folder).evaluation


def figures(table: np.ndarray) -> dict[str, float]:
    """scikit-learn's figures of a table of fractional counts, by weighted windows."""
    cells = [(i, j) for i in range(CLASSES) for j in range(CLASSES)]
    truth, guess = [i for i, _ in cells], [j for _, j in cells]
    weight = [max(0.0, table[i, j]) for i, j in cells]
    return {
        "balanced_accuracy": balanced_accuracy_score(truth, guess, sample_weight=weight),
        "f1_macro": f1_score(truth, guess, average="macro", sample_weight=weight),
        "f1_weighted": f1_score(truth, guess, average="weighted", sample_weight=weight),
    }


@pytest.mark.parametrize("mechanism", ["local", "central"])
def test_the_record_holds_the_figures_of_the_noised_tables(models: Models, tmp_path: Path, mechanism: str) -> None:
    found = evaluated(tmp_path / "run", models, job_text(models, mechanism))
    assert list(found.confusion_sums) == list(KINDS)
    expected = sum(site_sums(name) for name in NAMES)
    released = np.array([found.confusion_sums[kind] for kind in KINDS])
    deviation = Z * np.sqrt(3) if mechanism == "local" else Z
    assert found.noise_deviation == pytest.approx(deviation)
    if mechanism == "local":
        np.testing.assert_allclose(released, expected, rtol=1e-12)
    else:
        assert np.abs(released - expected).min() > 0
        assert np.abs(released - expected).max() < 6 * deviation
    for kind, metrics in (("bridge", found.bridge), ("teacher", found.teacher)):
        assert metrics is not None
        for name, value in figures(np.array(found.confusion_sums[kind])).items():
            metric = getattr(metrics, name)
            assert metric.value == pytest.approx(value, abs=1e-9)
            assert metric.low < metric.value < metric.high
    assert found.bridge is not None
    assert found.bridge.agreement is not None
    agreement = released[2].clip(min=0)
    assert found.bridge.agreement.value == pytest.approx(np.trace(agreement) / agreement.sum())


def test_counts_are_absent_and_the_interval_says_what_it_includes(models: Models, tmp_path: Path) -> None:
    found = evaluated(tmp_path / "run", models, job_text(models, "central"))
    assert (found.windows, found.patients, found.confusion) == (None, None, {})
    assert found.interval.startswith("95 %")
    assert "noise" in found.interval
    assert "0.4" in found.interval
    assert found.chance is not None
    assert found.chance.balanced_accuracy is not None
    assert found.chance.balanced_accuracy.value == pytest.approx(1 / 3)


def test_a_site_that_fails_has_no_part_and_none_at_all_gives_no_figures(models: Models, tmp_path: Path) -> None:
    def silent(*_: Any) -> None:
        return None

    def misshapen(*_: Any) -> Any:
        return arrays_of({"confusion_sums": np.zeros((3, CLASSES))})

    members = [member("alpha"), member("beta", silent), member("gamma", misshapen)]
    found = evaluated(tmp_path / "one", models, job_text(models, "local"), members)
    np.testing.assert_allclose([found.confusion_sums[kind] for kind in KINDS], site_sums("alpha"), rtol=1e-12)
    assert found.noise_deviation == pytest.approx(Z)
    members = [member(n, silent) for n in NAMES]
    nothing = evaluated(tmp_path / "none", models, job_text(models, "central"), members)
    assert (nothing.bridge, nothing.teacher, nothing.confusion_sums) == (None, None, {})
    assert nothing.interval.startswith("none")


def sums_of(table: np.ndarray, deviation: float = 1.0) -> Sums:
    return Sums(NoisedSum(np.stack([table, table, table]), deviation))


def test_negative_cells_are_clamped_and_never_refused(models: Models) -> None:
    job = parse_job(job_text(models, "central"))
    table = np.array([[20.0, -3.0, 2.0], [1.0, 15.0, -0.5], [-2.0, -1.0, -4.0]])
    found = private_evaluation_record(job, sums_of(table), LABELS, 0)
    assert found.bridge is not None
    assert found.bridge.balanced_accuracy is not None
    assert found.bridge.balanced_accuracy.value == pytest.approx((20 / 22 + 15 / 16) / 2)
    assert found.confusion_sums["bridge"] == table.tolist()
    drowned = private_evaluation_record(job, sums_of(np.full((3, 3), -5.0)), LABELS, 0)
    assert drowned.bridge is not None
    assert drowned.bridge.balanced_accuracy is None
    assert drowned.noise_deviation == 1.0


def test_the_criterion_of_keep_best_is_a_figure_of_the_noised_table(models: Models) -> None:
    table = np.array([[20.0, -3.0, 4.0], [5.0, 15.0, 0.0], [2.0, 0.0, 2.0]])
    for name, expected in (
        ("agreement", 37 / 48),
        ("balanced_accuracy", (20 / 24 + 15 / 20 + 2 / 4) / 3),
    ):
        train = {"keep": "best", "criterion": name}
        job = parse_job(job_text(models, "central", train=train))
        assert private_criterion(job, sums_of(table)) == pytest.approx(expected)
        assert private_criterion(job, sums_of(np.full((3, 3), -1.0))) == 0.0
        assert private_criterion(job, Sums()) is None


def test_more_noise_makes_wider_intervals_and_the_seed_makes_them_the_same(models: Models) -> None:
    job = parse_job(job_text(models, "central"))

    def width(deviation: float, seed: int = 0) -> float:
        bridge = private_evaluation_record(job, sums_of(site_sums("alpha")[0], deviation), LABELS, seed).bridge
        assert bridge is not None
        metric = bridge.balanced_accuracy
        assert metric is not None
        assert metric.low is not None
        assert metric.high is not None
        return metric.high - metric.low

    assert width(0.0) < width(1.0) < width(3.0)
    assert width(1.0, 4) == width(1.0, 4) != width(1.0, 5)
