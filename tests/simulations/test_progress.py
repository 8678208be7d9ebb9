"""Bars from the server's log: whole lines only, whatever else stands in the file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from server.events import EventLog, LogTail
from simulations.progress import bars, following, show_event

Steps = list[tuple[str, int, int]]


def test_a_growing_log_becomes_steps_in_its_order(tmp_path: Path) -> None:
    steps: Steps = []
    with EventLog(tmp_path) as log:
        log.emit("round", round=9, rounds=9)  # of an earlier start: not shown again
        with following(tmp_path, lambda *step: steps.append(step)):
            log.emit("describe", state="started", sites=2)
            log.emit("describe", state="done", sites=["a", "b"])
            time.sleep(0.5)
            assert steps == [("asking the sites", 0, 1), ("asking the sites", 1, 1)]
            for number in (1, 2, 3):
                log.emit("round", round=number, rounds=3, loss=0.5)
            log.emit("note", text="nothing to show")
    assert steps[2:] == [("training rounds", number, 3) for number in (1, 2, 3)]


def test_half_a_line_waits_and_garbage_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("")
    tail = LogTail(path.parent, from_end=True)
    with path.open("a") as file:
        file.write('{"event": "round", "round": 1')
        file.flush()
        assert tail.events() == []
        file.write(', "rounds": 2}\nno json\n[1]\n' + json.dumps({"event": "finished"}) + "\n")
        file.flush()
        assert tail.events() == [{"event": "round", "round": 1, "rounds": 2}, {"event": "finished"}]
    assert tail.events() == []


def test_a_log_that_is_not_there_yet_is_no_error(tmp_path: Path) -> None:
    tail = LogTail(tmp_path, from_end=True)
    assert tail.events() == []
    (tmp_path / "log.jsonl").write_text('{"event": "finished"}\n')
    assert tail.events() == [{"event": "finished"}]


def test_unknown_events_and_states_draw_nothing() -> None:
    steps: Steps = []
    for event in ({"event": "retry"}, {"event": "evaluate"}, {"event": "evaluate", "state": "other"}, {}):
        show_event(event, lambda *step: steps.append(step))
    assert steps == []


def test_without_a_terminal_a_line_begins_and_a_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with bars(quiet=False) as progress:
        for done in range(4):
            progress("controls", done, 3)
    printed = capsys.readouterr()
    assert printed.err.split("\n") == ["controls ...", "controls: 3 of 3", ""]
    assert printed.out == ""


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with bars(quiet=True) as progress:
        progress("controls", 1, 1)
    assert capsys.readouterr() == ("", "")
