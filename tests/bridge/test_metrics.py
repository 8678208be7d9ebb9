"""Metrics from confusion matrices against scikit-learn on the windows themselves."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from bridge.metrics import accuracy, balanced_accuracy, confusion_matrix, f1_macro, f1_weighted


def cases() -> list[tuple[np.ndarray, np.ndarray, int]]:
    rng = np.random.default_rng(0)
    out = [(rng.integers(0, k, n), rng.integers(0, k, n), k) for k in (2, 3, 5) for n in (1, 2, 7, 200)]
    labels = rng.integers(0, 2, 50)
    out.append((labels, rng.integers(0, 3, 50), 4))  # one class never a label, one in neither
    out.append((rng.integers(0, 3, 50), np.zeros(50, dtype=int), 3))  # two classes never predicted
    out.append((np.zeros(5, dtype=int), np.ones(5, dtype=int), 2))  # all wrong, one class
    return out


@pytest.mark.parametrize("case", cases())
def test_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    labels, predicted, classes = case
    confusion = confusion_matrix(labels, predicted, classes)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(labels, predicted, labels=range(classes)))
    assert confusion.dtype == np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = (
            (balanced_accuracy, sk.balanced_accuracy_score(labels, predicted)),
            (f1_macro, sk.f1_score(labels, predicted, average="macro", zero_division=0)),
            (f1_weighted, sk.f1_score(labels, predicted, average="weighted", zero_division=0)),
            (accuracy, sk.accuracy_score(labels, predicted)),
        )
    for function, value in expected:
        assert float(function(confusion)) == pytest.approx(value, abs=1e-12), function.__name__


@pytest.mark.parametrize("function", [balanced_accuracy, f1_macro, f1_weighted, accuracy])
def test_leading_axes_are_one_call_for_each(function) -> None:
    stack = np.random.default_rng(1).integers(0, 9, size=(4, 6, 3, 3))
    stack[0, 0, 1] = 0
    found = function(stack)
    assert found.shape == (4, 6)
    for i in range(4):
        for j in range(6):
            assert found[i, j] == function(stack[i, j])


@pytest.mark.parametrize("function", [balanced_accuracy, f1_macro, f1_weighted, accuracy])
def test_no_windows_have_no_figure(function) -> None:
    assert np.isnan(function(np.zeros((3, 3), np.int64)))
    both = np.stack([np.zeros((2, 2)), np.eye(2)])
    np.testing.assert_array_equal(function(both), [np.nan, 1.0])


def test_windows_without_a_label_are_left_out() -> None:
    labels, predicted = np.array([-1, 0, 1, -1, 1]), np.array([0, 0, 1, 1, 0])
    np.testing.assert_array_equal(confusion_matrix(labels, predicted, 2), [[1, 0], [1, 1]])
