"""The freezing-of-gait set: columns by patient, labels by agreement, and files that fall short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import ConfigError
from bridge.windows import WindowSpec
from client.errors import RecordingError
from client.labels import LabelSource
from client.readers.base import find_reader
from client.readers.contract import check_reader
from client.readers.fog import FogReader
from client.site import InputFormat, Site
from client.site_file import Role, SiteFile
from client.windowing import Cut, cut
from simulations.made_up.formats import column, fog_rows, write_fog

from .files import PLAIN

EEG, EMG = ("F3", "F4", "C3", "C4", "O1", "O2"), ("EMG1", "EMG2", "EMG3")


def site_file(**changes: Any) -> SiteFile:
    return SiteFile.model_validate({
        "site": "north", "folder": ".", "reader": {"name": "fog"},
        "old": {"modality": "EEG", "channels": EEG, "rate_hz": 500},
        "new": {"modality": "EMG", "channels": EMG, "rate_hz": 500},
        "window": {"seconds": 3, "step_seconds": 0.3},
        "labels": {
            "source": "recording", "classes": ["no freezing", "freezing"], "coverage": 0.8, "unlabelled": "reject"
        },
        **changes,
    })  # fmt: skip


def windows(path: Path, options: dict[str, Any] | None = None) -> Cut:
    """Windows of 3 s every 0.3 s as a site would cut them, at the files' own rate."""
    formats: dict[Role, InputFormat] = {
        "old": InputFormat(
            window=WindowSpec(modality="EEG", channels=EEG, rate_hz=500, samples=1500), preprocessing=PLAIN
        ),
        "new": InputFormat(
            window=WindowSpec(modality="EMG", channels=EMG, rate_hz=500, samples=1500), preprocessing=PLAIN
        ),
    }
    return cut(FogReader(options or {}).read(path), site_file(), formats, LabelSource("recording", {}))


def test_windows_and_labels_by_hand(tmp_path: Path) -> None:
    # Freezing from 3.0 s to 6.0 s of 7 s. A window from s to s + 3 is frozen for s seconds while s <= 3.
    rows = fog_rows([0] * 1500 + [1] * 1500 + [0] * 500)
    found = windows(write_fog(tmp_path / "001" / "task_1.txt", rows))
    labels = dict(zip(np.round(found.starts, 3).tolist(), found.labels.tolist(), strict=True))
    # Up to 0.6 s of 3 s frozen is at most 20 %; from 2.4 s on at least 80 %; at 3.6 s it is 2.4 s again.
    assert labels == {0.0: 0, 0.3: 0, 0.6: 0, 2.4: 1, 2.7: 1, 3.0: 1, 3.3: 1, 3.6: 1}
    assert found.rejected == {"mixed label": 14 - 8}
    assert np.array_equal(found.signals["old"][3, 2], column(rows, 6)[1200:2700])  # C3 from 2.4 s on
    assert np.array_equal(found.signals["new"][3, 2], column(rows, 31)[1200:2700])


@pytest.mark.parametrize(
    ("place", "columns"),
    [
        *((patient, (27, 28, 31)) for patient in ("001", "002", "006", "007", "008/OFF_1")),
        *((patient, (28, 27, 31)) for patient in ("003", "004", "005", "010", "011", "012")),
        ("008/OFF_2", (27, 31, 28)),
        ("009", (28, 27, 30)),
    ],
)
def test_columns_are_those_of_the_patient(tmp_path: Path, place: str, columns: tuple[int, ...]) -> None:
    rows = fog_rows([0] * 10)
    path = write_fog(tmp_path / "FilteredData" / place / "task_1.txt", rows)
    found = FogReader({}).read(path)
    assert found.patient == place[:3]
    assert found.name == f"{place.replace('/', '_')}_task_1"
    assert found.signals["EMG"].channels == EMG
    assert [each.tolist() for each in found.signals["EMG"].data] == [column(rows, c).tolist() for c in columns]
    eeg = dict(zip(found.signals["EEG"].channels, found.signals["EEG"].data, strict=True))
    for name, number in {"F3": 4, "F4": 5, "C3": 6, "C4": 7, "O1": 10, "O2": 11}.items():
        assert np.array_equal(eeg[name], column(rows, number))


def test_the_columns_of_another_patient_can_be_named(tmp_path: Path) -> None:
    rows = fog_rows([0] * 10)
    path = write_fog(tmp_path / "013" / "task_1.txt", rows)
    assert FogReader({}).read(path).absent == {"EMG": "the EMG columns of 013 are not known: set reader.options.emg"}
    found = FogReader({"emg": {"013": [29, 30, 31]}, "eeg": {"Cz": 17}}).read(path)
    assert np.array_equal(found.signals["EMG"].data[1], column(rows, 30))
    assert np.array_equal(found.signals["EEG"].data[0], column(rows, 17))
    path = write_fog(tmp_path / "008" / "OFF_1" / "task_1.txt", rows)
    found = FogReader({"emg": {"008": [29, 30, 31]}}).read(path)
    assert np.array_equal(found.signals["EMG"].data[0], column(rows, 29))
    with pytest.raises(RecordingError, match="can't be read as a file of the FOG set") as caught:
        FogReader({"eeg": {"Cz": 61}}).read(path)
    assert "column 61" in caught.value.why


def test_the_reader_keeps_the_contract_and_a_site_tells_tasks_apart(tmp_path: Path) -> None:
    for place in ("001", "002", "008/OFF_1", "008/OFF_2"):
        write_fog(tmp_path / "FilteredData" / place / "task_1.txt", fog_rows([0] * 10))
    (tmp_path / "FilteredData" / "readme.txt").write_text("about the set")
    assert find_reader("fog") is FogReader
    found = check_reader(FogReader({}), tmp_path)
    assert [each.name for each in found] == ["001_task_1", "002_task_1", "008_OFF_1_task_1", "008_OFF_2_task_1"]
    assert [each.patient for each in found] == ["001", "002", "008", "008"]
    site = Site(tmp_path / "site.yaml", site_file(exclude=["008_*"]))
    assert [path.parent.name for path in site.files()] == ["001", "002"]
    assert len(Site(tmp_path / "site.yaml", site_file()).files()) == 4


def test_the_published_labels_ring_at_changes(tmp_path: Path) -> None:
    path = write_fog(tmp_path / "001" / "task_1.txt", fog_rows([0] * 1500 + [1] * 1500))
    sound, published = FogReader({}).read(path).labels, FogReader({"labels": "fourier"}).read(path).labels
    assert sound is not None
    assert published is not None
    assert (sound.values, sound.starts.tolist(), sound.ends.tolist()) == (("no freezing", "freezing"), [0, 3], [3, 6])
    # 1,200 labels at 200 Hz: the change comes up to one of them away.
    change = published.values.index("freezing", 1)
    assert published.starts[change] == pytest.approx(3.0, abs=0.0051)
    assert published.ends[-1] == 6.0
    assert set(published.values) <= {"no freezing", "freezing"}


def test_missing_values_and_labels(tmp_path: Path) -> None:
    rows = fog_rows([0] * 4000)
    rows[100][4], rows[3000][27], rows[3990][60] = "", "nan", " "
    path = write_fog(tmp_path / "001" / "task_1.txt", rows)
    found = FogReader({}).read(path)
    assert np.flatnonzero(np.isnan(found.signals["EEG"].data[0])).tolist() == [100]
    assert np.flatnonzero(np.isnan(found.signals["EMG"].data[0])).tolist() == [3000]
    assert found.labels is not None
    assert found.labels.ends.tolist() == [7.98, 8.0]
    assert found.labels.starts.tolist() == [0.0, 7.982]
    # The hole at 0.2 s takes the window at 0, the one at 6 s all that begin after 3 s; 17 windows in 8 s.
    kept = windows(path)
    assert kept.starts.tolist() == pytest.approx([0.3 * i for i in range(1, 11)])
    assert kept.rejected == {"EEG nan": 1, "EMG nan": 6}


def test_labels_without_a_name_are_other_labels(tmp_path: Path) -> None:
    path = write_fog(tmp_path / "001" / "task_1.txt", fog_rows([2] * 1500 + [0.5] * 1500))
    labels = FogReader({}).read(path).labels
    assert labels is not None
    assert labels.values == ("label 2", "label 0.5")
    assert windows(path, {}).rejected["other label"] == 6  # starts 0, 0.3, 0.6 and 2.4, 2.7, 3.0


def test_a_task_that_is_shorter_than_a_window_gives_none(tmp_path: Path) -> None:
    found = windows(write_fog(tmp_path / "001" / "task_1.txt", fog_rows([0] * 1499)))
    assert found.rejected == {"short segment": 1}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[:-30], r"line 10 has \d+ column"),
        (lambda text: text.replace("\n", ",1\n"), "line 1 has 62 column"),
        (lambda text: "\n".join(line[line.index(",") + 1 :] for line in text.splitlines()), "line 1 has 60 column"),
        (lambda text: text.replace(",", ";"), "line 1 has 1 column"),
        (lambda text: "a header," * 60 + "\n" + text, "could not convert string"),
        (lambda text: text.replace("\n", "x\n"), "could not convert string"),
        (lambda text: "", "it holds no sample"),
        (lambda text: "\n\n", "it holds no sample"),
        (lambda text: "\x00\xff" * 50, "line 1 has 1 column"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, why: str) -> None:
    path = write_fog(tmp_path / "001" / "task_1.txt", fog_rows([0] * 10))
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordingError, match=r"001/task_1\.txt: can't be read as a file of the FOG set") as caught:
        FogReader({}).read(path)
    assert re.search(why, caught.value.why)


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"001/task_1\.txt"):
        FogReader({}).read(tmp_path / "001" / "task_1.txt")


def test_empty_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = write_fog(tmp_path / "001" / "task_1.txt", fog_rows([0] * 10))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert FogReader({}).read(path).signals["EEG"].data.shape == (6, 10)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="emg"):
        FogReader({"emg": {"001": [1, 2]}})
