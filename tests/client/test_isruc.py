"""ISRUC-Sleep: epochs, channels by name, stages by epoch, and every way in which the files may fall short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from bridge.errors import ConfigError
from bridge.windows import WindowSpec
from client.errors import RecordingError
from client.labels import LabelSource
from client.readers.base import find_reader
from client.readers.contract import check_reader
from client.readers.isruc import IsrucReader
from client.site import InputFormat
from client.site_file import Role, SiteFile
from client.windowing import Cut, cut
from simulations.made_up.formats import wave, write_isruc

from .files import PLAIN

EEG = ("F3", "C3", "O1", "F4", "C4", "O2")


def windows(path: Path, options: dict[str, Any], **labels: Any) -> Cut:
    """Windows of 30 s as a site would cut them, at the files' own rate."""
    file = SiteFile.model_validate({
        "site": "north", "folder": ".", "reader": {"name": "isruc", "options": options},
        "old": {"modality": "EEG", "channels": EEG, "rate_hz": 200},
        "new": {"modality": "ECG", "channels": ["ECG"], "rate_hz": 200},
        "window": {"seconds": 30, "step_seconds": 30},
        "labels": {"source": "recording", "classes": ["wake", "sleep"], **labels},
    })  # fmt: skip
    formats: dict[Role, InputFormat] = {
        "old": InputFormat(
            window=WindowSpec(modality="EEG", channels=EEG, rate_hz=200, samples=6000), preprocessing=PLAIN
        ),
        "new": InputFormat(
            window=WindowSpec(modality="ECG", channels=("ECG",), rate_hz=200, samples=6000), preprocessing=PLAIN
        ),
    }
    return cut(IsrucReader(options).read(path), file, formats, LabelSource("recording", {}))


def test_windows_are_the_epochs_with_their_stages(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 7, [0, 1, 2, 3, 5, 0, 9], epochs=7)
    found = windows(path, {})
    assert found.starts.tolist() == [0, 30, 60, 90, 120, 150, 180]
    assert found.labels.tolist() == [0, 1, 1, 1, 1, 0, -1]  # 9 is no stage
    stored = scipy.io.loadmat(path)
    assert np.array_equal(found.signals["old"][3, 0], stored["F3_A2"][3].astype(np.float32))
    assert np.array_equal(found.signals["old"][3, 4], stored["C4_A1"][3].astype(np.float32))
    assert np.array_equal(found.signals["new"][6, 0], stored["X2"][6].astype(np.float32))


def test_five_classes_end_with_rem(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 7, [0, 1, 2, 3, 5, 4], epochs=6)
    found = windows(path, {"classes": 5}, classes=["wake", "N1", "N2", "N3", "REM"])
    assert found.labels.tolist() == [0, 1, 2, 3, 4, -1]  # the files' 5 is class 4, their 4 is none


def test_the_reader_keeps_the_contract(tmp_path: Path) -> None:
    write_isruc(tmp_path, 1, [0, 0, 1, 1])
    write_isruc(tmp_path, 2, None)
    write_isruc(tmp_path, 10, [0] * 4, without=["X2"])
    (tmp_path / "ExtractedChannels" / "subjects.mat").write_bytes(b"")
    assert find_reader("isruc") is IsrucReader
    reader = IsrucReader({})
    first, tenth, second = check_reader(reader, tmp_path)
    assert [each.patient for each in (first, tenth, second)] == ["subject1", "subject10", "subject2"]
    assert [part.name for part in reader.parts(tmp_path / "ExtractedChannels" / "subject1.mat")] == [
        "subject1.mat", "1_1.txt"
    ]  # fmt: skip
    assert second.labels is None
    assert reader.parts(tmp_path / "ExtractedChannels" / "subject2.mat") == [
        tmp_path / "ExtractedChannels" / "subject2.mat"
    ]
    assert first.segments == ((0.0, 120.0),)
    assert first.signals["EEG"].channels == EEG
    assert first.signals["ECG"].rate_hz == 200.0
    assert tenth.absent["ECG"].startswith("no channel X2 (for ECG); the file has F3_A2, C3_A2")


@pytest.mark.parametrize("last_stages", ["by_epoch", "drop_30"])
def test_on_whole_files_both_ways_with_the_last_lines_agree(tmp_path: Path, last_stages: str) -> None:
    path = write_isruc(tmp_path, 7, [0, 1, 1, 0])
    assert windows(path, {"last_stages": last_stages}).labels.tolist() == [0, 1, 1, 0]


def test_lines_are_counted_from_the_first_epoch(tmp_path: Path) -> None:
    short = write_isruc(tmp_path, 1, "0\n1\n1")  # fewer lines than epochs, no newline at the end
    assert windows(short, {}).labels.tolist() == [0, 1, 1, -1]
    assert windows(short, {"last_stages": "drop_30"}).labels.tolist() == [-1] * 4
    trimmed = write_isruc(tmp_path, 2, "0\r\n1\r\n1\r\n0\r\n\r\n")  # as many lines as epochs
    assert windows(trimmed, {}).labels.tolist() == [0, 1, 1, 0]
    surplus = write_isruc(tmp_path, 3, "0\n1\n1\n1\n" + 7 * "0\n" + 30 * "5\n")
    assert windows(surplus, {"last_stages": "drop_30"}).labels.tolist() == [0, 1, 1, 1]
    rejecting = windows(short, {}, unlabelled="reject")
    assert rejecting.labels.tolist() == [0, 1, 1]
    assert rejecting.rejected == {"no label": 1}


def test_the_second_experts_stages(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 7, [0, 0, 0, 0])
    (tmp_path / "RawData" / "7" / "7_2.txt").write_text("1\n1\n0\n0\n")
    assert windows(path, {"scorer": 2}).labels.tolist() == [1, 1, 0, 0]


def test_channels_of_different_lengths_leave_the_missing_epochs_out(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 7, [0, 1, 0, 1], X2=wave(90, 200, 1).reshape(3, 6000))
    found = windows(path, {})
    assert found.starts.tolist() == [0, 30, 60]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.rejected == {"ECG missing": 1}
    path = write_isruc(tmp_path, 8, [0, 1, 0, 1], O1_A2=wave(60, 200, 1).reshape(2, 6000))
    assert windows(path, {}).rejected == {"EEG missing": 2}


def test_an_epoch_with_something_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    broken = wave(120, 200, 1).reshape(4, 6000)
    broken[1, 5], broken[2, 7] = np.nan, -np.inf
    found = windows(write_isruc(tmp_path, 7, [0, 1, 0, 1], X2=broken), {})
    assert found.starts.tolist() == [0, 90]
    assert found.labels.tolist() == [0, 1]
    assert found.rejected == {"ECG nan": 2}


def test_another_rate_is_refused_by_the_site(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 7, [0] * 4, samples=3000)
    assert IsrucReader({}).read(path).signals["EEG"].rate_hz == 100.0
    with pytest.raises(RecordingError, match="subject7: EEG was sampled at 100 Hz"):
        windows(path, {})


def test_other_channels_are_named_in_the_options(tmp_path: Path) -> None:
    path = write_isruc(tmp_path, 8, [0] * 4, without=["C3_A2"], C3=wave(120, 200, 1).reshape(4, 6000))
    assert IsrucReader({}).missing_channels(path)["EEG"].startswith("no channel C3_A2 (for C3)")
    options = {"signals": {"EEG": {"channels": {"C3": ["C3_A2", "C3"]}, "scale": 2}}}
    signal = IsrucReader(options).read(path).signals["EEG"]
    assert signal.channels == ("C3",)
    assert np.array_equal(signal.data[0], 2 * wave(120, 200, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("channels", "why"),
    [
        ({"X2": np.zeros((4, 6000, 2))}, "X2 is no table of numbers"),
        ({"X2": np.zeros((0, 6000))}, "X2 is no table of numbers"),
        ({"X2": "text"}, "X2 is no table of numbers"),
        ({"X2": np.array([{}, {}], dtype=object)}, "X2 is no table of numbers"),
        ({"O1_A2": np.zeros((4, 5999))}, "have 5999 and 6000 samples an epoch"),
    ],
)
def test_what_is_no_table_of_epochs_is_refused(tmp_path: Path, channels: dict[str, Any], why: str) -> None:
    path = write_isruc(tmp_path, 7, [0] * 4, **channels)
    with pytest.raises(RecordingError, match=r"subject7\.mat: can't be read as extracted channels") as caught:
        IsrucReader({}).read(path)
    assert why in caught.value.why


@pytest.mark.parametrize("damage", ["half", "tail", "empty", "text", "hdf5"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = write_isruc(tmp_path, 7, [0] * 4, without=["X3"])  # the ECG is the last
    whole = path.read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2], "tail": whole[:-20], "empty": b"", "text": b"no file of MATLAB" * 20,
            "hdf5": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM\x89HDF\r\n\x1a\n" + bytes(500),
        }[damage]
    )  # fmt: skip
    with pytest.raises(RecordingError, match=r"subject7\.mat: can't be read as extracted channels"):
        IsrucReader({}).read(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0\n1\nN2\n0\n", "line 3 is 'N2'"),
        ("0\n\n1\n", "line 2 is ''"),
        ("0 1\n", "line 1 is '0 1'"),
        ("-1\n", "line 1"),
    ],
)
def test_what_is_no_stage_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = write_isruc(tmp_path, 7, text)
    with pytest.raises(RecordingError, match=rf"7_1\.txt: {line}"):
        IsrucReader({}).read(path)


def test_an_empty_file_of_stages_has_no_labels(tmp_path: Path) -> None:
    assert IsrucReader({}).read(write_isruc(tmp_path, 7, "\n")).labels is None
    path = write_isruc(tmp_path, 8, "\xe9")
    with pytest.raises(RecordingError, match=r"8_1\.txt: the stages can't be read"):
        IsrucReader({}).read(path)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="classes"):
        IsrucReader({"classes": 3})
    with pytest.raises(ConfigError, match="scorers"):
        IsrucReader({"scorers": 1})
