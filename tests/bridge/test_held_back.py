"""Who is held back, and what they say of a fit, against figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bridge.errors import SelectionError
from bridge.held_back import Judgement, best_epoch, counts_by_patient, held_back, judge


def of(*patients: tuple[int, int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Counts of one epoch from each patient's (right a, a taken for b, b taken for a, right b)."""
    return np.array(patients, np.int64).reshape(-1, 2, 2)


def test_a_share_of_whole_patients_whatever_the_order_of_rows() -> None:
    patients = np.array([f"p{i % 44:02d}" for i in range(440)])
    rows = held_back(patients, 0.25, seed=3)
    aside = set(patients[rows])
    assert len(aside) == 11  # as 33 to 11
    assert not aside & set(patients[~rows])
    order = np.random.default_rng(0).permutation(440)
    assert set(patients[order][held_back(patients[order], 0.25, seed=3)]) == aside
    assert set(patients[held_back(patients, 0.25, seed=4)]) != aside


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.99, 3)])
def test_at_least_one_patient_on_either_side(share: float, number: int) -> None:
    patients = np.array(["a", "b", "c", "d"])
    assert held_back(patients, share, seed=0).sum() == number


def test_one_patient_is_too_few() -> None:
    with pytest.raises(SelectionError, match="too few patients"):
        held_back(np.array(["a", "a"]), 0.5, seed=0)


def test_counts_are_by_patient() -> None:
    patients = np.array(["x", "y", "x", "y", "y"])
    found = counts_by_patient(patients, np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 1]), 2, seed=0)
    x, y = [[1, 0], [1, 0]], [[0, 1], [0, 2]]
    assert sorted(found.tolist()) == sorted([x, y])


def test_the_first_of_the_best_epochs() -> None:
    bad, good = of((1, 1, 1, 1)), of((2, 0, 0, 2))
    assert best_epoch(np.stack([bad, good, good, bad])) == 1


def test_each_half_judges_the_epoch_that_the_other_chose() -> None:
    """Epoch 0 is right on patient 0 and wrong on patient 1, epoch 1 the other way round: whoever chooses by both sees
    one of two right; crossed, each is judged by the epoch that is wrong on it."""
    counts = np.stack([of((1, 0, 0, 1), (0, 1, 1, 0)), of((0, 1, 1, 0), (1, 0, 0, 1))])
    assert judge(counts, choosing=True, seed=0) == Judgement(0.0, None, 0.5)
    assert judge(counts, choosing=False, seed=0) == Judgement(0.5, None, 0.5)


def test_one_held_back_patient_has_no_other_half() -> None:
    counts = np.stack([of((1, 1, 0, 2)), of((1, 1, 1, 1))])
    assert judge(counts, choosing=True, seed=0) == Judgement(0.75, None, 0.5)


def test_the_interval_is_of_whole_patients() -> None:
    """Three of six patients all right, three all wrong: a resample with k right ones has k / 6."""
    counts = of(*[(2, 0, 0, 2)] * 3, *[(0, 2, 2, 0)] * 3)[None]
    found = judge(counts, choosing=False, seed=0)
    assert found.balanced_accuracy == 0.5
    assert found.interval is not None
    np.testing.assert_allclose(found.interval, (1 / 6, 5 / 6))  # binomial(6, 1/2): 1.6 % of the resamples have none
    assert judge(counts[:, 1:5], choosing=False, seed=0).interval is None


def test_resamples_without_a_class_are_left_out() -> None:
    """One patient of five has class b at all, and it is never recognised: without that patient the rest would be 1."""
    counts = of((2, 0, 0, 0), (2, 0, 0, 0), (2, 0, 0, 0), (2, 0, 0, 0), (0, 0, 2, 0))[None]
    found = judge(counts, choosing=False, seed=0)
    assert found == Judgement(0.5, (0.5, 0.5), 0.5)


def test_chance_counts_the_classes_that_occur() -> None:
    assert judge(of(*[(2, 0, 0, 0)] * 5)[None], choosing=False, seed=0).chance == 1.0
