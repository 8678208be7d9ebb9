"""Which folder a run gets, and what is left where Flower does not take it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from filelock import FileLock

from bridge.errors import ConfigError, ServiceError
from bridge.study.archive import Study, open_study
from server.coordinator.folder import CoordinatorFolder
from server.errors import ResumeError, RunError, RunFolderError
from server.events import now
from server.flower_command import FlowerCommand
from server.submission.flower import flower_status
from server.submission.record import Submission, read_submission, write_submission
from server.submission.submit import alone, choose_folder, submit, wait_until_over
from tests.server.submission.conftest import Built


def taken(folder: Path, study: Study, **changes: str) -> Path:
    folder.mkdir(parents=True)
    submission = Submission(
        study=study.id,
        study_sha256=study.sha256,
        study_file=str(study.path),
        submitted=now(),
        **{"flower_run": "17", **changes},  # type: ignore[arg-type]
    )
    write_submission(folder, submission)
    return folder


def test_runs_of_a_study_are_numbered(study: Study, tmp_path: Path) -> None:
    assert choose_folder(tmp_path, study, None, resume=False) == tmp_path / study.id
    taken(tmp_path / study.id, study)
    assert choose_folder(tmp_path, study, None, resume=False) == tmp_path / f"{study.id}-2"
    taken(tmp_path / f"{study.id}-2", study)
    assert choose_folder(tmp_path, study, None, resume=False) == tmp_path / f"{study.id}-3"
    assert choose_folder(tmp_path, study, None, resume=True) == tmp_path / f"{study.id}-2"
    assert choose_folder(tmp_path, study, study.id, resume=True) == tmp_path / study.id


def test_a_folder_in_which_nothing_was_submitted_is_used_again(study: Study, tmp_path: Path) -> None:
    (tmp_path / study.id).mkdir()
    (tmp_path / study.id / "run-key").write_text("0" * 32)
    assert choose_folder(tmp_path, study, None, resume=False) == tmp_path / study.id
    (tmp_path / study.id / "log.jsonl").write_text("")
    assert choose_folder(tmp_path, study, None, resume=False) == tmp_path / f"{study.id}-2"


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", ".hidden", "a b", "a" * 92, "-x"])
def test_a_name_is_a_plain_word(study: Study, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't be the name of a run"):
        choose_folder(tmp_path, study, name, resume=False)


def test_a_run_is_never_overwritten(study: Study, tmp_path: Path) -> None:
    taken(tmp_path / "mine", study)
    with pytest.raises(RunFolderError, match="already holds a run"):
        choose_folder(tmp_path, study, "mine", resume=False)


def test_nothing_to_resume_and_another_studys_run(built: Built, study: Study, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        choose_folder(tmp_path, study, None, resume=True)
    with open_study(built.build(tmp_path / "other.zip", name="other")) as other:
        taken(tmp_path / "mine", other)
        with pytest.raises(ResumeError, match="is a run of another study") as caught:
            choose_folder(tmp_path, study, "mine", resume=True)
        assert caught.value.why == f"it belongs to {other.id}, the file is {study.id}"
        assert str(other.path) in caught.value.fix
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "submitted.json").write_text('{"study": ')
    with pytest.raises(RunFolderError, match=r"submitted.json: can't be read"):
        choose_folder(tmp_path, study, "torn", resume=True)


def test_two_submissions_of_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path / "one"), pytest.raises(RunFolderError, match="another `fedbridge-server run` submits it"):
        alone(tmp_path / "one").__enter__()
    with alone(tmp_path / "one"):
        pass


def test_a_run_whose_process_is_at_work_is_not_resumed(study: Study, folder: CoordinatorFolder) -> None:
    place = taken(folder.runs / "one", study)
    flower = FlowerCommand(folder.flower_home, {})
    with FileLock(place / ".lock"), pytest.raises(RunFolderError, match="the run is still going on") as caught:
        wait_until_over(place, flower)
    assert "`fedbridge-server follow one`" in caught.value.fix


def test_an_interrupted_submission_is_over_where_nothing_works(study: Study, folder: CoordinatorFolder) -> None:
    place = taken(folder.runs / "one", study, flower_run="")
    wait_until_over(place, FlowerCommand(folder.flower_home, {}))


def test_without_a_superlink_nothing_counts_as_submitted(study: Study, folder: CoordinatorFolder) -> None:
    flower = FlowerCommand(folder.flower_home, {})
    place = folder.runs / study.id
    with alone(place), pytest.raises(RunError, match="Flower did not start the run") as caught:
        submit(study, folder.studies, place, flower)
    assert caught.value.why
    assert "fedbridge-server status" in caught.value.fix
    assert read_submission(place) is None
    key = (place / "run-key").read_text()
    values = tomllib.loads((place / "run-config.toml").read_text())
    assert values["job"] == study.job_text
    assert values["run-key"] + "\n" == key
    assert (values["run-folder"], values["engine"], values["resume"]) == (str(place), "deployment", False)
    with pytest.raises(ServiceError, match="does not answer"):
        flower_status(flower, "17")
    # Once more, as a resume of a run that has left something: the same key, and the earlier submission stays.
    (place / "log.jsonl").write_text("")
    write_submission(place, Submission(**{**_plain(study), "flower_run": "4", "ended": "failed"}))
    with alone(place), pytest.raises(RunError):
        submit(study, folder.studies, place, flower)
    again = tomllib.loads((place / "run-config.toml").read_text())
    assert (again["run-key"] + "\n", again["resume"]) == (key, True)
    found = read_submission(place)
    assert found is not None
    assert (found.flower_run, found.ended) == ("4", "failed")


def _plain(study: Study) -> dict[str, str]:
    return {"study": study.id, "study_sha256": study.sha256, "study_file": "/x", "submitted": now()}


@pytest.mark.parametrize("content", [b"", b"abc", b"0" * 31, b"G" * 32, b"\xff" * 32])
def test_a_damaged_run_key_is_never_replaced(study: Study, folder: CoordinatorFolder, content: bytes) -> None:
    place = folder.runs / study.id
    place.mkdir(parents=True)
    (place / "run-key").write_bytes(content)
    with pytest.raises(RunFolderError, match="run-key: "):
        submit(study, folder.studies, place, FlowerCommand(folder.flower_home, {}))
    assert (place / "run-key").read_bytes() == content
