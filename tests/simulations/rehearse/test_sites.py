from __future__ import annotations

import pytest

from bridge.job import Job, Models, SitesJob
from client.site_file import Split
from simulations.errors import RehearsalError
from simulations.rehearse.sites import deal, names_of, rehearsed_job

MODELS = Models(old_encoder="a", new_encoder="b", task_head="c")


def job(**sites: object) -> Job:
    return Job(name="it", models=MODELS, sites=SitesJob.model_validate(sites))


def test_the_site_comes_first_then_sites_that_the_study_expects_then_made_up_ones() -> None:
    expected = job(expected=("north", "south", "west", "east"))
    assert names_of("west", expected, 3) == ("west", "north", "south")
    assert names_of("west", job(expected=("west", "east")), 4) == ("west", "east", "pretend-2", "pretend-3")
    assert names_of("west", job(), 2) == ("west", "pretend-2")
    assert names_of("pretend-2", job(), 3) == ("pretend-2", "pretend-3", "pretend-4")
    assert names_of("west", expected, 1) == ("west",)


@pytest.mark.parametrize("sites", [{"expected": ("north", "south")}, {"weights": {"north": 1.0, "south": 0.5}}])
def test_a_study_that_does_not_expect_the_site_is_refused(sites: dict[str, object]) -> None:
    with pytest.raises(RehearsalError, match="does not expect a site named 'west'") as caught:
        names_of("west", job(**sites), 3)
    assert "north, south" in caught.value.why


def test_only_who_takes_part_and_the_waiting_differ_in_the_rehearsed_job() -> None:
    asked = job(expected=("a", "b", "c", "d"), weights={"a": 0.25, "b": 0.5, "c": 1.0, "d": 1.0}, minimum=4)
    found = rehearsed_job(asked, ("b", "a", "pretend-2"))
    assert found.sites.expected == ("b", "a", "pretend-2")
    assert found.sites.weights == {"b": 0.5, "a": 0.25, "pretend-2": 1.0}
    assert found.sites.minimum == 3
    assert found.sites.timeout_seconds > 1e8
    assert found.model_copy(update={"sites": asked.sites}) == asked
    assert rehearsed_job(job(), ("b", "c")).sites.weights == {}


def patients(count: int, kind: str = "p") -> tuple[str, ...]:
    return tuple(f"{kind}{number:02d}" for number in range(count))


@pytest.mark.parametrize(
    ("count", "sites", "expected"),
    [
        (0, 2, [(), ()]),
        (1, 2, [("p00",), ("p00",)]),
        (2, 2, [("p00", "p01"), ("p00", "p01")]),
        (3, 2, [("p00", "p02"), ("p01", "p02")]),
        (5, 2, [("p00", "p02", "p04"), ("p01", "p03")]),
        (5, 1, [("p00", "p01", "p02", "p03", "p04")]),
    ],
)
def test_deals_patients_in_turn_and_two_to_each_site_where_there_are_two(
    count: int, sites: int, expected: list[tuple[str, ...]]
) -> None:
    cohorts: dict[Split, tuple[str, ...]] = {"pair": patients(count), "validation": (), "test": patients(3, "t")}
    dealt = deal(cohorts, sites)
    found = [tuple(sorted(each.pair)) for each in dealt if isinstance(each.pair, tuple)]
    assert [set(each) for each in found] == [set(each) for each in expected]
    assert [each.validation for each in dealt] == [()] * sites
    assert {patient for each in dealt if isinstance(each.test, tuple) for patient in each.test} == set(patients(3, "t"))
