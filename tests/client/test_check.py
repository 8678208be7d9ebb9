"""The check of a site: what it prints, what it draws, and when its exit code is not zero."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from bridge.errors import ExitCode
from client.check import run_check
from client.errors import ModelsError, NoWindowsError, SiteError, SiteFileError
from client.site_file import write_site_file

from .files import noise, site_file, write_npz
from .sites import build_models
from .test_readers import CINC, EDF, EEGMAT, WFDB


def checked(place: Path, picture: Path | None = None, **changes: Any) -> tuple[int, str]:
    (place / "policy.yaml").write_text(LENIENT)
    write_site_file(place / "site.yaml", site_file(**{"policy": "policy.yaml", **changes}))
    text = io.StringIO()
    code = run_check(place / "site.yaml", picture, Console(file=text, width=200))
    return code, text.getvalue()


LENIENT = "minimum_patients: 1\n"


def some_patients(folder: Path, count: int = 6) -> None:
    for number in range(count):
        write_npz(folder / "recordings", f"p{number}", seconds=20, seed=number)


def test_a_good_site_passes(tmp_path: Path) -> None:
    some_patients(tmp_path)
    code, text = checked(tmp_path, splits={"pair": ["p0", "p1", "p2"], "validation": ["p3"], "test": ["p4"]})
    assert code == ExitCode.OK, text
    assert "6 usable recordings of 6 patients" in text
    assert "6 recordings hold I at 100 Hz" in text
    assert "6 recordings hold P at 40 Hz" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith((" pair ", " test "))}
    assert rows["pair"][:3] == ["3", "3", "57"]
    assert rows["test"][:3] == ["1", "1", "19"]
    assert "in no split" in text
    assert "Everything fits" in text


def test_every_bad_file_is_named_with_its_reason(tmp_path: Path) -> None:
    some_patients(tmp_path)
    recordings = tmp_path / "recordings"
    write_npz(recordings, "rate", ECG=noise(10, 125, 0), fs=np.array(125))
    write_npz(recordings, "misaligned", PPG=noise(5, 40, 1))
    (recordings / "torn.npz").write_bytes((recordings / "p0.npz").read_bytes()[:2000])
    np.savez(recordings / "blind.npz", subject="b", ECG=noise(10, 100, 0))
    write_npz(recordings, "flat", ECG=np.ones((1, 1000), np.float32))
    write_npz(recordings, "holes", PPG=np.full((1, 400), np.nan, np.float32))
    code, text = checked(tmp_path)
    assert code == ExitCode.DATA
    assert "8 usable recordings of 8 patients" in text
    assert "4 unusable" in text
    for part in (
        "torn.npz: can't be read as .npz",
        "blind: has no PPG: no array 'PPG', it holds ECG, subject",
        "misaligned: the two signals do not cover the same time: 0 to 10 s and 0 to 5 s",
        "rate: the two signals do not cover the same time: 0 to 12.5 s and 0 to 10 s",
        "2 patient(s) have no usable window: flat, holes",
        "Problem: 4 file(s) can't be used",
    ):
        assert part in text, part
    counted = dict(re.split(" {2,}", line.strip())[:2] for line in text.splitlines() if "%" in line)
    assert counted == {"ECG flat": "9", "PPG nan": "9"}


def test_bad_files_that_are_excluded_on_purpose_are_counted_and_no_problem(tmp_path: Path) -> None:
    some_patients(tmp_path)
    (tmp_path / "recordings" / "torn.npz").write_bytes(b"x")
    code, text = checked(tmp_path, exclude=["torn.npz"])
    assert code == ExitCode.OK
    assert "1 left out by 'exclude'" in text


@pytest.mark.parametrize(
    ("splits", "problem"),
    [
        ({"pair": ["p0"], "validation": [], "test": ["p1"]}, "the split 'pair' has one patient"),
        ({"pair": ["p0", "p1"], "validation": [], "test": ["who"]}, "the split 'test' has no window"),
        (
            {"pair": ["p0", "p1", "zz"], "validation": [], "test": ["p2"]},
            "1 listed patient(s) have no usable recording",
        ),
    ],
)
def test_splits_that_cannot_work_are_problems(tmp_path: Path, splits: dict, problem: str) -> None:
    some_patients(tmp_path, 3)
    code, text = checked(tmp_path, splits=splits)
    assert code == ExitCode.DATA
    assert problem in text


def test_what_the_policy_would_refuse_is_told(tmp_path: Path) -> None:
    some_patients(tmp_path)
    splits = {"pair": ["p0", "p1", "p2", "p3"], "validation": [], "test": ["p4", "p5"]}
    code, text = checked(tmp_path, splits=splits, policy=None)
    assert code == ExitCode.DATA
    assert "'pair' has 4 patients with windows, the policy's minimum_patients is 5" in text
    assert "Note: the split 'test' has 2 patients, the policy's minimum_group is 5: no metric of it would leave" in text
    with pytest.raises(SiteFileError, match=r"gone\.yaml"):
        checked(tmp_path, policy="gone.yaml")


def test_models_that_do_not_fit_are_told_before_any_file_is_read(tmp_path: Path) -> None:
    models = {name: f"models/{name}" for name in ("old_encoder", "new_encoder", "task_head")}
    some_patients(tmp_path, 2)
    (tmp_path / "models" / "new_encoder").mkdir(parents=True)
    (tmp_path / "models" / "new_encoder" / "card.json").write_text("{}")
    with pytest.raises(ModelsError, match="no complete model folder"):
        checked(tmp_path, models=models)
    build_models(tmp_path / "models")
    with pytest.raises(ModelsError, match="windows of 4 s, the site file cuts 2 s"):
        checked(tmp_path, models=models)


def test_a_fresh_site_whose_models_come_with_the_study_passes_with_a_note(tmp_path: Path) -> None:
    some_patients(tmp_path)
    places = {name: f"models/{name}" for name in ("old_encoder", "new_encoder", "task_head")}
    splits = {"pair": ["p0", "p1", "p2"], "validation": ["p3"], "test": ["p4"]}
    (tmp_path / "models" / "old_encoder").mkdir(parents=True)  # an empty folder is no model
    code, text = checked(tmp_path, models=places, splits=splits)
    assert code == ExitCode.OK, text
    assert "Note: there are no models yet: they come with a study" in text
    assert "windows of 2 s, I as 200 samples at 100 Hz" in text
    without = checked(tmp_path, splits=splits)[1]
    assert "no models yet" not in without
    assert [line for line in text.splitlines() if "windows" in line and "Note" not in line] == [
        line for line in without.splitlines() if "windows" in line
    ]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    with pytest.raises(NoWindowsError, match="no recordings"):
        checked(tmp_path)


def test_the_picture_shows_accepted_and_rejected_windows_without_names(tmp_path: Path) -> None:
    some_patients(tmp_path)
    ecg = noise(20, 100, 9)
    ecg[:, 500:900] = 0
    write_npz(tmp_path / "recordings", "secret-name", seconds=20, ECG=ecg)
    picture = tmp_path / "windows.png"
    code, text = checked(tmp_path, picture)
    assert code == ExitCode.OK
    image = imread(picture)
    assert image.shape[0] > 700
    assert image.shape[1] > 1200
    colours = {tuple(pixel) for pixel in np.round(image[..., :3].reshape(-1, 3)[::3] * 255).astype(int).tolist()}
    for colour in ((0x1F, 0x5A, 0x94), (0xB3, 0x54, 0x1E), (0xA0, 0x18, 0x18)):
        assert colour in colours
    assert b"secret" not in picture.read_bytes()
    assert "row 5: secret-name.npz from" in text
    assert "ECG flat" in text


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    some_patients(tmp_path, 2)
    with pytest.raises(SiteError, match="picture can't be written"):
        checked(tmp_path, tmp_path / "nowhere" / "a.png")


REAL: dict[str, dict[str, Any]] = {
    "eegmat": {
        "reader": {"name": "npz", "options": EEGMAT},
        "old": {"modality": "EEG", "channels": ["Fz", "Pz"], "rate_hz": 250},
        "new": {"modality": "ECG", "channels": ["ECG"], "rate_hz": 250},
        "labels": {"source": "recording", "classes": ["rest", "mental_arithmetic"]},
    },
    "raw/cinc2015": {
        "reader": {"name": "wfdb", "options": WFDB},
        "old": {"modality": "ECG", "channels": ["ECG"], "rate_hz": 250},
        "new": {"modality": "PPG", "channels": ["PLETH"], "rate_hz": 250},
    },
    "raw/eegmat": {
        "reader": {"name": "edf", "options": EDF},
        "old": {"modality": "EEG", "channels": ["Fz", "Pz"], "rate_hz": 500},
        "new": {"modality": "ECG", "channels": ["ECG"], "rate_hz": 500},
        "labels": {"source": "recording", "classes": ["1", "2"]},
    },
}


@pytest.mark.parametrize(("name", "usable", "patients", "unusable"), [
    ("eegmat", 28, 28, 0), ("raw/cinc2015", 12, 12, 3), ("raw/eegmat", 6, 3, 0),
])  # fmt: skip
def test_real_recordings(
    shared_data: Path, tmp_path: Path, name: str, usable: int, patients: int, unusable: int
) -> None:
    window = {"seconds": 4, "step_seconds": 4}
    code, text = checked(tmp_path, folder=str(shared_data / name), window=window, **REAL[name])
    assert code == (ExitCode.DATA if unusable else ExitCode.OK)
    assert f"{usable} usable recordings of {patients} patients" in text
    assert f"{unusable} unusable" in text
    if unusable:
        assert text.count("has no PPG: no channel PLETH") == 3
    if name == "eegmat":
        # 02 and 13 without their rest (182 s, 45 windows), 20 and 35 without their task (62 s, 15 windows)
        assert re.search("ECG missing +120 ", text)


def test_cinc2015_as_npz(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for path in sorted((shared_data / "cinc2015").glob("a*.npz"))[:20]:
        (folder / path.name).symlink_to(path)
    sections = {each: {"modality": each, "channels": [each], "rate_hz": 125} for each in ("ECG", "PPG")}
    code, text = checked(
        tmp_path,
        reader={"name": "npz", "options": CINC},
        old=sections["ECG"],
        new=sections["PPG"],
        window={"seconds": 10, "step_seconds": 10},
        labels={"source": "recording", "classes": ["false_alarm", "true_alarm"]},
    )
    assert code == ExitCode.OK
    assert "20 usable recordings of 20 patients, 1.7 h" in text
