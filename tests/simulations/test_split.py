"""Public, pair, validation and test patients: disjoint, of the shares asked for, each tested once by rotations."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import parse_model
from bridge.errors import ConfigError
from simulations.errors import CohortError
from simulations.partitions import PartitionConfig, hospitals
from simulations.source import PatientData, SignalSource, Source
from simulations.split import Split, SplitConfig, split_patients


def source(count: int, *, roles: dict[str, int] | None = None, strata: int = 3) -> Source:
    people = [PatientData(f"p{i:03d}", (Path(f"p{i:03d}.npz"),), stratum=f"s{i % strata}") for i in range(count)]
    for role, number in (roles or {}).items():
        people += [PatientData(f"{role}-{i}", (), role=role) for i in range(number)]
    eeg, ecg = SignalSource("EEG", ("Fz",), 250), SignalSource("ECG", ("ECG",), 250)
    return Source(tuple(people), eeg, ecg, "npz", {}, ("rest", "task"), 10, 10, "made up for a test")


def parts(split: Split) -> list[set[str]]:
    return [set(split.public_old) | set(split.public_new), set(split.pair), set(split.validation), set(split.test)]


def test_shares_of_a_real_set() -> None:
    split = split_patients(source(480), SplitConfig())
    assert split.public_old == split.public_new
    assert (len(split.public_old), len(split.pair), len(split.validation), len(split.test)) == (160, 224, 0, 96)


def test_public_patients_may_lend_one_modality_each() -> None:
    split = split_patients(source(480), SplitConfig(public_lends_both=False))
    assert (len(split.public_old), len(split.public_new)) == (80, 80)
    assert not set(split.public_old) & set(split.public_new)


def test_fixed_roles_win() -> None:
    split = split_patients(
        source(0, roles={"public_old": 7, "public_new": 9, "hospital": 40}), SplitConfig(public=0.5, validation=0.1)
    )
    assert split.public_old == tuple(f"public_old-{i}" for i in range(7))
    assert split.public_new == tuple(f"public_new-{i}" for i in range(9))
    assert (len(split.pair), len(split.validation), len(split.test)) == (24, 4, 12)
    assert all(name.startswith("hospital-") for name in split.hospital)


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(12, 120),
    public=st.floats(0.1, 0.6),
    validation=st.floats(0, 0.3),
    seed=st.integers(0, 9999),
    rotations=st.integers(1, 5),
)
def test_parts_are_disjoint_complete_and_independent_of_the_order(
    count: int, public: float, validation: float, seed: int, rotations: int
) -> None:
    everybody = source(count)
    config = SplitConfig(seed=seed, public=public, validation=validation, rotations=rotations, rotation=rotations - 1)
    try:
        split = split_patients(everybody, config)
    except CohortError:
        # Refused only where the shares leave less than two patients for pairs, and each part may be off by one.
        assert rotations > 1
        assert count * (1 - public - 1 / rotations) * (1 - validation) < 2
        return
    sets = parts(split)
    assert sum(len(each) for each in sets) == count
    assert set().union(*sets) == {p.patient for p in everybody.patients}
    people = list(everybody.patients)
    random.Random(seed).shuffle(people)
    again = Source(tuple(people), *[getattr(everybody, name) for name in _REST])
    assert split_patients(again, config) == split


_REST = ("old", "new", "reader", "reader_options", "classes", "window_seconds", "step_seconds", "description")


def test_strata_are_spread_over_the_parts() -> None:
    everybody = source(300)
    of = {p.patient: p.stratum for p in everybody.patients}
    for seed in range(5):
        split = split_patients(everybody, SplitConfig(seed=seed))
        for stratum in ("s0", "s1", "s2"):
            counts = [sum(of[name] == stratum for name in part) for part in (split.public_old, split.pair, split.test)]
            # A third of 100, 140 and 60 patients; a part is one or two stretches of the line, each off by one at most.
            assert counts == pytest.approx([33.3, 46.7, 20], abs=2)


def test_another_seed_is_another_split() -> None:
    tests = {split_patients(source(60), SplitConfig(seed=seed)).test for seed in range(10)}
    assert len(tests) == 10


@pytest.mark.parametrize("rotations", [3, 4, 5])
def test_over_the_rotations_each_patient_is_tested_exactly_once(rotations: int) -> None:
    """The 28 patients of a small set: three hospitals of at least five, the rest public."""
    everybody = source(28, strata=2)
    tested: list[str] = []
    for rotation in range(rotations):
        config = SplitConfig(public=10 / 28, rotations=rotations, rotation=rotation)
        split = split_patients(everybody, config)
        assert len(split.public_old) == 10
        assert sum(len(each) for each in parts(split)) == 28
        groups = hospitals(everybody, split, PartitionConfig(hospitals=3), seed=0)
        assert all(len(group.pair) + len(group.test) >= 5 for group in groups)
        tested += split.test
    assert sorted(tested) == [p.patient for p in everybody.patients]


@pytest.mark.parametrize(
    ("everybody", "config", "says"),
    [
        (source(0), SplitConfig(), "public_old and public_new and pair and test"),
        (source(1), SplitConfig(), "public_old and public_new and pair"),
        (source(2, roles={"public_old": 1}), SplitConfig(public=0), "for public_new"),
        (source(0, roles={"hospital": 8}), SplitConfig(), "public_old and public_new"),
        (source(6), SplitConfig(public=0.8, rotations=2), "for pair"),
        (source(6, roles={"hospitl": 1}), SplitConfig(), "unknown role 'hospitl'"),
    ],
)
def test_a_part_without_patients_is_refused(everybody: Source, config: SplitConfig, says: str) -> None:
    with pytest.raises(CohortError) as error:
        split_patients(everybody, config)
    assert says in error.value.what
    assert error.value.why
    assert error.value.fix


def test_a_patient_listed_twice_is_refused() -> None:
    good = source(12)
    bad = Source((*good.patients, good.patients[4]), *[getattr(good, name) for name in _REST])
    with pytest.raises(CohortError, match="'p004' first"):
        split_patients(bad, SplitConfig())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rotations": 3, "rotation": 3}, "below rotations"),
        ({"test": 0.7, "validation": 0.3}, "leave patients for the pairs"),
        ({"tests": 0.3}, "did you mean 'test'"),
    ],
)
def test_a_wrong_configuration_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_model(values, SplitConfig, "demo.yaml")


def test_a_share_of_the_pairs_is_a_part_of_any_larger_one() -> None:
    everybody, before = source(99), split_patients(source(99), SplitConfig(validation=0.1667, test=0.3333))
    assert (len(before.public_old), len(before.validation), len(before.pair), len(before.test)) == (33, 11, 33, 22)
    kept: list[set[str]] = []
    for share, count in ((0.01, 1), (0.2, 7), (0.5, 16), (0.8, 26), (1.0, 33)):
        split = split_patients(everybody, SplitConfig(validation=0.1667, test=0.3333, pair_share=share))
        assert len(split.pair) == count
        assert (split.public_old, split.validation, split.test) == (before.public_old, before.validation, before.test)
        kept.append(set(split.pair))
    assert all(fewer < more for fewer, more in pairwise(kept))
    # Strata stay mixed: of 7, each of three strata has two or three.
    assert {sum(int(name[1:]) % 3 == i for name in kept[1]) for i in range(3)} <= {2, 3}
    other = split_patients(everybody, SplitConfig(seed=1, validation=0.1667, test=0.3333, pair_share=0.2))
    assert set(other.pair) != kept[1]
