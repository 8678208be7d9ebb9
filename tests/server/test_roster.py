"""Who takes part: waiting for sites, their answers to describe, and the refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, MetricRecord, RecordDict

from server.errors import RunError
from server.record import read_record
from tests.server.conftest import Models
from tests.server.wire import Site, WireGrid, run_server

SITES = {"minimum": 2, "wait_seconds": 2, "timeout_seconds": 5, "retries": 1}


def run(models: Models, folder: Path, grid: WireGrid, **sites: Any) -> dict[str, tuple[bool, str]]:
    changes = {"train": {"rounds": 1}, "evaluate": {"final": False}, "sites": {**SITES, **sites}}
    run_server(grid, folder, models.folder, models.job(**changes))
    return answers(folder)


def answers(folder: Path) -> dict[str, tuple[bool, str]]:
    return {site.site: (site.can_take_part, site.reason) for site in read_record(folder).sites}


def took_part(folder: Path) -> list[str]:
    return read_record(folder).rounds[0].sites


def described(**values: Any) -> Any:
    """A describe reply with other values."""

    def behave(site: Site, message: Any, honest: RecordDict) -> RecordDict:
        config = {"site": site.name, "can_take_part": True} | {k: v for k, v in values.items() if k != "reason"}
        metrics = {"reason": values.get("reason", 0)}
        return RecordDict({"config": ConfigRecord(config), "metrics": MetricRecord(metrics)})

    return behave


def test_sites_that_cannot_are_not_asked_again(models: Models, tmp_path: Path) -> None:
    members = [Site("c"), Site("b", can_take_part=False, reason=106), Site("a"), Site("d", False, 199)]
    assert run(models, tmp_path, WireGrid(members)) == {
        "a": (True, "OK"),
        "b": (False, "TOO_FEW_PATIENTS"),
        "c": (True, "OK"),
        "d": (False, "UNKNOWN_CODE"),
    }
    assert took_part(tmp_path) == ["a", "c"]
    assert [kind for kind, _ in members[1].seen] == ["query.describe"]


def test_two_sites_of_one_name_are_both_refused(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("twin"), Site("b"), Site("twin")]
    assert run(models, tmp_path, WireGrid(members))["twin"] == (False, "SAME_NAME")
    assert took_part(tmp_path) == ["a", "b"]
    assert "2 sites answer as 'twin'" in (tmp_path / "log.jsonl").read_text()


def test_sites_that_are_not_expected_are_left_out(models: Models, tmp_path: Path) -> None:
    members = [Site("stranger"), Site("a"), Site("b")]
    found = run(models, tmp_path, WireGrid(members), expected=["a", "b", "late"], wait_seconds=0.3)
    assert found["stranger"] == (False, "NOT_EXPECTED")
    assert found["late"] == (False, "NO_REPLY")
    assert took_part(tmp_path) == ["a", "b"]
    assert {kind for kind, _ in members[0].seen} == {"query.describe"}


def test_weights_name_the_sites_that_take_part(models: Models, tmp_path: Path) -> None:
    members = [Site("a", weight=0.5), Site("b"), Site("unnamed")]
    found = run(models, tmp_path, WireGrid(members), weights={"a": 0.5, "b": 1.0})
    assert found["unnamed"] == (False, "NOT_EXPECTED")


BAD = {
    "no name": described(site=""),
    "a path": described(site="../../etc/passwd"),
    "a patient": described(site="Erika Mustermann, 1964"),
    "far too long": described(site="a" * 64),
    "two lines": described(site="a\nb"),
    "a number": described(site=7),
    "maybe": described(can_take_part=1),
    "a count": described(patients=42),
    "reason out of bounds": described(reason=4711),
    "nothing": lambda *_: RecordDict(),
}


@pytest.mark.parametrize("behave", BAD.values(), ids=BAD.keys())
def test_garbled_descriptions_are_refused(models: Models, tmp_path: Path, behave: Any) -> None:
    members = [Site("a"), Site("b"), Site("x", wrong={"query.describe": behave})]
    found = run(models, tmp_path, WireGrid(members))
    assert found == {"a": (True, "OK"), "b": (True, "OK"), "node-1002": (False, "BAD_REPLY")}
    assert read_record(tmp_path).sites[2].lost_turns == ["describe: BAD_REPLY"] * 2
    text = (tmp_path / "run.json").read_text() + (tmp_path / "log.jsonl").read_text()
    assert "Mustermann" not in text
    assert "passwd" not in text


def test_a_site_that_fails_once_is_asked_again(models: Models, tmp_path: Path) -> None:
    calls = []

    def shaky(site: Site, message: Any, honest: RecordDict) -> Any:
        calls.append(site.name)
        return honest if len(calls) > 1 else Error(code=5, reason="Node Unavailable")

    members = [Site("a"), Site("b"), Site("c", wrong={"query.describe": shaky})]
    assert run(models, tmp_path, WireGrid(members))["c"] == (True, "OK")
    assert took_part(tmp_path) == ["a", "b", "c"]
    assert [len(site.seen) for site in members] == [4, 4, 5]


def dropping_out(grid: WireGrid, node: int, polls: int) -> Any:
    """A describe that ends with its site offline for so many looks at who is online."""

    def behave(site: Site, message: Any, honest: RecordDict) -> Any:
        if len(site.seen) > 1:
            return honest
        grid.online_after[node] = grid.polls + polls
        return Error(code=5, reason="Node Unavailable")

    return behave


def test_a_site_that_drops_out_gets_time_to_come_back(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b")]
    grid = WireGrid(members)
    members[1].wrong["query.describe"] = dropping_out(grid, 1001, polls=8)
    assert run(models, tmp_path, grid, expected=["a", "b"], wait_seconds=20)["b"] == (True, "OK")
    assert took_part(tmp_path) == ["a", "b"]


def test_a_site_that_never_comes_back_keeps_its_code(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b")]
    grid = WireGrid(members)
    grid.enrolled = {1000: "a", 1001: "b"}
    members[1].wrong["query.describe"] = dropping_out(grid, 1001, polls=10**9)
    with pytest.raises(RunError, match="1 sites can take part, 2 are needed"):
        run(models, tmp_path, grid, expected=["a", "b"], wait_seconds=0.5)
    assert answers(tmp_path)["b"] == (False, "FLOWER_5")
    assert [kind for kind, _ in members[0].seen] == ["query.describe"]


def test_a_site_that_is_not_needed_is_not_waited_for(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b"), Site("c")]
    grid = WireGrid(members)
    members[2].wrong["query.describe"] = dropping_out(grid, 1002, polls=10**9)
    started = time.monotonic()
    run(models, tmp_path, grid, expected=["a", "b", "c"], wait_seconds=60)
    assert took_part(tmp_path) == ["a", "b"]
    assert time.monotonic() - started < 40


def test_sites_may_come_one_by_one(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in "abcd"]
    grid = WireGrid(members, online_after={1001: 2, 1002: 4, 1003: 5})
    run(models, tmp_path, grid, expected=["a", "b", "c", "d"], minimum=1, wait_seconds=20)
    assert took_part(tmp_path) == ["a", "b", "c", "d"]


def test_without_expected_names_it_waits_until_no_more_come(models: Models, tmp_path: Path) -> None:
    grid = WireGrid([Site(name) for name in "abc"], online_after={1002: 4})
    run(models, tmp_path, grid, wait_seconds=20)
    assert took_part(tmp_path) == ["a", "b", "c"]


def test_too_few_sites_online_stop_the_run_in_time(models: Models, tmp_path: Path) -> None:
    grid = WireGrid([Site(name) for name in "abc"], online_after={1001: 10**9, 1002: 10**9})
    started = time.monotonic()
    with pytest.raises(RunError, match=r"1 sites are online after 0\.5 s, 2 are needed"):
        run(models, tmp_path, grid, wait_seconds=0.5)
    assert 0.4 < time.monotonic() - started < 3
    record = read_record(tmp_path)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.startswith("1 sites are online")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed"


def test_too_few_able_sites_stop_the_run_and_are_named(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b", False, 107), Site("c", wrong={"query.describe": lambda *_: None})]
    with pytest.raises(RunError) as caught:
        run(models, tmp_path, WireGrid(members))
    assert caught.value.what == "describe: 1 sites can take part, 2 are needed"
    assert caught.value.why == "b: WEIGHTS_DIFFER; node-1002: NO_REPLY"
    assert answers(tmp_path) == {"a": (True, "OK"), "b": (False, "WEIGHTS_DIFFER"), "node-1002": (False, "NO_REPLY")}


def enrolled(members: list[Site], *names: str) -> WireGrid:
    """A deployment's grid: it knows the name under which each node was enrolled."""
    grid = WireGrid(members)
    grid.enrolled = {1000 + i: name for i, name in enumerate(names)}
    return grid


def test_a_node_that_says_another_name_than_its_enrolled_one_is_refused(models: Models, tmp_path: Path) -> None:
    """It can't take the other site's place, nor cost it its own."""
    members = [Site("a"), Site("a"), Site("c")]
    found = run(models, tmp_path, enrolled(members, "a", "b", "c"), expected=["a", "b", "c"])
    assert found == {"a": (True, "OK"), "b": (False, "OTHER_NAME"), "c": (True, "OK")}
    assert took_part(tmp_path) == ["a", "c"]
    assert [kind for kind, _ in members[1].seen] == ["query.describe"]
    assert "the node enrolled as 'b' says that it is another site" in (tmp_path / "log.jsonl").read_text()
    counted = {(item.site, item.item): item.count for item in read_record(tmp_path).outbox}
    assert counted[("b", "site")] == counted[("a", "site")] == 1


def test_the_other_name_is_told_where_the_run_stops_for_it(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        run(models, tmp_path, enrolled([Site("a"), Site("impostor")], "a", "b"), expected=["a", "b"])
    assert caught.value.why == "b: OTHER_NAME"
    text = (tmp_path / "run.json").read_text() + (tmp_path / "log.jsonl").read_text()
    assert "impostor" not in text


def test_a_site_enrolled_but_not_expected_is_not_even_asked(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("other-study"), Site("c")]
    found = run(models, tmp_path, enrolled(members, "a", "other-study", "c"), expected=["a", "c"])
    assert found == {"a": (True, "OK"), "c": (True, "OK")}
    assert members[1].seen == []
    assert "not asked, since the job does not expect them: other-study" in (tmp_path / "log.jsonl").read_text()


def test_it_waits_for_the_expected_names_not_for_their_number(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in ("a", "other", "third", "late")]
    grid = enrolled(members, "a", "other", "third", "late")
    grid.online_after = {1003: 4}
    run(models, tmp_path, grid, expected=["a", "late"], wait_seconds=20)
    assert took_part(tmp_path) == ["a", "late"]


def test_strangers_alone_are_nobody(models: Models, tmp_path: Path) -> None:
    grid = enrolled([Site("x"), Site("y"), Site("a")], "x", "y", "a")
    with pytest.raises(RunError, match=r"^1 sites are online after 0\.3 s, 2 are needed"):
        run(models, tmp_path, grid, expected=["a", "b"], wait_seconds=0.3)


def test_an_enrolled_node_without_an_answer_goes_by_its_name(models: Models, tmp_path: Path) -> None:
    refusing = Site("b", wrong={"query.describe": lambda *_: Error(code=120, reason="")})
    silent = Site("c", wrong={"query.describe": lambda *_: None})
    members = [Site("a"), refusing, silent, Site("d")]
    found = run(models, tmp_path, enrolled(members, "a", "b", "c", "d"), expected=["a", "b", "c", "d"])
    assert found["b"] == (False, "CODE_NOT_ACCEPTED")
    assert found["c"] == (False, "NO_REPLY")
    assert read_record(tmp_path).sites[1].lost_turns == ["describe: CODE_NOT_ACCEPTED"] * 2
