"""Patients' stacked tables: against plain counting, one patient's reach, planted faults, and what intervals cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.job_privacy import PrivateMetrics
from bridge.metrics import accuracy, balanced_accuracy
from bridge.privacy.metrics import KINDS, SENSITIVITY, metrics_deviation, noise_interval, patient_tables
from tests.bridge.privacy.sensitivity import Array, Cohort, exceeded, made_cohort, moves

CLASSES = 3


def summed(cohort: Cohort) -> Array:
    """What a site sends, without noise."""
    total = np.zeros((3, CLASSES, CLASSES))
    for patient in np.unique(cohort.patients):
        own = cohort.patients == patient
        total += patient_tables(cohort.labels[own], cohort.teacher[own], cohort.predicted[own], CLASSES)
    return total


def counted(cohort: Cohort, patient: str) -> Array:
    """One patient's tables, window by window."""
    tables, windows = np.zeros((3, CLASSES, CLASSES)), 0
    for who, label, teacher, guess in zip(
        cohort.patients, cohort.labels, cohort.teacher, cohort.predicted, strict=True
    ):
        if who == patient:
            windows += 1
            tables[2, teacher, guess] += 1
            if label >= 0:
                tables[0, label, guess] += 1
                tables[1, label, teacher] += 1
    tables /= windows
    return tables / max(1.0, np.sqrt((tables**2).sum()))


def test_a_patient_s_tables_are_its_shares_of_windows_scaled_to_norm_one() -> None:
    cohort = made_cohort(4, 12)
    expected = sum(counted(cohort, str(patient)) for patient in np.unique(cohort.patients))
    np.testing.assert_allclose(summed(cohort), expected, atol=1e-12)
    assert KINDS == ("bridge", "teacher", "agreement")


def test_windows_without_a_label_count_for_the_agreement_alone() -> None:
    labels, teacher, predicted = np.array([-1, 0, 1, -1]), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    bridge, against_teacher, agreement = patient_tables(labels, teacher, predicted, 2)
    np.testing.assert_allclose(bridge, [[0, 0.25], [0, 0.25]])
    np.testing.assert_allclose(against_teacher, [[0.25, 0], [0, 0.25]])
    np.testing.assert_allclose(agreement, [[0.25, 0.25], [0, 0.5]])


def test_a_patient_of_one_cell_has_norm_one_and_one_of_no_window_none() -> None:
    ones = np.ones(7, np.int64)
    tables = patient_tables(ones, ones, ones, CLASSES)
    np.testing.assert_allclose(tables[:, 1, 1], 1 / np.sqrt(3))
    assert np.linalg.norm(tables) == pytest.approx(1.0)
    assert not patient_tables(ones[:0], ones[:0], ones[:0], CLASSES).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    patients=st.integers(0, 8),
    windows=st.integers(1, 30),
    classes=st.integers(2, CLASSES),
)
def test_one_patient_moves_the_sum_by_at_most_one(seed: int, patients: int, windows: int, classes: int) -> None:
    cohort = made_cohort(seed, patients, most_windows=windows, classes=classes)
    assert exceeded(summed, cohort, SENSITIVITY) == []


def test_the_bound_is_reached() -> None:
    assert max(move for _, move in moves(summed, made_cohort(1, 30, most_windows=1))) == pytest.approx(SENSITIVITY)


# Planted faults.


def windows_as_the_unit(cohort: Cohort) -> Array:
    """Every window counts one: a long recording counts more than a short one."""
    total = np.zeros((3, CLASSES, CLASSES))
    for i in range(len(cohort.patients)):
        row = slice(i, i + 1)
        total += patient_tables(cohort.labels[row], cohort.teacher[row], cohort.predicted[row], CLASSES)
    return total


def each_table_by_itself(cohort: Cohort) -> Array:
    """Three tables of norm one have a joint norm of the root of three."""
    total = np.zeros((3, CLASSES, CLASSES))
    for patient in np.unique(cohort.patients):
        tables = counted(cohort, str(patient))
        norms = np.sqrt((tables**2).sum(axis=(1, 2), keepdims=True))
        total += np.divide(tables, norms, out=np.zeros_like(tables), where=norms > 0)
    return total


def mean_over_patients(cohort: Cohort) -> Array:
    """Scaled up again by a public number, but divided by a private count."""
    patients = len(np.unique(cohort.patients))
    return summed(cohort) * 50 / max(1, patients)


def none_for_small_groups(cohort: Cohort) -> Array:
    """Zeros below a minimum: one patient decides about all the others."""
    return summed(cohort) * (len(np.unique(cohort.patients)) >= 6)


def labelled_windows_as_the_divisor(cohort: Cohort) -> Array:
    """Unscaled shares: the joint norm of a patient of one cell is the root of three."""
    total = np.zeros((3, CLASSES, CLASSES))
    for patient in np.unique(cohort.patients):
        own = cohort.patients == patient
        for k, (truth, guess) in enumerate(
            ((cohort.labels, cohort.predicted), (cohort.labels, cohort.teacher), (cohort.teacher, cohort.predicted))
        ):
            for t, g in zip(truth[own], guess[own], strict=True):
                if t >= 0:
                    total[k, t, g] += 1 / max(1, (truth[own] >= 0).sum())
    return total


@pytest.mark.parametrize(
    "fault",
    [
        windows_as_the_unit,
        each_table_by_itself,
        mean_over_patients,
        none_for_small_groups,
        labelled_windows_as_the_divisor,
    ],
)
def test_the_check_finds_a_planted_fault(fault: Callable[[Cohort], Array]) -> None:
    cohorts = [made_cohort(seed, 6, most_windows=4) for seed in range(5)]
    assert [name for cohort in cohorts for name in exceeded(fault, cohort, SENSITIVITY)]
    assert [name for cohort in cohorts for name in exceeded(summed, cohort, SENSITIVITY)] == []


# Intervals.


def true_shares(right: float) -> Array:
    """Cells of a population whose classes are of unequal size."""
    sizes = np.array([0.5, 0.3, 0.2])
    return sizes[:, None] * (right * np.eye(3) + (1 - right) / 2 * (1 - np.eye(3)))


@pytest.mark.parametrize("right", [0.55, 0.8, 0.95])
@pytest.mark.parametrize(("patients", "deviation"), [(150, 0.0), (150, 4.0), (40, 2.0)])
@pytest.mark.parametrize("figure", [balanced_accuracy, accuracy])
def test_intervals_cover_the_truth(
    right: float, patients: int, deviation: float, figure: Callable[[Array], Array]
) -> None:
    """Over 150 studies of patients with 12 windows each, a 95 % interval holds the population's figure in 19 of 20,
    less three standard errors."""
    rng = np.random.default_rng(5)
    shares = true_shares(right)
    truth, studies, held = float(figure(shares)), 150, 0
    for study in range(studies):
        # A patient's windows come from its own mixture of cells around the population's.
        mixtures = rng.dirichlet(6 * shares.ravel(), size=patients)
        tables = np.array([rng.multinomial(12, mixture) for mixture in mixtures]) / 12
        released = tables.sum(axis=0).reshape(3, 3) + rng.normal(size=(3, 3)) * deviation
        interval = noise_interval(released, deviation, figure, study, samples=400)
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    assert held >= 0.897 * studies, held / studies


def test_more_noise_and_fewer_patients_make_a_wider_interval() -> None:
    def width(patients: float, deviation: float) -> float:
        interval = noise_interval(patients * true_shares(0.8), deviation, balanced_accuracy, 1)
        assert interval is not None
        return interval[1] - interval[0]

    assert width(400, 1.0) < width(100, 1.0) < width(100, 5.0) < width(30, 5.0)
    # Without noise, the interval of a share p of n patients is about 2 x 1.96 sqrt(p (1 - p) / n) wide.
    interval = noise_interval(np.array([[160.0, 40.0], [0.0, 0.0]]), 0.0, accuracy, 3, samples=20_000)
    assert interval is not None
    np.testing.assert_allclose(interval[1] - interval[0], 2 * 1.96 * np.sqrt(0.8 * 0.2 / 200), rtol=0.05)


def test_an_interval_depends_on_released_numbers_and_the_seed_alone() -> None:
    table = 60 * true_shares(0.7)
    assert noise_interval(table, 2.0, accuracy, 4) == noise_interval(table.copy(), 2.0, accuracy, 4)
    assert noise_interval(table, 2.0, accuracy, 4) != noise_interval(table, 2.0, accuracy, 5)


def test_nothing_but_noise_has_a_wide_interval_and_no_table_none() -> None:
    drowned = noise_interval(np.full((3, 3), -2.0), 3.0, accuracy, 0)
    assert drowned is not None
    assert drowned[1] - drowned[0] > 0.5
    assert noise_interval(np.zeros((3, 3)), 0.0, accuracy, 0) is None


def test_the_deviation_is_the_noise_multiplier() -> None:
    assert metrics_deviation(PrivateMetrics(noise_multiplier=2.5)) == 2.5
    with pytest.raises(ValueError, match="noise_multiplier"):
        metrics_deviation(PrivateMetrics())
