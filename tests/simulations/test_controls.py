"""Controls: wrong pairs that are really wrong, and bridges trained by the sites' own code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from client.features import features
from client.site import open_site
from server.record import read_record
from simulations.config import CONTROLS
from simulations.controls import Mispaired, join_sites, mispairing, predict_all, train_alone
from simulations.evaluation import Predictions
from simulations.flower_engine import MARK, marked_processes
from simulations.prepare import read_job, site_folders
from simulations.run import run
from tests.simulations.studies import SMOKE, TINY, tiny


@pytest.mark.parametrize("sizes", [[5, 5], [1, 1, 1], [40, 3, 17, 20], [2] * 50, [30, 30, 1]])
def test_no_window_keeps_its_partner_nor_one_of_its_patient(sizes: list[int]) -> None:
    patients = np.repeat([f"p{i}" for i in range(len(sizes))], sizes)
    for seed in range(5):
        wrong = mispairing(patients, seed)
        assert sorted(wrong) == list(range(len(patients)))
        assert (patients[wrong] != patients).all()


def test_one_patient_with_most_windows_still_has_only_wrong_partners() -> None:
    patients = np.repeat(["big", "small"], [30, 2])
    wrong = mispairing(patients, 0)
    assert sorted(wrong) == list(range(32))
    assert (wrong != np.arange(32)).all()


def test_wrong_pairs_depend_on_the_seed_and_look_like_a_shuffle() -> None:
    patients = np.repeat([f"p{i}" for i in range(20)], 10)
    one, again, other = mispairing(patients, 1), mispairing(patients, 1), mispairing(patients, 2)
    assert (one == again).all()
    assert (one != other).mean() > 0.9
    assert abs(np.corrcoef(np.arange(200), one)[0, 1]) < 0.2


def test_mispaired_features_move_the_new_side_alone(prepared: Path) -> None:
    right = features(open_site(prepared / "sites" / "site-0"), "pair")
    wrong = Mispaired.of(right, seed=4)
    rows = mispairing(right.table.patients, 4)
    np.testing.assert_array_equal(wrong.new_output(1), right.new_output(1)[rows])
    np.testing.assert_array_equal(wrong.old_tokens([3, 1]), right.old_tokens([3, 1]))
    np.testing.assert_array_equal(wrong.old_input(1), right.old_input(1))


def test_one_machine_holds_what_the_sites_hold(prepared: Path, tmp_path: Path) -> None:
    sites = [open_site(folder) for folder in site_folders(prepared)]
    join_sites(sites, tmp_path / "all")
    everything = open_site(tmp_path / "all")
    for split in ("pair", "test"):
        rows = {}
        for site in sites:
            own = features(site, split)
            for i, key in enumerate(zip(own.table.patients, own.table.starts, strict=True)):
                rows[key] = (own.table.labels[i], own.pseudo_labels[i], own.new_output(0)[i].tobytes())
        joined = features(everything, split)
        assert len(joined) == len(rows)
        for i, key in enumerate(zip(joined.table.patients, joined.table.starts, strict=True)):
            assert rows[key] == (
                joined.table.labels[i],
                joined.pseudo_labels[i],
                joined.new_output(0)[i].tobytes(),
            )


def test_a_federation_of_one_is_that_site_alone(session_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    config = tiny("partition={hospitals: 1}", "sites.minimum=1", "controls=[]")
    record = run(config, folder)
    assert record.selection is not None
    positions = record.selection.input_position, record.selection.output_position
    site = open_site(folder / "sites" / "site-0")
    alone = train_alone(folder, read_job(folder), positions, features(site, "pair"), site)
    trained = load_file(folder / "bridge" / "bridge.safetensors")
    assert max(float(np.abs(trained[name] - alone[name]).max()) for name in alone) < 1e-6


def test_every_control_answers_every_test_window(finished: Path) -> None:
    found = Predictions.load(finished / "predictions.npz")
    names = {"bridge", "shuffled_pairs", "centralised", "linear_student", "site_alone:hospital-1"}
    assert set(found.predicted) == names | {"site_alone:hospital-2"}
    test = [features(open_site(folder), "test") for folder in site_folders(finished)]
    assert len(found.table) == sum(len(each) for each in test) == read_record(finished).evaluation.windows
    for answers in (found.pseudo_labels, *found.predicted.values()):
        assert answers.shape == (len(found.table),)
        assert set(answers.tolist()) <= {0, 1, 2}


def test_the_linear_student_is_a_logistic_regression_on_standardised_features(finished: Path) -> None:
    record = read_record(finished)
    assert record.selection is not None
    m = record.selection.input_position
    everything = open_site(finished / "controls" / "all-hospitals")
    pairs, test = features(everything, "pair"), features(everything, "test")
    x, mean, scale = pairs.new_output(m), pairs.new_output(m).mean(axis=0), pairs.new_output(m).std(axis=0)
    student = LogisticRegression(max_iter=1000).fit((x - mean) / scale, pairs.pseudo_labels)
    expected = student.predict((test.new_output(m) - mean) / scale)
    found = Predictions.load(finished / "predictions.npz").predicted["linear_student"]
    assert (found == expected).mean() > 0.97


def test_a_file_that_is_left_out_is_told_once_and_by_this_process_alone(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True, ignore=shutil.ignore_patterns("controls"))
    site = open_site(folder / "sites" / "site-0")
    broken = next(path for path in site.files() if site.file.splits.of(path.stem) == "pair")
    broken.unlink()
    broken.write_bytes(b"PK no archive")
    predict_all(folder, tiny("controls=[linear_student, centralised]", "workers=2"), lambda what, done, total: None)
    told = [record for record in caplog.records if record.name == "fedbridge.site"]
    assert [broken.name in record.getMessage() for record in told] == [True]
    assert broken.name not in capfd.readouterr().err.replace(told[0].getMessage(), "", 1)


def test_controls_can_be_left_out(session_cache: Path, tmp_path: Path) -> None:
    evaluation = run(tiny("controls=[linear_student]", "workers=1"), tmp_path / "run").evaluation
    assert set(evaluation.baselines) == {"linear_student"}
    assert evaluation.site_alone_per_site == {}
    assert evaluation.teacher is not None
    assert evaluation.chance is not None


def test_all_controls_stand_in_the_record_with_intervals(finished: Path) -> None:
    evaluation = read_record(finished).evaluation
    assert set(evaluation.baselines) == set(CONTROLS)
    assert set(evaluation.site_alone_per_site) == {"hospital-1", "hospital-2"}
    for metrics in (evaluation.bridge, evaluation.teacher, *evaluation.baselines.values()):
        assert metrics is not None
        assert metrics.balanced_accuracy is not None
        assert metrics.balanced_accuracy.low is not None
        assert metrics.balanced_accuracy.high is not None
        assert metrics.balanced_accuracy.low <= metrics.balanced_accuracy.value <= metrics.balanced_accuracy.high
    assert "bootstrap" in evaluation.interval


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_during_the_controls_no_process_stays_and_resume_goes_on(
    number: int, session_cache: Path, tmp_path: Path, finished: Path
) -> None:
    out = tmp_path / "run"
    sim = str(Path(sys.executable).parent / "fedbridge-sim")
    changes = [part for override in TINY for part in ("--set", override)]
    mark = f"controls-{os.getpid()}-{number}"
    child = subprocess.Popen(
        [sim, "run", str(SMOKE), *changes, "--out", str(out), "--quiet"], env=os.environ | {MARK: mark}
    )
    deadline = time.monotonic() + 200
    while not list((out / "controls").glob("[!.]*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.poll() is None
    child.send_signal(number)
    assert child.wait(30) != 0
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    done = sorted(path.name for path in (out / "controls").glob("[!.]*.npy"))
    stamps = [(out / "controls" / name).stat().st_mtime_ns for name in done]
    record = run(tiny(), out, resume=True)
    assert [(out / "controls" / name).stat().st_mtime_ns for name in done] == stamps  # not computed again
    assert record.evaluation == read_record(finished).evaluation
