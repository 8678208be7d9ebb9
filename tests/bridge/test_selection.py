"""Shared rules of selection, and both federated forms on data with a planted best position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from bridge.cka import scores_from_similarity_moments, similarity_moments, similarity_scores
from bridge.errors import SelectionError
from bridge.probe import probe_moments, probe_scores, scores_from_moments
from bridge.selection import cap_windows, choose_position, fold_of
from tests.bridge.reference import block_cka, hashed, ridge_score

CLASSES, FOLDS, RIDGE, KEY = 3, 5, 1e-2, "study-7"
SIZES = (6, 9, 14, 25)
"""Patients of four unequal sites."""


@dataclass
class SiteData:
    new: list[np.ndarray]
    old: list[np.ndarray]
    labels: np.ndarray
    patients: np.ndarray


def make_sites(seed: int, best_new: int, best_old: int, positions: int = 5, width: int = 16) -> list[SiteData]:
    """Windows with a class and patient effects; the planted positions carry the class or the latent most clearly."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(positions, CLASSES, width)) / np.sqrt(width)
    latent_new = rng.normal(size=(6, width))
    latent_old = rng.normal(size=(positions, 6, width))
    sites = []
    for index, count in enumerate(SIZES):
        patients = np.repeat([f"site{index}-p{i}" for i in range(count)], 8)
        labels = rng.integers(0, CLASSES, len(patients))
        person = np.repeat(rng.normal(size=(count, width)), 8, axis=0)
        latent = rng.normal(size=(len(patients), 6))
        new, old = [], []
        for i in range(positions):
            noise = rng.normal(size=(len(patients), width)) + 0.5 * person
            signal = 4.0 if i == best_new else 2.2
            new.append((signal * directions[i][labels] + latent @ latent_new * 0.3 + noise + 3.0).astype(np.float32))
            noise = rng.normal(size=(len(patients), width)) * (2.0 if i == best_old else 4.0)
            old.append((latent @ latent_old[i] + noise - 2.0).astype(np.float32))
        sites.append(SiteData(new, old, labels, patients))
    return sites


def summed_scores(sites: list[SiteData]) -> np.ndarray:
    parts = [probe_moments(s.new, s.labels, s.patients, CLASSES, FOLDS, KEY) for s in sites]
    return scores_from_moments(np.sum(parts, axis=0), [x.shape[1] for x in sites[0].new], CLASSES, FOLDS, RIDGE)


def test_moments_equal_one_machine_with_all_data_on_unequal_sites() -> None:
    sites = make_sites(11, best_new=3, best_old=1)
    probe = summed_scores(sites)
    labels = np.concatenate([s.labels for s in sites])
    patients = np.concatenate([s.patients for s in sites])
    reference = np.array(
        [
            ridge_score(np.concatenate([s.new[i] for s in sites]), labels, patients, CLASSES, FOLDS, KEY, RIDGE)
            for i in range(5)
        ]
    )
    np.testing.assert_allclose(probe, reference, rtol=0, atol=1e-6)
    m = choose_position(probe)
    assert m == int(np.argmax(reference)) == 3

    summed = np.sum([similarity_moments(s.new[m], s.old) for s in sites], axis=0)
    similarity = scores_from_similarity_moments(summed)
    blocks = np.array([block_cka([(s.new[m], s.old[i]) for s in sites]) for i in range(5)])
    np.testing.assert_allclose(similarity, blocks, rtol=0, atol=1e-6)
    assert choose_position(similarity) == int(np.argmax(blocks)) == 1


def test_moments_survive_a_large_common_offset() -> None:
    """Raw features whose mean is a thousand times their spread: float64 sums must not lose the scores."""
    sites = make_sites(12, best_new=2, best_old=4)
    for site in sites:
        site.new = [x.astype(np.float64) + 1000.0 for x in site.new]
    labels = np.concatenate([s.labels for s in sites])
    patients = np.concatenate([s.patients for s in sites])
    for i, score in enumerate(summed_scores(sites)):
        pooled = np.concatenate([s.new[i] for s in sites])
        assert score == pytest.approx(ridge_score(pooled, labels, patients, CLASSES, FOLDS, KEY, RIDGE), abs=1e-6)


def test_both_forms_find_a_planted_position() -> None:
    found = {"probe scores": 0, "probe moments": 0, "similarity scores": 0, "similarity moments": 0}
    for seed in range(10):
        best_new, best_old = seed % 4, (seed * 3 + 1) % 4
        sites = make_sites(seed, best_new, best_old, positions=4)
        averaged = np.mean([probe_scores(s.new, s.labels, s.patients, CLASSES, 3, KEY) for s in sites], axis=0)
        found["probe scores"] += choose_position(averaged) == best_new
        found["probe moments"] += choose_position(summed_scores(sites)) == best_new
        averaged = np.mean([similarity_scores(s.new[best_new], s.old) for s in sites], axis=0)
        found["similarity scores"] += choose_position(averaged) == best_old
        summed = np.sum([similarity_moments(s.new[best_new], s.old) for s in sites], axis=0)
        found["similarity moments"] += choose_position(scores_from_similarity_moments(summed)) == best_old
    assert min(found.values()) >= 9, found


def test_a_fold_is_a_keyed_hash_of_the_patient() -> None:
    names = [f"patient-{i}" for i in range(2000)] + ["Ünal"]
    folds = [fold_of(name, 5, "a key") for name in names]
    assert folds == [hashed("a key", "fold", name) % 5 for name in names]
    counts = np.bincount(folds, minlength=5)
    assert counts.min() > 330
    assert counts.max() < 470
    assert [fold_of(name, 5, "another") for name in names] != folds


def test_capped_windows_are_few_even_and_of_each_patient() -> None:
    patients = np.array(["a"] * 100 + ["b"] * 7 + ["c"] * 16)
    rows = cap_windows(patients, 16, KEY)
    assert {p: int((patients[rows] == p).sum()) for p in "abc"} == {"a": 16, "b": 7, "c": 16}
    assert (np.diff(rows) > 0).all()
    gaps = np.diff(rows[patients[rows] == "a"])
    assert set(gaps) <= {6, 7}


def test_a_patients_windows_do_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(["a", "b", "c"], [50, 40, 3])
    shuffled = rng.permutation(patients)
    for name in "abc":
        alone = cap_windows(np.full(int((patients == name).sum()), name), 8, KEY)
        for table in (patients, shuffled):
            own = np.flatnonzero(table == name)
            rows = cap_windows(table, 8, KEY)
            np.testing.assert_array_equal(rows[table[rows] == name], own[alone])


def test_every_window_can_be_chosen() -> None:
    chosen = np.concatenate([cap_windows(np.full(20, "a"), 3, f"key {i}") for i in range(300)])
    counts = np.bincount(chosen, minlength=20)
    assert counts.min() > 20, "each of 20 windows is expected 45 times in 300 keys"
    assert len(cap_windows(np.array([], dtype=str), 3, KEY)) == 0


def test_the_highest_score_wins_and_the_lowest_of_equal_ones() -> None:
    assert choose_position([0.1, 0.7, 0.7, 0.2]) == 1
    assert choose_position(np.array([-3.0, -2.0])) == 1
    for bad in ([], [0.1, np.nan], [np.inf, 0.0]):
        with pytest.raises(SelectionError, match="no position can be chosen"):
            choose_position(bad)
