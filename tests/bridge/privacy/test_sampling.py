"""Poisson draws of patients: rates, independence, windows, and that other patients do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from bridge.errors import ConfigError
from bridge.privacy.accounting import Release
from bridge.privacy.sampling import EMPTY, PatientSampler

KEY = bytes(range(32))


def release(rate: float = 0.3, count: int = 1) -> Release:
    return Release("training", "pair", 1.0, rate, count)


def table(windows: dict[str, int]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Rows of patients with so many windows each, patients in the given order."""
    patients = np.array([name for name, count in windows.items() for _ in range(count)], dtype=np.str_)
    return patients, np.arange(len(patients), dtype=np.int64)


def named(windows: dict[str, int], rate: float, count: int, width: int, key: bytes = KEY) -> list[dict[str, list[int]]]:
    """Each draw as patient to the numbers of own windows, counted within the patient; asserts its form."""
    patients, order = table(windows)
    first = {name: int(np.flatnonzero(patients == name)[0]) for name in windows if windows[name]}
    found = []
    for batch in PatientSampler(release(rate, count), key).draws(patients, order, width):
        assert batch.dtype == np.int64
        assert batch.shape[1:] == (width,)
        draw = {}
        for rows in batch:
            taken = rows[rows != EMPTY]
            (name,) = set(patients[taken].tolist())
            assert len(set(taken.tolist())) == len(taken) == min(width, windows[name])
            assert (rows[len(taken) :] == EMPTY).all()
            assert name not in draw
            draw[name] = [int(row) - first[name] for row in taken]
        found.append(draw)
    assert len(found) == count
    return found


def test_the_sampler_tells_the_release_that_it_draws() -> None:
    asked = release(0.25, 7)
    sampler = PatientSampler(asked, KEY)
    assert sampler.release is asked
    assert len(list(sampler.draws(*table({"a": 3}), 2))) == 7


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_patients_are_drawn_independently_at_the_rate(rate: float) -> None:
    steps, names = 2000, [f"p{i}" for i in range(12)]
    draws = named(dict.fromkeys(names, 1), rate, steps, 1, bytes(range(1, 33)))
    present = np.array([[name in draw for name in names] for draw in draws], dtype=float)
    error = np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(present.mean(axis=0) - rate).max() < 5 * error
    # How many are drawn at once is binomial: a fixed number, or patients drawn together, would show.
    sizes = np.bincount(present.sum(axis=1).astype(int), minlength=13)
    expected = stats.binom(12, rate).pmf(np.arange(13)) * steps
    common = expected > 5
    statistic = ((sizes - expected)[common] ** 2 / expected[common]).sum()
    assert stats.chi2(common.sum() - 1).sf(statistic) > 1e-5
    between = np.corrcoef(present.T)[np.triu_indices(12, 1)]
    assert np.abs(between).max() < 5 / np.sqrt(steps)
    following = [np.corrcoef(present[1:, i], present[:-1, i])[0, 1] for i in range(12)]
    assert np.abs(following).max() < 5 / np.sqrt(steps)


def test_windows_are_chosen_uniformly_and_anew() -> None:
    draws = named({"a": 6, "b": 2}, 1.0, 3000, 2)
    chosen = np.zeros((6, 6))
    for draw in draws:
        chosen[tuple(draw["a"])] += 1
        assert sorted(draw["b"]) == [0, 1]
    assert np.diag(chosen).sum() == 0
    pairs = chosen[~np.eye(6, dtype=bool)]
    assert stats.chisquare(pairs).pvalue > 1e-5


def test_at_rate_one_everybody_is_drawn_each_time() -> None:
    assert all(set(draw) == {"a", "b", "c"} for draw in named({"b": 1, "a": 2, "c": 9}, 1.0, 50, 3))


@pytest.mark.parametrize("windows", [{}, {"a": 4}])
def test_a_site_of_nobody_and_a_draw_of_nobody_have_the_same_shape(windows: dict[str, int]) -> None:
    draws = list(PatientSampler(release(1e-9, 3), KEY).draws(*table(windows), 4))
    assert [draw.shape for draw in draws] == [(0, 4)] * 3


@settings(max_examples=60, deadline=None)
@given(
    windows=st.dictionaries(st.text("abcé-1", min_size=1, max_size=4), st.integers(1, 6), max_size=8),
    other=st.text("xyz", min_size=1, max_size=3),
    count=st.integers(1, 6),
    rate=st.floats(0.05, 1.0),
    shuffle=st.randoms(use_true_random=False),
)
def test_other_patients_do_not_matter(
    windows: dict[str, int], other: str, count: int, rate: float, shuffle: object
) -> None:
    """With one key, neighbours draw their common patients and those patients' windows alike, in whatever order."""
    base = named(windows, rate, 4, 3)
    items = [*windows.items(), (other, count)]
    shuffle.shuffle(items)  # type: ignore[attr-defined]
    neighbour = named(dict(items), rate, 4, 3)
    assert [{name: rows for name, rows in draw.items() if name != other} for draw in neighbour] == base


def test_another_key_draws_others() -> None:
    windows = {f"p{i}": 5 for i in range(40)}
    assert named(windows, 0.5, 1, 2) == named(windows, 0.5, 1, 2)
    assert set(named(windows, 0.5, 1, 2)[0]) != set(named(windows, 0.5, 1, 2, bytes(32))[0])


def test_the_order_of_rows_is_the_patients_own() -> None:
    """Rows are taken by `order`, wherever they lie in the table."""
    patients = np.array(["b", "a", "b", "a", "a"])
    order = np.array([4, 0, 1, 2, 3])
    compact = np.array(["a", "a", "a", "b", "b"])
    (mixed,) = PatientSampler(release(1.0), KEY).draws(patients, order, 3)
    (sorted_,) = PatientSampler(release(1.0), KEY).draws(compact, np.arange(5), 3)
    back = np.array([4, 1, 3, 0, 2, EMPTY])
    np.testing.assert_array_equal(mixed, back[sorted_])


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 16 bytes"):
        PatientSampler(release(), bytes(16))
