"""WESAD: Python 2 pickles, labels by sample against hand-counted windows, and what the published labels do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import ConfigError
from bridge.windows import WindowSpec
from client.errors import RecordingError, UnsafePickleError
from client.labels import LabelSource
from client.readers.base import find_reader
from client.readers.contract import check_reader
from client.readers.sampled import fourier_labels
from client.readers.wesad import WesadReader
from client.site import InputFormat
from client.site_file import Role, SiteFile
from client.windowing import Cut, cut
from simulations.made_up.formats import by_seconds, wesad_content, write_wesad

from .files import PLAIN

THREE = ["baseline", "stress", "amusement"]


def windows(path: Path, options: dict[str, Any], classes: list[str], **section: Any) -> Cut:
    """Windows of 60 s every 5 s as a site would cut them, at the files' own rates."""
    file = SiteFile.model_validate({
        "site": "north", "folder": ".", "reader": {"name": "wesad", "options": options},
        "old": {"modality": "PPG", "channels": ["PPG"], "rate_hz": 64},
        "new": {"modality": "ECG", "channels": ["ECG"], "rate_hz": 700},
        "window": {"seconds": 60, "step_seconds": 5},
        "labels": {"source": "recording", "classes": classes, "unlabelled": "reject"}, **section,
    })  # fmt: skip
    formats: dict[Role, InputFormat] = {
        "old": InputFormat(
            window=WindowSpec(modality="PPG", channels=("PPG",), rate_hz=64, samples=3840), preprocessing=PLAIN
        ),
        "new": InputFormat(
            window=WindowSpec(modality="ECG", channels=("ECG",), rate_hz=700, samples=42000), preprocessing=PLAIN
        ),
    }
    return cut(WesadReader(options).read(path), file, formats, LabelSource("recording", {}))


def example(tmp_path: Path) -> Path:
    """Ten seconds of nothing, 70 s baseline, 7 s of nothing, 75 s stress, 63 s amusement: 225 s."""
    labels = by_seconds((0, 10), (1, 70), (0, 7), (2, 75), (3, 63))
    return write_wesad(tmp_path, wesad_content("S2", labels, 225))


def test_windows_and_labels_by_hand(tmp_path: Path) -> None:
    found = windows(example(tmp_path), {}, THREE)
    # Baseline lasts from 10 to 80, stress from 87 to 162, amusement from 162 to 225; starts are multiples of 5.
    assert dict(zip(found.starts.tolist(), found.labels.tolist(), strict=True)) == {
        10: 0, 15: 0, 20: 0, 90: 1, 95: 1, 100: 1, 165: 2
    }  # fmt: skip
    assert found.rejected == {"mixed label": 34 - 7}
    content = wesad_content("S2", by_seconds((0, 225)), 225)["signal"]
    ecg, bvp = content["chest"]["ECG"][:, 0], content["wrist"]["BVP"][:, 0]
    assert np.array_equal(found.signals["new"][3, 0], ecg[90 * 700 : 150 * 700].astype(np.float32))
    assert np.array_equal(found.signals["old"][3, 0], bvp[90 * 64 : 150 * 64].astype(np.float32))


def test_two_classes_are_stress_or_not(tmp_path: Path) -> None:
    found = windows(example(tmp_path), {"classes": 2}, ["no stress", "stress"])
    assert dict(zip(found.starts.tolist(), found.labels.tolist(), strict=True)) == {
        10: 0, 15: 0, 20: 0, 90: 1, 95: 1, 100: 1, 165: 0
    }  # fmt: skip


def test_labels_to_ignore_are_told_apart_from_changes(tmp_path: Path) -> None:
    labels = by_seconds((4, 65), (7, 65))
    found = windows(write_wesad(tmp_path, wesad_content("S2", labels, 130)), {}, THREE)
    assert found.rejected == {"other label": 4, "mixed label": 11}  # 0, 5 and 65, 70
    track = WesadReader({}).read(tmp_path / "S2" / "S2.pkl").labels
    assert track is not None
    assert track.values == ("meditation", "label 7")


def test_the_published_labels_ring_at_changes(tmp_path: Path) -> None:
    labels = by_seconds((1, 40), (3, 40))
    path = write_wesad(tmp_path, wesad_content("S2", labels, 80))
    sound, published = WesadReader({}).read(path).labels, WesadReader({"labels": "fourier"}).read(path).labels
    assert sound is not None
    assert published is not None
    assert (sound.values, sound.starts.tolist(), sound.ends.tolist()) == (
        ("baseline", "amusement"), [0, 40], [40, 80]
    )  # fmt: skip
    # By the definition, without scipy: 56,000 labels to 8,000 (700 to 100 Hz), rounded.
    spectrum = np.fft.rfft(labels.astype(float))[:4001]
    wanted = np.round(np.fft.irfft(spectrum, 8000) * 8000 / 56000)
    got = np.zeros(8000)
    numbers = {"transient": 0, "baseline": 1, "stress": 2, "amusement": 3, "meditation": 4}
    for start, end, value in zip(published.starts, published.ends, published.values, strict=True):
        got[round(start * 100) : round(end * 100)] = numbers[value]
    assert np.mean(got == wanted) > 0.999
    assert "stress" in published.values  # nobody was ever stressed


def test_fourier_labels_of_a_constant_are_that_constant() -> None:
    assert fourier_labels(np.full(700, 2.0), 100).tolist() == [2.0] * 100
    zeros = fourier_labels(np.zeros(700), 100)
    assert not np.signbit(zeros).any()


def test_the_published_labels_are_stretched_over_the_ecg(tmp_path: Path) -> None:
    content = wesad_content("S2", by_seconds((1, 30), (1, 30)), 80)  # 60 s of labels for 80 s of signal
    path = write_wesad(tmp_path, content)
    sound, published = WesadReader({}).read(path).labels, WesadReader({"labels": "fourier"}).read(path).labels
    assert sound is not None
    assert published is not None
    assert sound.ends.tolist() == [60]
    assert published.ends.tolist() == [80]


def test_signals_of_different_length_are_cut_by_time(tmp_path: Path) -> None:
    content = wesad_content("S2", by_seconds((1, 130)), 130)
    content["signal"]["wrist"]["BVP"] = content["signal"]["wrist"]["BVP"][: 129 * 64 + 32]
    found = windows(write_wesad(tmp_path, content), {}, THREE)
    assert found.starts.tolist() == [5.0 * i for i in range(14)]
    assert found.rejected == {"PPG missing": 1}  # the one from 70 to 130
    content["signal"]["wrist"]["BVP"] = content["signal"]["wrist"]["BVP"][: 65 * 64]
    with pytest.raises(RecordingError, match="do not cover the same time: 0 to 65 s and 0 to 130 s"):
        windows(write_wesad(tmp_path, content), {}, THREE)


def test_gaps_are_left_out(tmp_path: Path) -> None:
    content = wesad_content("S2", by_seconds((1, 130)), 130)
    content["signal"]["chest"]["ECG"][700 * 61] = np.nan
    content["signal"]["wrist"]["BVP"][64 * 63] = np.inf
    found = windows(write_wesad(tmp_path, content), {}, THREE)
    assert found.starts.tolist() == [0, 65, 70]
    assert set(found.rejected) == {"PPG nan"}


def test_the_reader_keeps_the_contract(tmp_path: Path) -> None:
    for subject in ("S2", "S10", "S17"):
        write_wesad(tmp_path, wesad_content(subject, by_seconds((1, 3)), 3))
    (tmp_path / "S2" / "S2_quest.csv").write_text("")
    (tmp_path / "S2" / "Sx.pkl").write_text("")
    assert find_reader("wesad") is WesadReader
    assert [each.patient for each in check_reader(WesadReader({}), tmp_path)] == ["S10", "S17", "S2"]


def test_missing_parts_are_told(tmp_path: Path) -> None:
    content = wesad_content("S2", by_seconds((1, 3)), 3)
    del content["label"], content["signal"]["wrist"]["BVP"]
    found = WesadReader({}).read(write_wesad(tmp_path, content))
    assert found.labels is None
    assert found.absent == {"PPG": "no signal.wrist.BVP"}
    assert found.signals["ECG"].data.shape == (1, 2100)
    with pytest.raises(RecordingError, match="S2: has no PPG"):
        windows(tmp_path / "S2" / "S2.pkl", {}, THREE)
    del content["signal"]["chest"]
    found = WesadReader({}).read(write_wesad(tmp_path, content))
    assert not found.signals
    assert found.absent["ECG"] == "no signal.chest.ECG"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.pop("signal"), "it has no mapping 'signal'"),
        (lambda c: c.update(signal=[1]), "it has no mapping 'signal'"),
        (lambda c: c.update(subject="S3"), "it calls its subject 'S3'"),
        (lambda c: c["signal"]["chest"].update(ECG=np.zeros((10, 2))), "signal.chest.ECG has the shape (10, 2)"),
        (lambda c: c["signal"]["chest"].update(ECG=np.array(1.0)), "signal.chest.ECG has the shape ()"),
        (lambda c: c["signal"]["chest"].update(ECG=[1, 2]), "signal.chest.ECG is no array of numbers"),
        (lambda c: c["signal"]["wrist"].update(BVP=np.zeros((0, 1))), "signal.wrist.BVP is no array of numbers"),
        (lambda c: c.update(label=np.array(["a", "b"])), "label is no array of numbers"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Any, why: str) -> None:
    content = wesad_content("S2", by_seconds((1, 3)), 3)
    change(content)
    with pytest.raises(RecordingError, match=r"S2\.pkl: is not a subject of WESAD") as caught:
        WesadReader({}).read(write_wesad(tmp_path, content, "S2"))
    assert why in caught.value.why


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_subject_has_no_effect(tmp_path: Path) -> None:
    content = wesad_content("S2", by_seconds((1, 3)), 3)
    content["signal"]["chest"]["ECG"] = Hostile(tmp_path / "marker")
    path = write_wesad(tmp_path, content)
    with pytest.raises(UnsafePickleError, match=r"asks for posix\.mkdir"):
        WesadReader({}).read(path)
    assert not (tmp_path / "marker").exists()


def test_a_truncated_subject_is_refused(tmp_path: Path) -> None:
    path = write_wesad(tmp_path, wesad_content("S2", by_seconds((1, 3)), 3))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RecordingError, match=r"S2\.pkl: can't be read as a pickle"):
        WesadReader({}).read(path)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels"):
        WesadReader({"labels": "linear"})
