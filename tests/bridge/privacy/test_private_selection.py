"""Groups of patients that score positions: against plain numpy, and one patient's reach, also of planted faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from bridge.job_privacy import PrivateSelection
from bridge.privacy.noise import NoiseSource
from bridge.privacy.selection import (
    bounded,
    group_sums,
    noise_deviation,
    probe_group_sums,
    sensitivity,
    similarity_group_sums,
)
from tests.bridge.privacy.sensitivity import Array, Cohort, exceeded, made_cohort, moves
from tests.bridge.reference import block_cka, hashed

KEY = "test.selection"
CLASSES, FOLDS = 3, 3


def group_of(patient: str, groups: int) -> int:
    return hashed(f"{KEY}/groups", "fold", patient) % groups


def plain_bounded(scores: Array, clip: float) -> Array:
    centred = scores - sum(scores) / len(scores)
    norm = np.sqrt(sum(c * c for c in centred))
    return centred if norm <= clip else centred * clip / norm


def probe(cohort: Cohort, groups: int, clip: float) -> Array:
    return probe_group_sums(
        cohort.new, cohort.teacher, cohort.patients, classes=CLASSES, folds=FOLDS, groups=groups, clip=clip, key=KEY
    )


def similarity(cohort: Cohort, groups: int, clip: float) -> Array:
    return similarity_group_sums(cohort.new[0], cohort.old, cohort.patients, groups=groups, clip=clip, key=KEY)


def members(cohort: Cohort, groups: int) -> list[np.ndarray]:
    """Each group's rows, by a hash that is written anew here."""
    which = np.array([group_of(str(name), groups) for name in cohort.patients])
    return [np.flatnonzero(which == g) for g in range(groups)]


def plain_probe(cohort: Cohort, rows: np.ndarray) -> Array | None:
    """A group's score at each position: refit of every fold, patients dealt by the rank of their hash."""
    names = sorted(set(cohort.patients[rows]))
    if len(names) < 2 or len(set(cohort.teacher[rows])) < 2:
        return None
    ranked = sorted(names, key=lambda name: hashed(KEY, "deal", str(name)))
    fold = np.array([ranked.index(name) % min(FOLDS, len(names)) for name in cohort.patients[rows]])
    scores = []
    for x in (x[rows] for x in cohort.new):
        y, guess = cohort.teacher[rows], np.empty(len(rows), np.int64)
        for f in range(fold.max() + 1):
            train = fold != f
            if len(set(y[train])) < 2:
                guess[~train] = y[train][0]
                continue
            mean, deviation = x[train].mean(0), x[train].std(0)
            model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=300, tol=1e-3)
            guess[~train] = model.fit((x[train] - mean) / deviation, y[train]).predict((x[~train] - mean) / deviation)
        scores.append(balanced_accuracy_score(y, guess))
    return np.array(scores)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("groups", "clip"), [(2, 10.0), (4, 0.1)])
def test_probe_sums_are_those_of_each_group_alone(seed: int, groups: int, clip: float) -> None:
    cohort = made_cohort(seed, 13)
    scores = [plain_probe(cohort, rows) for rows in members(cohort, groups)]
    expected = sum((plain_bounded(s, clip) for s in scores if s is not None), np.zeros(4))
    assert np.linalg.norm(expected) > 0.01
    np.testing.assert_allclose(probe(cohort, groups, clip), expected, atol=1e-12)


@pytest.mark.parametrize(("groups", "clip"), [(2, 10.0), (5, 0.1)])
def test_similarity_sums_are_those_of_each_group_alone(groups: int, clip: float) -> None:
    cohort = made_cohort(5, 14)
    expected = np.zeros(4)
    for rows in members(cohort, groups):
        if len(rows) >= 4:
            ckas = [block_cka([(cohort.new[0][rows], y[rows])]) for y in cohort.old]
            expected += plain_bounded(np.array(ckas), clip)
    assert np.linalg.norm(expected) > 0.05
    np.testing.assert_allclose(similarity(cohort, groups, clip), expected, atol=1e-9)


GROUPS, CLIPS = st.integers(2, 5), st.sampled_from([0.02, 0.1, 0.5])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), patients=st.integers(0, 7), groups=GROUPS, clip=CLIPS)
def test_one_patient_moves_the_probe_sums_by_at_most_twice_the_clip(
    seed: int, patients: int, groups: int, clip: float
) -> None:
    cohort = made_cohort(seed, patients, most_windows=5)
    assert exceeded(partial(probe, groups=groups, clip=clip), cohort, sensitivity(clip)) == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), patients=st.integers(0, 9), groups=GROUPS, clip=CLIPS)
def test_one_patient_moves_the_similarity_sums_by_at_most_twice_the_clip(
    seed: int, patients: int, groups: int, clip: float
) -> None:
    cohort = made_cohort(seed, patients)
    assert exceeded(partial(similarity, groups=groups, clip=clip), cohort, sensitivity(clip)) == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_group_that_gains_or_loses_its_last_patients_changes_nothing_else(size: int) -> None:
    """Neighbours at the edge: 0 or 1, 1 or 2 (the least that a probe can judge), 2 or 3 patients in a group."""
    groups, clip = 3, 0.1
    everyone = made_cohort(11, 24, most_windows=5)
    names = [str(n) for n in np.unique(everyone.patients)]
    edge = [n for n in names if group_of(n, groups) == 0][:size]
    others = [n for n in names if group_of(n, groups) != 0]
    cohort = everyone
    for name in sorted(set(names) - set(edge) - set(others)):
        cohort = cohort.without(name)
    alone = cohort
    for name in edge:
        alone = alone.without(name)
    for compute in (probe, similarity):
        rest = compute(alone, groups, clip)
        smaller = compute(cohort.without(edge[0]), groups, clip)
        whole = compute(cohort, groups, clip)
        # The other groups' part is the same, so what is left over is one vector of the ball.
        assert np.linalg.norm(whole - rest) <= clip * (1 + 1e-9)
        assert np.linalg.norm(smaller - rest) <= clip * (1 + 1e-9)
        assert np.linalg.norm(whole - smaller) <= sensitivity(clip) * (1 + 1e-9)
    if size == 1:
        np.testing.assert_array_equal(probe(cohort, groups, clip), probe(alone, groups, clip))


def test_a_group_alone_decides_about_itself() -> None:
    """Taking a patient away leaves every other group's vector the same to the last bit."""
    groups, clip = 4, 0.1
    cohort = made_cohort(3, 12)
    gone = str(cohort.patients[0])
    own = group_of(gone, groups)
    for compute in (probe, similarity):
        for g in range(groups):
            rows = members(cohort, groups)[g]
            keep = np.unique(cohort.patients[rows])
            part = cohort
            for name in set(np.unique(cohort.patients)) - set(keep):
                part = part.without(str(name))
            same = np.array_equal(compute(part, groups, clip), compute(part.without(gone), groups, clip))
            assert same or g == own


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_costs_its_own_group_its_say_and_nothing_more(value: float) -> None:
    groups, clip = 4, 0.1
    cohort = made_cohort(7, 16)
    for compute, arrays in ((probe, cohort.new), (similarity, cohort.old)):
        whole = compute(cohort, groups, clip)
        kept = arrays[2][0, 1]
        arrays[2][0, 1] = value
        spoilt = compute(cohort, groups, clip)
        arrays[2][0, 1] = kept
        assert np.isfinite(spoilt).all()
        assert 0 < np.linalg.norm(spoilt - whole) <= clip * (1 + 1e-9)


def test_a_score_that_fails_or_has_another_shape_counts_as_zeros() -> None:
    patients = np.array([f"p{i}" for i in range(30)])

    def broken(rows: np.ndarray) -> Array:
        if "p3" in patients[rows]:
            raise MemoryError
        return np.arange(5.0) if "p4" in patients[rows] else np.array([0.0, 1.0, 2.0])

    found = group_sums(patients, 3, broken, groups=8, clip=1.0, key=KEY)
    silent = {group_of("p3", 8), group_of("p4", 8)}
    speaking = {group_of(str(p), 8) for p in patients} - silent
    np.testing.assert_allclose(found, len(speaking) * np.array([-1, 0, 1]) / np.sqrt(2), rtol=1e-12)


def test_no_patient_gives_zeros_of_the_same_shape() -> None:
    nobody = made_cohort(1, 0)
    for compute in (probe, similarity):
        found = compute(nobody, 8, 0.1)
        np.testing.assert_array_equal(found, np.zeros(4))


def test_bounded_centres_then_scales_down_and_never_up() -> None:
    np.testing.assert_allclose(bounded(np.array([1.0, 2.0, 3.0]), 5.0), [-1, 0, 1])
    np.testing.assert_allclose(bounded(np.array([1.0, 2.0, 3.0]), 1.0), np.array([-1, 0, 1]) / np.sqrt(2))
    np.testing.assert_allclose(bounded(np.full(3, 0.7), 0.1), np.zeros(3), atol=1e-15)
    np.testing.assert_array_equal(bounded(np.array([0.1, np.nan, 0.3]), 0.1), np.zeros(3))


def test_the_noise_has_the_claimed_deviation() -> None:
    plan = PrivateSelection(noise_multiplier=3.0, clip=0.25)
    claimed = 3.0 * 2 * 0.25
    assert noise_deviation(plan) == claimed
    drawn = NoiseSource.seeded(4, "ks").normal(20_000, noise_deviation(plan))
    assert kstest(drawn / claimed, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(drawn / (claimed * wrong), "norm").pvalue < 1e-12
    with pytest.raises(ValueError, match="noise_multiplier"):
        noise_deviation(PrivateSelection(epsilon=1.0))


# Planted faults. Each is the same computation with one rule broken, and the check must name somebody. The score is a
# quick one: the share of a position's variance that lies between the classes, for groups of at least two patients.


def quick_scores(cohort: Cohort, rows: np.ndarray) -> Array:
    if len(np.unique(cohort.patients[rows])) < 2:
        return np.zeros(len(cohort.new))
    y = cohort.teacher[rows]
    shares = []
    for x in (x[rows] for x in cohort.new):
        middle = np.stack([x[y == c].mean(axis=0) for c in y])
        shares.append(middle.var(axis=0).sum() / x.var(axis=0).sum())
    return np.array(shares)


def sound(cohort: Cohort, groups: int, clip: float) -> Array:
    """No fault: the product's own sum of the quick scores."""
    score = partial(quick_scores, cohort)
    return group_sums(cohort.patients, len(cohort.new), score, groups=groups, clip=clip, key=KEY)


def _summed(cohort: Cohort, which: np.ndarray, groups: int, clip: float) -> Array:
    rows = [np.flatnonzero(which == g) for g in range(groups)]
    return sum((plain_bounded(quick_scores(cohort, r), clip) for r in rows if len(r)), np.zeros(4))


def by_permutation(cohort: Cohort, groups: int, clip: float) -> Array:
    """Groups from a shuffle of the list: one patient less, and everybody is somewhere else."""
    names = np.unique(cohort.patients)
    order = np.random.default_rng(0).permutation(len(names))
    return _summed(cohort, (order % groups)[np.searchsorted(names, cohort.patients)], groups, clip)


def by_rank(cohort: Cohort, groups: int, clip: float) -> Array:
    """Groups of equal size by the rank of the hash: a patient less moves all that follow."""
    names = sorted(np.unique(cohort.patients), key=lambda name: hashed(KEY, "deal", str(name)))
    return _summed(cohort, np.array([names.index(name) % groups for name in cohort.patients]), groups, clip)


def unclipped(cohort: Cohort, groups: int, clip: float) -> Array:
    return sum((plain_bounded(quick_scores(cohort, r), 1e9) for r in members(cohort, groups) if len(r)), np.zeros(4))


def uncentred(cohort: Cohort, groups: int, clip: float) -> Array:
    """Scores that were never centred, scaled as if they had been."""
    total = np.zeros(4)
    for rows in members(cohort, groups):
        scores = quick_scores(cohort, rows)
        norm = np.linalg.norm(scores - scores.mean())
        total += scores * min(1.0, clip / norm) if norm > 0 else scores
    return total


def times_patients(cohort: Cohort, groups: int, clip: float) -> Array:
    """A group's say grows with its patients: a private count outside the clip."""
    total = np.zeros(4)
    for rows in members(cohort, groups):
        total += len(np.unique(cohort.patients[rows])) * plain_bounded(quick_scores(cohort, rows), clip)
    return total


def all_silent_for_one(cohort: Cohort, groups: int, clip: float) -> Array:
    """A group that can't be scored takes the whole answer with it."""
    small = any(0 < len(np.unique(cohort.patients[rows])) < 2 for rows in members(cohort, groups))
    return np.zeros(4) if small else sound(cohort, groups, clip)


FAULTS = (
    by_permutation,
    by_rank,
    unclipped,
    uncentred,
    times_patients,
    all_silent_for_one,
)
COHORTS = [made_cohort(seed, 18 + seed, signal=3.0 * (seed % 2), most_windows=5) for seed in range(6)]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_a_planted_fault(fault: Callable[[Cohort, int, float], Array]) -> None:
    clip = 0.05
    assert [n for cohort in COHORTS for n in exceeded(partial(fault, groups=9, clip=clip), cohort, 2 * clip)]


def test_the_check_finds_nothing_where_there_is_no_fault() -> None:
    clip = 0.05
    compute = partial(sound, groups=9, clip=clip)
    assert [n for cohort in COHORTS for n in exceeded(compute, cohort, sensitivity(clip))] == []
    assert max(move for cohort in COHORTS for _, move in moves(compute, cohort)) > clip


def test_the_bound_is_reached() -> None:
    """By a group whose vector turns round when a patient leaves: less than 2R would not hold."""
    cohort = made_cohort(2, 6)

    def turning(rows: np.ndarray) -> Array:
        return np.arange(4.0) * (-1) ** len(np.unique(cohort.patients[rows]))

    def compute(groups_cohort: Cohort) -> Array:
        nonlocal cohort
        cohort = groups_cohort
        return group_sums(cohort.patients, 4, turning, groups=2, clip=0.3, key=KEY)

    start = cohort
    assert max(move for _, move in moves(compute, start)) == pytest.approx(sensitivity(0.3))
