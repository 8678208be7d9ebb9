"""Whole runs in one process: what they leave, how they go on, and what they refuse."""

from __future__ import annotations

import csv
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.errors import ResumeError, RunError, RunFolderError
from server.record import read_record
from simulations import run as run_module
from simulations.prepare import prepare
from simulations.run import differences, run
from tests.simulations.studies import tiny


def bridge(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(load_file(folder / "bridge" / "bridge.safetensors"))


def test_a_run_leaves_a_whole_folder(finished: Path) -> None:
    record = read_record(finished)
    assert record.status == "completed"
    assert record.engine == "local"
    assert [each.round for each in record.rounds] == [1, 2, 3]
    assert [site.site for site in record.sites] == ["hospital-1", "hospital-2"]
    for name in ("report.html", "predictions.csv", "log.jsonl", "config.yaml", "job.yaml", "bridge/manifest.json"):
        assert (finished / name).is_file(), name
    assert all((finished / "sites" / f"site-{i}" / "audit.jsonl").is_file() for i in range(2))


def test_predictions_are_those_behind_the_figures(finished: Path) -> None:
    evaluation = read_record(finished).evaluation
    with (finished / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["patient", "recording", "start_seconds", "label", "pseudo_label", "bridge"]
    cells = Counter((row["label"], row["bridge"]) for row in rows)
    for i, label in enumerate(evaluation.classes):
        for j, guess in enumerate(evaluation.classes):
            assert cells[label, guess] == evaluation.confusion["bridge"][i][j]
    assert evaluation.windows == len(rows)
    assert evaluation.patients == len({row["patient"] for row in rows})
    agreement = sum(row["pseudo_label"] == row["bridge"] for row in rows) / len(rows)
    assert evaluation.bridge is not None
    assert evaluation.bridge.agreement is not None
    assert evaluation.bridge.agreement.value == pytest.approx(agreement, abs=1e-12)


def test_the_figures_are_those_that_the_sites_sent(
    session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums that left the sites, before the simulation replaced them by its own count."""
    sent = []

    def remembered(config: Any, folder: Path, record: Any, progress: Any) -> Any:
        sent.append(record.evaluation.confusion)
        return finish(config, folder, record, progress)

    finish = run_module._finish
    monkeypatch.setattr(run_module, "_finish", remembered)
    record = run(tiny("controls=[]"), tmp_path / "run")
    assert sent == [record.evaluation.confusion]
    assert sum(map(sum, sent[0]["agreement"])) == record.evaluation.windows


def test_the_same_seed_is_the_same_bridge_and_another_is_not(
    session_cache: Path, tmp_path: Path, finished: Path
) -> None:
    run(tiny("controls=[]"), tmp_path / "again")
    run(tiny("controls=[]", "seed=1"), tmp_path / "other")
    for name, array in bridge(finished).items():
        np.testing.assert_array_equal(array, bridge(tmp_path / "again")[name])
        assert array.shape == bridge(tmp_path / "other")[name].shape
    assert any((array != bridge(tmp_path / "other")[name]).any() for name, array in bridge(finished).items())


def test_a_finished_run_is_not_overwritten_unasked(session_cache: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    before = (folder / "run.json").stat().st_mtime_ns
    with pytest.raises(RunFolderError, match=r"already holds a run \(completed\)") as caught:
        run(tiny(), folder)
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    assert (folder / "run.json").stat().st_mtime_ns == before
    run(tiny("controls=[]", "train.rounds=1"), folder, overwrite=True)
    assert len(read_record(folder).rounds) == 1


def test_resuming_a_finished_run_changes_nothing(session_cache: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    record = run(tiny(), folder, resume=True)
    assert record.evaluation == read_record(finished).evaluation
    assert record.rounds == read_record(finished).rounds


def test_resume_where_nothing_is_begins(session_cache: Path, tmp_path: Path, finished: Path) -> None:
    run(tiny("controls=[]"), tmp_path / "new", resume=True)
    for name, array in bridge(finished).items():
        np.testing.assert_array_equal(array, bridge(tmp_path / "new")[name])


def test_resume_with_another_configuration_names_the_keys(session_cache: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    with pytest.raises(ResumeError, match="another configuration") as caught:
        run(tiny("train.learning_rate=0.5", "bridge.rank=2"), folder, resume=True)
    assert "train.learning_rate" in caught.value.why
    assert "bridge.rank" in caught.value.why
    assert caught.value.exit_code == 2


def test_a_prepared_study_is_run_where_it_lies(session_cache: Path, tmp_path: Path) -> None:
    folder = prepare(tiny("controls=[]"), tmp_path / "study")
    made = (folder / "job.yaml").stat().st_mtime_ns
    assert run(tiny("controls=[]"), folder).status == "completed"
    assert (folder / "job.yaml").stat().st_mtime_ns == made


def test_a_folder_of_something_else_is_never_touched(session_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match="is not an empty folder"):
            run(tiny(), tmp_path, **options)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_two_runs_in_one_folder_are_refused(session_cache: Path, tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait_inside(what: str, done: int, total: int) -> None:
        inside.set()
        leave.wait(60)

    thread = threading.Thread(target=lambda: run(tiny("controls=[]"), tmp_path / "run", progress=wait_inside))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RunFolderError, match="another fedbridge-sim runs there"):
            run(tiny("controls=[]"), tmp_path / "run")
    finally:
        leave.set()
        thread.join()
    assert read_record(tmp_path / "run").status == "completed"


def test_a_run_that_the_policies_forbid_fails_and_says_why(session_cache: Path, tmp_path: Path) -> None:
    config = tiny("policy={items: [site, can_take_part, reason], minimum_patients: 2}", "sites.wait_seconds=1")
    with pytest.raises(RunError):
        run(config, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert {site.reason for site in record.sites} == {"POLICY_FORBIDS"}


def test_rotations_test_each_patient_once_and_pool(session_cache: Path, tmp_path: Path) -> None:
    config = tiny(
        "split={rotations: 2, test: 0.5}", "controls=[linear_student, site_alone]", "train.rounds=1", "workers=1"
    )
    record = run(config, tmp_path / "run")
    assert record.rotations == ["rotation-0", "rotation-1"]
    parts = [read_record(tmp_path / "run" / name) for name in record.rotations]
    with (tmp_path / "run" / "predictions.csv").open() as file:
        tested = {row["patient"] for row in csv.DictReader(file)}
    assert len(tested) == record.evaluation.patients == 14  # every hospital patient
    assert [part.evaluation.patients for part in parts] == [7, 7]
    summed = np.sum([part.evaluation.confusion["bridge"] for part in parts], axis=0)
    assert record.evaluation.confusion["bridge"] == summed.tolist()
    assert set(record.evaluation.baselines) == {"linear_student", "site_alone"}
    assert (tmp_path / "run" / "report.html").is_file()


def test_differences_are_dotted_keys() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "gone": 0}
    new = {"a": 1, "b": {"c": 5, "d": {"e": 4}}, "more": 0}
    assert differences(old, new) == ["b.c", "b.d.e", "gone", "more"]
