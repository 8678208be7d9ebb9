"""Patient bootstrap against scikit-learn on windows that are really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, f1_score

from simulations.bootstrap import PatientCounts, count_chance, count_patients, mean_metrics, metrics, resample

CLASSES = 3


class Case:
    def __init__(self, patients: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 30, patients)
        names = np.array([f"patient-{i:02d}" for i in range(patients)])
        self.patients = np.repeat(names, sizes)[rng.permutation(sizes.sum())]
        self.labels = rng.integers(0, CLASSES, len(self.patients))
        self.pseudo = np.where(rng.random(len(self.labels)) < 0.8, self.labels, rng.integers(0, 3, len(self.labels)))
        self.guess = np.where(rng.random(len(self.labels)) < 0.6, self.labels, rng.integers(0, 3, len(self.labels)))

    def counts(self) -> PatientCounts:
        return count_patients(self.patients, self.labels, self.pseudo, self.guess, CLASSES)

    def repeated(self, draw: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows of the windows of patients drawn so many times."""
        names = np.unique(self.patients)
        return np.concatenate(
            [np.tile(np.flatnonzero(self.patients == n), int(times)) for n, times in zip(names, draw, strict=True)]
        )


def test_values_are_scikit_learns() -> None:
    case = Case()
    found = metrics(case.counts(), resample(12, 1000, 0))
    assert found.balanced_accuracy is not None
    assert found.f1_macro is not None
    assert found.f1_weighted is not None
    assert found.agreement is not None
    labels, guess = case.labels, case.guess
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(labels, guess), abs=1e-12)
    assert found.f1_macro.value == pytest.approx(f1_score(labels, guess, average="macro"), abs=1e-12)
    assert found.f1_weighted.value == pytest.approx(f1_score(labels, guess, average="weighted"), abs=1e-12)
    assert found.agreement.value == pytest.approx(np.mean(case.pseudo == guess), abs=1e-12)


def test_an_interval_is_that_of_windows_repeated_patient_by_patient() -> None:
    case = Case()
    draws = resample(12, 1000, 3)
    sampled = []
    for draw in draws:
        rows = case.repeated(draw)
        sampled.append(balanced_accuracy_score(case.labels[rows], case.guess[rows]))
    found = metrics(case.counts(), draws).balanced_accuracy
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(sampled, [0.025, 0.975])), abs=1e-12)


def test_more_windows_of_the_same_patients_do_not_narrow_an_interval() -> None:
    case = Case()
    once = metrics(case.counts(), resample(12, 1000, 1)).balanced_accuracy
    ten = [np.tile(each, 10) for each in (case.patients, case.labels, case.pseudo, case.guess)]
    tenfold = metrics(count_patients(*ten, CLASSES), resample(12, 1000, 1)).balanced_accuracy
    assert once == tenfold


def test_more_patients_narrow_an_interval() -> None:
    few, many = Case(10, seed=5), Case(400, seed=5)
    width = []
    for case, patients in ((few, 10), (many, 400)):
        found = metrics(case.counts(), resample(patients, 1000, 2)).balanced_accuracy
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        width.append(found.high - found.low)
    assert width[1] < width[0] / 3


def test_each_draw_holds_as_many_patients_as_there_are_and_depends_on_the_seed_alone() -> None:
    draws = resample(7, 1000, 4)
    assert (draws.sum(axis=1) == 7).all()
    assert draws.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)
    assert (draws == resample(7, 1000, 4)).all()
    assert (draws != resample(7, 1000, 5)).any()


def test_chance_is_one_over_the_classes_whatever_the_labels() -> None:
    case = Case()
    counts = count_chance(case.patients, case.labels, case.pseudo, CLASSES)
    found = metrics(counts, resample(12, 1000, 0))
    assert found.balanced_accuracy is not None
    assert found.balanced_accuracy.value == pytest.approx(1 / 3, abs=1e-12)
    assert found.balanced_accuracy.high == pytest.approx(1 / 3, abs=1e-12)
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(1 / 3, abs=1e-12)


def test_without_labels_only_agreement_remains() -> None:
    case = Case()
    counts = count_patients(case.patients, np.full(len(case.labels), -1), case.pseudo, case.guess, CLASSES)
    found = metrics(counts, resample(12, 1000, 0))
    assert found.balanced_accuracy is None
    assert found.f1_macro is None
    assert found.agreement is not None


def test_a_mean_is_the_mean_and_its_interval_lies_around_it() -> None:
    one, two = Case(seed=0), Case(seed=0)
    two.guess = np.roll(two.guess, 3)
    draws = resample(12, 1000, 6)
    mean = mean_metrics({"one": one.counts(), "two": two.counts()}, draws).balanced_accuracy
    values = [balanced_accuracy_score(case.labels, case.guess) for case in (one, two)]
    assert mean is not None
    assert mean.low is not None
    assert mean.high is not None
    assert mean.value == pytest.approx(np.mean(values), abs=1e-12)
    sampled = []
    for draw in draws:
        rows = one.repeated(draw)
        sampled.append(np.mean([balanced_accuracy_score(c.labels[rows], c.guess[rows]) for c in (one, two)]))
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile(sampled, [0.025, 0.975])), abs=1e-12)
