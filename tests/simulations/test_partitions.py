"""Hospitals' patients: whole, once, of the sizes asked for, and the same in any list order."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.config import parse_model
from bridge.errors import ConfigError
from simulations.errors import CohortError
from simulations.partitions import PartitionConfig, hospitals, partition
from simulations.source import PatientData, SignalSource, Source
from simulations.split import SplitConfig, split_patients

KINDS = ["equal", "unequal", "label_skew", "device"]


def patients(count: int, *, devices: int = 4, strata: int = 3, role: str = "") -> list[PatientData]:
    return [
        PatientData(
            f"p{i:03d}",
            (Path(f"p{i:03d}.npz"),),
            stratum=f"s{i % strata}",
            device=f"d{(i // strata) % devices}",
            role=role,
        )
        for i in range(count)
    ]


def source(people: list[PatientData]) -> Source:
    ecg, ppg = SignalSource("ECG", ("ECG",), 125), SignalSource("PPG", ("PPG",), 64)
    return Source(tuple(people), ecg, ppg, "npz", {}, ("a", "b"), 10, 10, "made up for a test")


@pytest.mark.parametrize("kind", KINDS)
def test_each_patient_is_in_exactly_one_hospital(kind: str) -> None:
    people = patients(61)
    groups = partition(people, PartitionConfig(kind=kind), seed=3)
    assert len(groups) == 4
    assert Counter(name for group in groups for name in group) == Counter(p.patient for p in people)
    assert all(group == sorted(group) for group in groups)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_and_not_the_order_of_the_list(kind: str) -> None:
    people, config = patients(61), PartitionConfig(kind=kind)
    first = partition(people, config, seed=3)
    shuffled = list(people)
    random.Random(1).shuffle(shuffled)
    assert partition(shuffled, config, seed=3) == first
    if kind != "device":
        assert partition(people, config, seed=4) != first


def test_equal_hospitals_differ_by_one_patient_at_most() -> None:
    sizes = [len(group) for group in partition(patients(61), PartitionConfig(hospitals=7), seed=0)]
    assert sorted(sizes) == [8, 8, 9, 9, 9, 9, 9]


def test_unequal_hospitals_have_the_sizes_of_their_shares() -> None:
    config = PartitionConfig(kind="unequal", hospitals=3, shares=(3, 2, 1))
    assert [len(group) for group in partition(patients(60), config, seed=0)] == [30, 20, 10]
    # 70 patients by 1, 1/2, 1/4: 40, 20, 10
    halves = PartitionConfig(kind="unequal", hospitals=3, decay=0.5)
    assert [len(group) for group in partition(patients(70), halves, seed=0)] == [40, 20, 10]


def test_a_hospital_below_the_minimum_is_filled_up_from_the_largest() -> None:
    config = PartitionConfig(kind="unequal", hospitals=3, shares=(98, 1, 1), minimum_patients=5)
    assert [len(group) for group in partition(patients(40), config, seed=0)] == [30, 5, 5]


def test_a_hospital_is_a_device() -> None:
    people = patients(48)
    of = {p.patient: p.device for p in people}
    groups = partition(people, PartitionConfig(kind="device"), seed=0)
    assert [{of[name] for name in group} for group in groups] == [{"d0"}, {"d1"}, {"d2"}, {"d3"}]


def test_label_skew_grows_as_alpha_falls() -> None:
    people = patients(300)
    of = {p.patient: p.stratum for p in people}

    def skew(alpha: float) -> float:
        """Mean share of a hospital's commonest stratum: a third at best."""
        shares = []
        for seed in range(5):
            for group in partition(people, PartitionConfig(kind="label_skew", alpha=alpha), seed):
                shares.append(max(Counter(of[name] for name in group).values()) / len(group))
        return sum(shares) / len(shares)

    assert skew(1e6) < 0.36
    assert skew(0.2) > 0.6
    assert skew(0.2) > skew(2.0) + 0.1


@pytest.mark.parametrize(
    ("count", "config", "says"),
    [
        (0, PartitionConfig(), "0 patient(s)"),
        (1, PartitionConfig(hospitals=1), "1 patient(s)"),
        (3, PartitionConfig(hospitals=4, minimum_patients=1), "3 patient(s)"),
        (7, PartitionConfig(hospitals=4, minimum_patients=2), "7 patient(s)"),
        (48, PartitionConfig(kind="device", hospitals=3), "4 devices"),
        (12, PartitionConfig(kind="device", minimum_patients=3), None),
        (13, PartitionConfig(kind="device", hospitals=5, minimum_patients=2), "4 devices"),
    ],
)
def test_too_few_patients_are_refused(count: int, config: PartitionConfig, says: str | None) -> None:
    if says is None:
        assert [len(group) for group in partition(patients(count), config, seed=0)] == [3, 3, 3, 3]
        return
    with pytest.raises(CohortError) as error:
        partition(patients(count), config, seed=0)
    assert says in error.value.what
    assert error.value.why
    assert error.value.fix
    assert error.value.exit_code == 3


def test_a_device_with_too_few_patients_is_refused() -> None:
    people = [*patients(45, devices=3), PatientData("lonely", (), device="d9")]
    with pytest.raises(CohortError, match="a device has 1 patient"):
        partition(people, PartitionConfig(kind="device"), seed=0)


def test_a_source_without_devices_and_a_patient_twice_are_refused() -> None:
    people = [PatientData(f"p{i}", ()) for i in range(20)]
    with pytest.raises(CohortError, match="does not tell each patient's device"):
        partition(people, PartitionConfig(kind="device"), seed=0)
    with pytest.raises(CohortError, match="'p3' first"):
        partition([*people, people[3]], PartitionConfig(), seed=0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "equal", "shares": [1, 1, 1, 1]}, "shares belong to kind 'unequal'"),
        ({"kind": "unequal", "shares": [1, 2]}, "one value a hospital"),
        ({"kind": "unequal", "hospitals": 2, "shares": [1, 0]}, "above 0"),
        ({"kind": "unequal", "hospital": 2}, "did you mean 'hospitals'"),
    ],
)
def test_a_wrong_configuration_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_model(values, PartitionConfig, "demo.yaml")


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(30, 90),
    kind=st.sampled_from(["equal", "unequal", "label_skew"]),
    number=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_every_hospital_gets_its_pair_and_test_patients(count: int, kind: str, number: int, seed: int) -> None:
    everybody = source([*patients(count, role="hospital"), *_public()])
    split = split_patients(everybody, SplitConfig(seed=seed, test=0.3, validation=0.1))
    config = PartitionConfig(kind=kind, hospitals=number, minimum_patients=3, alpha=0.3)
    parts = hospitals(everybody, split, config, seed)
    assert len(parts) == number
    for name in ("pair", "validation", "test"):
        dealt = [patient for part in parts for patient in getattr(part, name)]
        assert sorted(dealt) == list(getattr(split, name))
    assert all(len(part.pair) >= 3 and len(part.test) >= 1 for part in parts)


def test_a_device_keeps_its_pair_and_test_patients_together() -> None:
    everybody = source([*patients(72, role="hospital"), *_public()])
    of = {p.patient: p.device for p in everybody.patients}
    parts = hospitals(everybody, split_patients(everybody, SplitConfig()), PartitionConfig(kind="device"), seed=0)
    for i, part in enumerate(parts):
        assert {of[name] for name in (*part.pair, *part.test)} == {f"d{i}"}
        assert len(part.test) in (5, 6)


def _public() -> list[PatientData]:
    return [PatientData("po", (), role="public_old", device="x"), PatientData("pn", (), role="public_new", device="x")]
