"""How a run ended: two witnesses have to agree, and where they don't, the reason is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ServiceError
from server.errors import RunError, RunFolderError
from server.events import now
from server.flower_command import FlowerCommand
from server.record import read_record, write_record
from server.submission import follow as module
from server.submission.follow import follow
from server.submission.record import Submission, read_submission, write_submission
from server.submission.runs import RunState
from tests.server.conftest import Models
from tests.server.wire import Site, WireGrid, run_server


class Flower(FlowerCommand):
    """Answers as the real command does, from a list: a status, or nothing where the SuperLink is gone."""

    def __init__(self, home: Path, *statuses: str) -> None:
        super().__init__(home, {})
        self.statuses = list(statuses)
        self.asked = 0

    def ask(self, *arguments: str) -> dict[str, Any]:
        assert arguments[:2] == ("list", "fedbridge")
        self.asked += 1
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if not status:
            return {"success": False, "error-message": "Connection refused"}
        return {"success": True, "runs": [{"status": status, "status-details": "N/A" if "comp" in status else "words"}]}


def shown(states: list[RunState], notes: list[str]) -> Any:
    def show(state: RunState, note: str = "") -> None:
        states.append(state)
        notes.append(note)

    return show


@pytest.fixture
def run(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A completed run's folder, submitted as Flower's run 17."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.02)
    folder = tmp_path / "one"
    run_server(WireGrid([Site("a"), Site("b")]), folder, models.folder, models.job())
    submission = Submission(study="s", study_sha256="0", study_file="/s.zip", submitted=now(), flower_run="17")
    write_submission(folder, submission)
    return folder


def test_both_say_completed(run: Path, tmp_path: Path) -> None:
    states: list[RunState] = []
    flower = Flower(tmp_path / "home", "running", "running", "finished:completed")
    record = follow(run, flower, shown(states, []))
    assert record == read_record(run)
    assert states[-1].state == "completed"
    assert flower.asked == 3
    found = read_submission(run)
    assert found is not None
    assert (found.ended, found.details) == ("completed", "")
    # Once known, the end is not asked for again.
    assert follow(run, Flower(tmp_path / "home", ""), shown(states, [])) == record


def test_a_result_that_flower_denies_is_no_success(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="its result is there, but Flower says that the run failed") as caught:
        follow(run, Flower(tmp_path / "home", "finished:failed"), shown([], []))
    assert caught.value.why == "words"
    assert "--name one --resume" in caught.value.fix


def test_completed_at_flower_without_a_result_is_no_success(run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    with pytest.raises(RunError, match="one: the run failed") as caught:
        follow(run, Flower(tmp_path / "home", "finished:completed"), shown([], []))
    assert caught.value.why == "its process ended and left no word"


def test_the_runs_own_words_come_first_with_the_sites_that_refused(run: Path, tmp_path: Path) -> None:
    record = read_record(run)
    refusing = record.sites[1].model_copy(update={"can_take_part": False, "reason": "BUDGET_SPENT"})
    update = {"status": "failed", "error": "round 2: 1 good replies", "sites": [record.sites[0], refusing]}
    write_record(run, record.model_copy(update=update))
    with pytest.raises(RunError) as caught:
        follow(run, Flower(tmp_path / "home", "finished:failed"), shown([], []))
    assert caught.value.why == "round 2: 1 good replies\nSites that did not take part: b: BUDGET_SPENT"
    assert caught.value.exit_code == 6


def test_a_stopped_run_is_called_stopped(run: Path, tmp_path: Path) -> None:
    write_record(run, read_record(run).model_copy(update={"status": "running"}))
    with pytest.raises(RunError, match="one: the run was stopped"):
        follow(run, Flower(tmp_path / "home", "finished:stopped"), shown([], []))


def test_a_superlink_that_is_away_for_a_while_is_borne(run: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    follow(run, Flower(tmp_path / "home", "running", "", "", "finished:completed"), shown([], notes))
    assert "the SuperLink does not answer" in notes


def test_a_superlink_that_stays_away_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(ServiceError, match="SuperLink does not answer") as caught:
        follow(run, Flower(tmp_path / "home", ""), shown([], []))
    assert caught.value.why == "Connection refused"


def test_a_damaged_record_is_no_success(run: Path, tmp_path: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(RunError, match="the run failed"):
        follow(run, Flower(tmp_path / "home", "finished:completed"), shown([], []))


def test_what_was_never_submitted_or_only_half(run: Path, tmp_path: Path) -> None:
    found = read_submission(run)
    assert found is not None
    write_submission(run, found.model_copy(update={"flower_run": ""}))
    with pytest.raises(RunFolderError, match="its submission was interrupted") as caught:
        follow(run, Flower(tmp_path / "home", ""), shown([], []))
    assert "run /s.zip --name one --resume" in caught.value.fix
    with pytest.raises(RunFolderError, match="is no submitted run"):
        follow(tmp_path / "nowhere", Flower(tmp_path / "home", ""), shown([], []))
