"""What people see of bad files: the installed commands on recordings and configurations as they go wrong.

Every error names the file, the key or the value, says what to do, and ends with its exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb
import yaml

from bridge.errors import ExitCode
from client import cli
from tests.client.disk import small_disk
from tests.client.files import noise, write_edf, write_npz
from tests.end_to_end.commands import SMOKE, attempt

OPTIONS: dict[str, dict[str, Any]] = {
    "npz": {
        "subject": "subject",
        "signals": {
            "ECG": {"array": "ECG", "rate": 100, "channels": ["I"]},
            "PPG": {"array": "PPG", "rate": 40, "channels": ["P"]},
        },
    },
    "edf": {"signals": {"ECG": {"channels": {"I": "I"}}, "PPG": {"channels": {"P": "P"}}}},
    "wfdb": {"signals": {"ECG": {"channels": {"I": "I"}}, "PPG": {"channels": {"P": "P"}}}},
}
RATES = {"npz": (100, 40), "edf": (100, 40), "wfdb": (100, 100)}
PATIENTS = ("p0", "p1", "p2", "p3")
SPLITS = {"pair": ["p0", "p1"], "validation": [], "test": ["p2", "p3"]}


def told(result: tuple[int, str], code: ExitCode, *parts: str) -> None:
    """The exit code, each part of the text (however the terminal wraps it), and no traceback."""
    found, text = result
    assert "Traceback" not in text, text
    plain = " ".join(text.replace("│", " ").split())
    for part in parts:
        assert part in plain, text
    assert found == int(code), text


def write_recording(folder: Path, name: str, kind: str) -> None:
    """10 s of both modalities in the given format."""
    folder.mkdir(parents=True, exist_ok=True)
    ecg, ppg = RATES[kind]
    seed = int(name[1:])
    if kind == "npz":
        write_npz(folder, name, seed=seed)
        return
    signals = {"I": noise(10, ecg, seed)[0].astype(float), "P": noise(10, ppg, seed + 50)[0].astype(float)}
    if kind == "edf":
        write_edf(folder / f"{name}.edf", {"I": (ecg, signals["I"]), "P": (ppg, signals["P"])})
        return
    both = np.stack(list(signals.values()), axis=1)
    wfdb.wrsamp(
        name, fs=ecg, units=["mV", "mV"], sig_name=["I", "P"], p_signal=both, fmt=["16", "16"], write_dir=str(folder)
    )


def site(folder: Path, kind: str = "npz", **changes: Any) -> Path:
    """A site of four patients that the command finds nothing wrong with, but for `changes`."""
    for name in PATIENTS:
        write_recording(folder / "recordings", name, kind)
    ecg, ppg = RATES[kind]
    file = {
        "schema": "fedbridge.site/1",
        "site": "north",
        "folder": "recordings",
        "reader": {"name": kind, "options": OPTIONS[kind]},
        "old": {"modality": "ECG", "channels": ["I"], "rate_hz": ecg},
        "new": {"modality": "PPG", "channels": ["P"], "rate_hz": ppg},
        "window": {"seconds": 2, "step_seconds": 1},
        "splits": SPLITS,
        "policy": "policy.yaml",
    }
    (folder / "policy.yaml").write_text("minimum_patients: 2\nminimum_group: 2\n", encoding="utf-8")
    (folder / "site.yaml").write_text(yaml.safe_dump({**file, **changes}), encoding="utf-8")
    return folder


Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """`fedbridge-site check FOLDER ...` by the command's entry point, in this process: it starts in no time."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fedbridge-site", "check", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


@pytest.mark.parametrize("kind", ["npz", "edf", "wfdb"])
def test_a_good_site_has_no_problem_and_a_truncated_file_is_named(kind: str, tmp_path: Path, check: Check) -> None:
    folder = site(tmp_path, kind)
    told(check(folder), ExitCode.OK, "4 usable recordings of 4 patients", "Everything fits the site file")
    data = folder / "recordings" / {"npz": "p1.npz", "edf": "p1.edf", "wfdb": "p1.dat"}[kind]
    data.write_bytes(data.read_bytes()[: data.stat().st_size * 6 // 10])
    named = "p1.hea" if kind == "wfdb" else data.name
    told(check(folder), ExitCode.DATA, "1 unusable", named, "can't be read", "copy", "Problem: 1 file(s) can't be used")


def put(name: str, **arrays: Any) -> Callable[[Path], None]:
    return lambda recordings: write_npz(recordings, name, **arrays) and None


def without(name: str, missing: str) -> Callable[[Path], None]:
    arrays = {"ECG": noise(10, 100, 0), "PPG": noise(10, 40, 0)}
    return lambda recordings: np.savez(
        recordings / f"{name}.npz", subject=name, **{k: v for k, v in arrays.items() if k != missing}
    )


RECORDINGS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing modality": (without("p1", "PPG"), ("p1", "has no PPG", "no array 'PPG'", "Problem: 1 file(s)")),
    "missing channel": (
        put("p1", ECG=noise(10, 100, 0, channels=2)),
        ("p1.npz", "a signal of 2 rows has the channel names ['I']", "Problem: 1 file(s)"),
    ),
    "wrong rate": (
        put("p1", ECG=noise(10, 125, 0)),
        ("p1", "do not cover the same time: 0 to 12.5 s and 0 to 10 s", "correct the rate", "Problem: 1 file(s)"),
    ),
    "misaligned lengths": (
        put("p1", PPG=noise(5, 40, 0)),
        ("p1", "do not cover the same time: 0 to 10 s and 0 to 5 s", "Problem: 1 file(s)"),
    ),
    "NaN": (
        put("p1", PPG=np.full((1, 400), np.nan, np.float32)),
        ("PPG nan 9", "1 patient(s) have no usable window: p1"),
    ),
    "flat": (put("p1", ECG=np.ones((1, 1000), np.float32)), ("ECG flat 9", "1 patient(s) have no usable window: p1")),
}


@pytest.mark.parametrize("fault", RECORDINGS)
def test_a_recording_that_is_not_as_the_site_file_says(fault: str, tmp_path: Path, check: Check) -> None:
    spoil, parts = RECORDINGS[fault]
    folder = site(tmp_path)
    spoil(folder / "recordings")
    told(check(folder), ExitCode.DATA, *parts)


def test_a_format_that_carries_its_rate_and_channels_is_held_to_them(tmp_path: Path, check: Check) -> None:
    folder = site(tmp_path, "edf", new={"modality": "PPG", "channels": ["P"], "rate_hz": 64})
    told(check(folder), ExitCode.DATA, "Problem: 4 file(s) can't be used", "40 Hz", "64 Hz", "rate_hz")
    options = {**OPTIONS["edf"], "signals": {"ECG": {"channels": {"I": "I"}}, "PPG": {"channels": {"P": "pleth"}}}}
    folder = site(
        tmp_path,
        "edf",
        reader={"name": "edf", "options": options},
    )
    told(check(folder), ExitCode.DATA, "Problem: 4 file(s) can't be used", "pleth", "I, P")


def remove_all(folder: Path) -> None:
    for path in (folder / "recordings").iterdir():
        path.unlink()


def leave_one(folder: Path) -> None:
    for path in (folder / "recordings").iterdir():
        if path.stem != "p0":
            path.unlink()


def flatten_all(folder: Path) -> None:
    for name in PATIENTS:
        write_npz(folder / "recordings", name, ECG=np.zeros((1, 1000), np.float32))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (remove_all, ("no recordings", "the reader 'npz' finds 0", "What to do: correct folder")),
        (leave_one, ("the split 'pair' has one patient", "the split 'test' has no window")),
        (flatten_all, ("ECG flat 36 100.0%", "Problem: ", "no usable window: p0, p1, p2, p3")),
    ],
)
def test_too_few_patients_or_windows(
    spoil: Callable[[Path], None], parts: tuple[str, ...], tmp_path: Path, check: Check
) -> None:
    folder = site(tmp_path)
    spoil(folder)
    told(check(folder), ExitCode.DATA, *parts)


def text_of(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_key_of_the_configuration_names_the_closest(tmp_path: Path) -> None:
    path = text_of(tmp_path / "study.yaml", SMOKE.read_text(encoding="utf-8").replace("  rounds:", "  ronds:"))
    for command in ("run", "prepare"):
        result = attempt("fedbridge-sim", command, path, "--out", tmp_path / "out")
        told(result, ExitCode.CONFIG, f"error: {path}", "unknown key 'train.ronds', did you mean 'rounds'?", "What to")
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_the_site_file_or_the_policy_names_the_closest(tmp_path: Path, check: Check) -> None:
    folder = site(tmp_path, windows={"seconds": 2})
    told(
        check(folder),
        ExitCode.CONFIG,
        f"error: {folder / 'site.yaml'}",
        "unknown key 'windows', did you mean 'window'?",
        "What to do",
    )
    folder = site(tmp_path)
    text_of(folder / "policy.yaml", "minimum_patient: 2\nprivacy: {epsilon_max: 2}\n")
    for words in (("check",), ("policy", "show")):
        told(
            attempt("fedbridge-site", *words, folder),
            ExitCode.CONFIG,
            f"error: {folder / 'policy.yaml'}",
            "unknown key 'minimum_patient', did you mean 'minimum_patients'?",
            "unknown key 'privacy.epsilon_max', did you mean 'epsilon_cap'?",
            "What to do",
        )


def test_a_file_that_is_no_yaml_and_one_that_is_not_there(tmp_path: Path, check: Check) -> None:
    broken = text_of(tmp_path / "broken.yaml", "name: demo\ntrain: {rounds: 3\n")
    told(attempt("fedbridge-sim", "run", broken), ExitCode.CONFIG, f"{broken}: line 3", "not valid YAML", "What to do")
    told(check(tmp_path / "nowhere"), ExitCode.CONFIG, "nowhere", "can't be read", "What to do")
    folder = site(tmp_path / "site", policy="gone.yaml")
    told(check(folder), ExitCode.CONFIG, "gone.yaml", "can't be read", "What to do")


@pytest.mark.parametrize("command", ["run", "prepare"])
def test_an_output_folder_that_cannot_be_made(command: str, tmp_path: Path) -> None:
    below = text_of(tmp_path / "file", "a file\n") / "run"
    result = attempt("fedbridge-sim", command, SMOKE, "--out", below, "--quiet")
    told(result, ExitCode.STORAGE, f"error: {below}", "can't be written", "Not a directory", "What to do")


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    below = text_of(tmp_path / "file", "a file\n") / "cache"
    extra = {"FEDBRIDGE_CACHE": str(below)}
    result = attempt("fedbridge-sim", "run", SMOKE, "--out", tmp_path / "run", "--quiet", extra=extra)
    told(result, ExitCode.STORAGE, str(below), "can't be written", "FEDBRIDGE_CACHE")
    result = attempt("fedbridge-sim", "prepare", SMOKE, "--out", tmp_path / "run", "--quiet", extra=extra)
    told(result, ExitCode.STORAGE, str(below), "FEDBRIDGE_CACHE")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_while_the_cohort_is_made(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        extra = {"FEDBRIDGE_CACHE": str(disk)}
        result = attempt("fedbridge-sim", "prepare", SMOKE, "--out", tmp_path / "run", "--quiet", extra=extra)
        told(result, ExitCode.STORAGE, str(disk), "No space left on device", "What to do")
        assert not (tmp_path / "run").exists()
        assert not [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_a_picture_that_cannot_be_written(tmp_path: Path, check: Check) -> None:
    folder = site(tmp_path)
    picture = text_of(tmp_path / "file", "a file\n") / "windows.png"
    told(check(folder, "--picture", picture), ExitCode.STORAGE, str(picture), "can't be written", "What to do")


def test_real_sets_that_are_not_there(tmp_path: Path) -> None:
    for name in ("cinc2015", "eegmat"):
        changes = ("--set", f"data.source={name}", "--set", f"data.{name}.folder={tmp_path / 'gone'}")
        result = attempt("fedbridge-sim", "prepare", SMOKE, *changes, "--out", tmp_path / "run", "--quiet")
        told(result, ExitCode.DATA, str(tmp_path / "gone"), "What to do")
