"""What a run is at, read from its folder alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from server.events import now
from server.record import read_record, write_record
from server.submission.display import ago, headline, page
from server.submission.record import Submission, write_submission
from server.submission.runs import RunState, list_runs, run_state
from tests.server.conftest import Models
from tests.server.wire import Site, WireGrid, run_server

SUBMISSION = Submission(
    study="wire-0123abcd", study_sha256="0" * 64, study_file="/x/study.zip", submitted=now(), flower_run="17"
)


def submitted(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_submission(folder, SUBMISSION.model_copy(update={"submitted": now(), **changes}))


def finished(models: Models, folder: Path, **changes: Any) -> Path:
    run_server(WireGrid([Site("a"), Site("b"), Site("c")]), folder, models.folder, models.job(**changes))
    return folder


def test_a_submitted_run_that_has_not_begun(tmp_path: Path) -> None:
    submitted(tmp_path / "runs" / "wire-0123abcd")
    (found,) = list_runs(tmp_path / "runs")
    assert (found.name, found.study, found.state, found.phase) == ("wire-0123abcd", "wire-0123abcd", "submitted", "")
    assert found.started
    submitted(tmp_path / "runs" / "wire-0123abcd", ended="failed", details="no such file")
    (found,) = list_runs(tmp_path / "runs")
    assert (found.state, found.error) == ("failed", "no such file")


def test_a_completed_run_with_a_site_that_lost_turns(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    submitted(folder)
    grid = WireGrid([Site("a"), Site("b", wrong={"train": lambda *_: None}), Site("c")])
    run_config_job = models.job(evaluate={"final": False})
    (folder / "submitted.json").rename(tmp_path / "kept")
    run_server(grid, folder, models.folder, run_config_job)
    (tmp_path / "kept").rename(folder / "submitted.json")
    found = run_state(folder)
    assert (found.state, found.phase, found.round, found.rounds) == ("completed", "done", 3, 3)
    assert found.sites == {"a": "OK", "b": "NO_REPLY", "c": "OK"}
    assert found.seen["a"] > found.seen["b"]
    assert found.loss == read_record(folder).rounds[-1].loss
    sums = {site: sum(row.bytes for row in read_record(folder).outbox if row.site == site) for site in "abc"}
    assert found.bytes_up == sums
    assert found.bytes_up["b"] < found.bytes_up["a"]


def test_a_run_at_work_is_told_from_one_whose_process_is_gone(models: Models, tmp_path: Path) -> None:
    folder = finished(models, tmp_path / "one")
    submitted(folder, submitted="2020-01-01T00:00:00+00:00")
    write_record(folder, read_record(folder).model_copy(update={"status": "running"}))
    assert run_state(folder).state == "lost"
    assert run_state(folder).error == "its process is gone and left no word"
    with FileLock(folder / ".lock"):
        assert run_state(folder).state == "running"
    submitted(folder, submitted="2020-01-01T00:00:00+00:00", ended="stopped")
    assert run_state(folder).state == "stopped"


def test_a_failed_run_resumed_a_moment_ago_is_submitted(models: Models, tmp_path: Path) -> None:
    folder = finished(models, tmp_path / "one")
    write_record(folder, read_record(folder).model_copy(update={"status": "failed", "error": "too few"}))
    submitted(folder, submitted="2020-01-01T00:00:00+00:00")
    assert (run_state(folder).state, run_state(folder).error) == ("failed", "too few")
    os.utime(folder / "run.json", (time.time() - 60,) * 2)
    submitted(folder)
    assert (run_state(folder).state, run_state(folder).error) == ("submitted", "")


def test_folders_that_can_not_be_read_are_named_and_hide_no_other(models: Models, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    finished(models, runs / "good")
    for name in ("torn-record", "torn-submission"):
        finished(models, runs / name)
    (runs / "torn-record" / "run.json").write_text('{"schema": "fedbridge.run/1", "sta')
    (runs / "torn-submission" / "submitted.json").write_text("{}")
    (runs / "empty").mkdir()
    (runs / "a-file").write_text("")
    found = {each.name: each for each in list_runs(runs)}
    assert sorted(found) == ["good", "torn-record", "torn-submission"]
    assert found["good"].state == "completed"
    assert "run.json: is not a run record" in found["torn-record"].error
    assert "submitted.json: can't be read" in found["torn-submission"].error
    assert list_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"event": "lost_turn"}', '{"event": 7}', '{"event": "round"}', ""])
def test_strange_lines_in_the_log_are_passed_over(models: Models, tmp_path: Path, line: str) -> None:
    folder = finished(models, tmp_path / "one")
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(line + "\n" + text + '{"event": "round", "rou')
    assert run_state(folder).round == 3


def test_a_retry_that_succeeds_clears_the_lost_turn(tmp_path: Path) -> None:
    events = [
        {"time": "2030-01-01T00:00:00+00:00", "event": "describe", "state": "done", "sites": ["a", "b"]},
        {"event": "lost_turn", "site": "b", "phase": "round 1", "code": "NO_REPLY"},
        {"event": "retry", "sites": ["b"]},
        {"time": "2030-01-01T00:01:00+00:00", "event": "round", "round": 1, "rounds": 2, "loss": None},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = run_state(tmp_path)
    assert found.sites == {"a": "OK", "b": "OK"}
    assert found.seen == dict.fromkeys("ab", "2030-01-01T00:01:00+00:00")
    assert (found.round, found.rounds, found.loss, found.phase) == (1, 2, None, "training")


def test_the_table_and_the_line_say_it() -> None:
    state = RunState(
        "small-1", "small", "running", "training", 2, 6, loss=0.25, sites={"a": "OK"}, bytes_up={"a": 1200, "b": 34}
    )
    assert headline(state) == "small-1, running, training, round 2 of 6, loss 0.2500, 1,234 bytes from the sites"
    from rich.console import Console

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(page(state, "the SuperLink does not answer"))
    text = console.export_text()
    assert "the SuperLink does not answer" in text
    assert [line.split() for line in text.splitlines()[3:]] == [["a", "OK", "never", "1,200"], ["b", "never", "34"]]


def test_moments_in_words() -> None:
    assert ago("") == "never"
    assert ago(now()) in ("0 s ago", "1 s ago")
    assert ago("2020-01-01T00:00:00+00:00").endswith(" h ago")
