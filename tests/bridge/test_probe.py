"""The stage 1 probe: bounded, by patient, and defined where nothing can be judged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bridge.errors import SelectionError
from bridge.messages import moments_length
from bridge.probe import probe_moments, probe_scores, scores_from_moments
from tests.bridge.reference import hashed

KEY = "k"


def cohort(seed: int, patients: int = 30, windows: int = 10, classes: int = 3, width: int = 12, signal: float = 1.0):
    rng = np.random.default_rng(seed)
    who = np.repeat([f"p{i:02d}" for i in range(patients)], windows)
    labels = rng.integers(0, classes, len(who))
    x = rng.normal(size=(len(who), width)) + signal * rng.normal(size=(classes, width))[labels] * 0.4
    return x.astype(np.float32), labels, who


def test_equals_a_pipeline_of_scikit_learn_over_the_same_folds() -> None:
    x, labels, who = cohort(1, patients=23)
    names = sorted(set(who), key=lambda name: hashed(KEY, "deal", name))
    fold = np.array([names.index(name) % 5 for name in who])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3))
    predicted = cross_val_predict(pipeline, x.astype(np.float64), labels, cv=PredefinedSplit(fold))
    expected = balanced_accuracy_score(labels, predicted)
    assert 0.5 < expected < 0.95
    assert probe_scores([x], labels, who, 3, 5, KEY)[0] == pytest.approx(expected, abs=0.01)


def test_scores_order_positions_by_what_they_hold() -> None:
    x, labels, who = cohort(2)
    noise = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    perfect = np.eye(3, dtype=np.float32)[labels]
    scores = probe_scores([noise, x, perfect], labels, who, 3, 5, KEY)
    assert scores.dtype == np.float64
    assert scores[2] == 1.0
    assert scores[0] < 0.45 < scores[1] < 1.0


def test_a_patient_never_teaches_about_itself() -> None:
    """Each patient has one class and its own signature: windows dealt at random would score near 1."""
    rng = np.random.default_rng(4)
    who = np.repeat([f"p{i}" for i in range(40)], 10)
    labels = np.repeat(rng.integers(0, 2, 40), 10)
    x = (np.repeat(rng.normal(size=(40, 60)), 10, axis=0) + 0.05 * rng.normal(size=(400, 60))).astype(np.float32)
    by_window = cross_val_predict(LogisticRegression(max_iter=500), x, labels, cv=5)
    shuffled = rng.permutation(400)
    by_window = cross_val_predict(LogisticRegression(max_iter=500), x[shuffled], labels[shuffled], cv=5)
    assert balanced_accuracy_score(labels[shuffled], by_window) > 0.95
    assert probe_scores([x], labels, who, 2, 5, KEY)[0] < 0.7


def test_rows_may_come_in_any_order_and_calls_repeat() -> None:
    x, labels, who = cohort(5)
    other = x[:, ::-1] ** 2
    first = probe_scores([x, other], labels, who, 3, 5, KEY)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(who))
        again = probe_scores([x[order], other[order]], labels[order], who[order], 3, 5, KEY)
        np.testing.assert_array_equal(again, first)


def test_positions_do_not_depend_on_each_other() -> None:
    x, labels, who = cohort(6)
    other = np.random.default_rng(0).normal(size=(len(who), 7)).astype(np.float32)
    both = probe_scores([other, x], labels, who, 3, 5, KEY)
    assert both[1] == pytest.approx(probe_scores([x], labels, who, 3, 5, KEY)[0], abs=1e-9)


def test_where_nothing_can_be_judged_the_score_is_neutral() -> None:
    x, labels, who = cohort(7)
    neutral = np.array([1 / 3])
    np.testing.assert_array_equal(probe_scores([x], np.zeros_like(labels), who, 3, 5, KEY), neutral)
    np.testing.assert_array_equal(probe_scores([x], labels, np.full_like(who, "p00"), 3, 5, KEY), neutral)
    np.testing.assert_array_equal(probe_scores([np.full_like(x, 0.1)], labels, who, 3, 5, KEY), neutral)
    np.testing.assert_array_equal(probe_scores([np.zeros_like(x)], labels, who, 3, 5, KEY), neutral)


def test_few_patients_and_absent_classes_still_score() -> None:
    x, labels, who = cohort(8, patients=3, signal=6.0)
    assert probe_scores([x], labels, who, 3, 5, KEY)[0] > 0.9
    two = np.where(labels == 2, 0, labels)
    assert 0.9 < probe_scores([np.eye(3, dtype=np.float32)[two]], two, who, 3, 5, KEY)[0] <= 1.0
    # Two patients with a class each: every training fold holds one class, so all predictions are wrong.
    half = np.repeat([0, 1], 10)
    assert probe_scores([x[:20]], half, who[:20], 2, 5, KEY)[0] == 0.0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 999)
)
def test_scores_are_bounded(patients: int, windows: int, classes: int, width: int, folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    who = np.repeat([f"p{i}" for i in range(patients)], windows)
    labels = rng.integers(0, classes, len(who))
    x = rng.integers(-1, 2, size=(len(who), width)).astype(np.float32) * 10.0 ** rng.integers(-20, 20)
    scores = probe_scores([x, np.zeros((len(who), 2))], labels, who, classes, folds, KEY)
    assert np.isfinite(scores).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_input_that_is_no_table_of_windows_is_refused() -> None:
    x, labels, who = cohort(9)
    broken = x.copy()
    broken[3, 2] = np.nan
    for features, y, p, why in (
        ([broken], labels, who, "NaN or infinity"),
        ([x[:-1]], labels, who, "features of shapes"),
        ([x], labels, who[:-1], "patient ids"),
        ([], labels, who, "features of shapes"),
        ([x[:0]], labels[:0], who[:0], "0 pseudo-labels"),
        ([x], labels + 1, who, "outside 0 to 2"),
        ([x], labels - 1, who, "outside 0 to 2"),
    ):
        for call in (probe_scores, probe_moments):
            with pytest.raises(SelectionError) as caught:
                call(features, y, p, 3, 5, KEY)
            assert why in caught.value.why


def test_moments_are_laid_out_as_declared() -> None:
    x, labels, who = cohort(10, patients=8, width=4)
    y = x[:, :2]
    flat = probe_moments([x, y], labels, who, 3, 3, KEY)
    assert flat.dtype == np.float64
    assert flat.shape == (3 * moments_length(4, 3) + 3 * moments_length(2, 3),)
    fold = np.array([hashed(KEY, "fold", name) % 3 for name in who])
    at = 0
    for features in (x, y):
        for f in range(3):
            own = fold == f
            extended = np.array([[*row, 1.0] for row in features[own].astype(np.float64)]).reshape(own.sum(), -1)
            width = features.shape[1] + 1
            for i in range(width):
                for j in range(i, width):
                    assert flat[at] == pytest.approx(sum(r[i] * r[j] for r in extended), abs=1e-9)
                    at += 1
            for i in range(width):
                for c in range(3):
                    expected = sum(r[i] for r, label in zip(extended, labels[own], strict=True) if label == c)
                    assert flat[at] == pytest.approx(expected, abs=1e-9)
                    at += 1
    assert at == len(flat)


def test_moments_add_over_any_split_of_the_rows() -> None:
    x, labels, who = cohort(11)
    whole = probe_moments([x], labels, who, 3, 5, KEY)
    left = np.random.default_rng(0).random(len(who)) < 0.3
    parts = [probe_moments([x[rows]], labels[rows], who[rows], 3, 5, KEY) for rows in (left, ~left)]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=0, atol=1e-9)


def test_scores_from_moments_know_perfect_useless_and_constant_features() -> None:
    _, labels, who = cohort(12, patients=60)
    perfect = np.eye(3)[labels]
    noise = np.random.default_rng(1).normal(size=(len(who), 3))
    constant = np.full((len(who), 2), 0.7)
    flat = probe_moments([perfect, noise, constant], labels, who, 3, 5, KEY)
    scores = scores_from_moments(flat, [3, 3, 2], 3, 5, 1e-6)
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert -0.05 < scores[1] < 0.02
    assert scores[2] == pytest.approx(0.0, abs=1e-9)


def test_moments_that_cannot_be_judged_are_refused() -> None:
    x, labels, who = cohort(13, width=4)
    one_class = probe_moments([x], np.zeros_like(labels), who, 3, 5, KEY)
    one_patient = probe_moments([x], labels, np.full_like(who, "p00"), 3, 5, KEY)
    for flat in (one_class, one_patient):
        with pytest.raises(SelectionError, match="can't be judged"):
            scores_from_moments(flat, [4], 3, 5, 1e-2)
    with pytest.raises(SelectionError, match="do not fit"):
        scores_from_moments(one_class[:-1], [4], 3, 5, 1e-2)
