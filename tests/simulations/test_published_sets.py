"""ISRUC-Sleep, WESAD and the freezing-of-gait set as sources: patients, splits, and folders that keep their places."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.config import parse_model
from bridge.errors import ConfigError
from bridge.windows import Preprocessing
from client.features import features
from client.readers.npz import NpzReader
from client.site import InputFormat, Site, open_site
from client.site_file import SPLITS, Role
from client.site_file import Split as Part
from client.windowing import Windows, windows_of
from simulations.config import SimulationConfig
from simulations.controls import join_sites
from simulations.datasets.fog import FogConfig, fog_source
from simulations.datasets.isruc import IsrucConfig, isruc_source
from simulations.datasets.wesad import WesadConfig, wesad_source
from simulations.errors import CohortError
from simulations.hospital_files import write_sites
from simulations.made_up.formats import by_seconds, fog_rows, wesad_content, write_fog, write_isruc, write_wesad
from simulations.partitions import hospitals
from simulations.prepare import load_source, prepare, site_folders
from simulations.split import Split, SplitConfig, split_patients

PUBLISHED = SplitConfig(public=0.3333, validation=0.1667, test=0.3333)
"""The published shares: a third trains the old model, and the others are 11, 33 and 22 of 66."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sizes(split: Split) -> tuple[int, int, int, int]:
    """Of the public, validation, pair and test patients, who must not overlap."""
    assert split.public_old == split.public_new
    parts = [set(each) for each in (split.public_old, split.validation, split.pair, split.test)]
    assert not any(first & second for first, second in itertools.combinations(parts, 2))
    return len(parts[0]), len(parts[1]), len(parts[2]), len(parts[3])


def test_wesads_15_subjects_are_divided_as_published(tmp_path: Path) -> None:
    for number in (*range(2, 12), *range(13, 18)):
        path = tmp_path / f"S{number}" / f"S{number}.pkl"
        path.parent.mkdir()
        path.touch()
    source = wesad_source(WesadConfig(folder=tmp_path))
    assert len(source.patients) == 15
    for seed in range(5):
        assert sizes(split_patients(source, PUBLISHED.model_copy(update={"seed": seed}))) == (5, 2, 5, 3)
    assert (source.old.modality, source.new.modality) == ("PPG", "ECG")
    assert (source.window_seconds, source.step_seconds, source.labels) == (60, 5, "recording")
    assert source.classes == ("baseline", "stress", "amusement")
    turned = wesad_source(WesadConfig(folder=tmp_path, old="ECG", classes=2, labels="fourier"))
    assert (turned.old.modality, turned.new.modality, turned.old.rate_hz) == ("ECG", "PPG", 700)
    assert turned.classes == ("no stress", "stress")
    assert turned.reader_options == {"classes": 2, "labels": "fourier", "labels_hz": 100.0}


def test_isrucs_99_subjects_are_divided_as_published(tmp_path: Path) -> None:
    whole = write_isruc(tmp_path, 1, [0, 1], epochs=2)
    for number in range(2, 101):
        if number != 8:
            (tmp_path / "ExtractedChannels" / f"subject{number}.mat").symlink_to(whole)
    write_isruc(tmp_path, 8, [0, 1], epochs=2, without=["X2"])
    source = isruc_source(IsrucConfig(folder=tmp_path))
    assert len(source.patients) == 99
    assert "left out for a missing channel: subject8; without stages: 98" in source.description
    assert sizes(split_patients(source, PUBLISHED)) == (33, 11, 33, 22)
    assert source.old.channels == ("F3", "C3", "O1", "F4", "C4", "O2")
    assert (source.new.modality, source.new.channels, source.new.rate_hz) == ("ECG", ("ECG",), 200)
    assert (source.window_seconds, source.step_seconds) == (30, 30)
    five = isruc_source(IsrucConfig(folder=tmp_path, old="ECG", classes=5, scorer=2))
    assert (five.old.modality, five.classes) == ("ECG", ("wake", "N1", "N2", "N3", "REM"))
    assert [path.name for path in source.patients[0].files] == ["subject1.mat", "1_1.txt"]
    assert [path.name for path in five.patients[0].files] == ["subject1.mat"]  # the second expert is not there


def fog_set(folder: Path, patients: int = 12, samples: int = 10, samples_of_008: int = 10) -> Path:
    """Two tasks a patient, frozen for the second half; patient 008 has two sessions of one task each."""
    for number in range(1, patients + 1):
        half = (samples_of_008 if number == 8 else samples) // 2
        for task in (1, 2):
            place = f"008/OFF_{task}/task_1" if number == 8 else f"{number:03d}/task_{task}"
            rows = fog_rows([0] * half + [1] * half, seed=10 * number + task)
            write_fog(folder / "FilteredData" / f"{place}.txt", rows)
    return folder


def test_fogs_patients_are_divided_whole(tmp_path: Path) -> None:
    source = fog_source(FogConfig(folder=fog_set(tmp_path)))
    assert Counter(len(patient.files) for patient in source.patients) == {2: 12}
    assert sizes(split_patients(source, PUBLISHED)) == (4, 1, 4, 3)
    assert (source.window_seconds, source.step_seconds, source.coverage) == (3, 0.3, 0.8)
    assert source.classes == ("no freezing", "freezing")
    assert fog_source(FogConfig(folder=tmp_path, old="EMG")).old.channels == ("EMG1", "EMG2", "EMG3")
    assert "optimistic" not in source.description


def test_the_published_windows_of_one_patient_are_shuffled(tmp_path: Path, own_cache: Path) -> None:
    config = FogConfig(folder=fog_set(tmp_path / "set", patients=8, samples_of_008=6000), windows="shuffled_008")
    source = fog_source(config)
    # A task of 12 s has 31 windows; frozen from 6 s on. A window from s on is frozen for s - 3 seconds: up to 3.6 s at
    # most a fifth of it is, from 5.4 s on at least four fifths. That leaves 13 and 13 with a label.
    reader = NpzReader(source.reader_options)
    recordings = [reader.read(patient.files[0]) for patient in source.patients]
    assert len(recordings) == 52  # each made-up patient has one: there are fewer than 99
    assert all(each.patient == patient.patient for each, patient in zip(recordings, source.patients, strict=True))
    labels = Counter(each.labels.values[0] for each in recordings if each.labels)
    assert labels == {"no freezing": 26, "freezing": 26}
    found = {each.signals["EEG"].data.tobytes() for each in recordings}
    first = fog_source(FogConfig(folder=tmp_path / "set"))
    assert first.reader == "fog"
    rows = fog_rows([0] * 3000 + [1] * 3000, seed=81)
    eeg = np.array([[float(row[c]) for c in (4, 5, 6, 7, 10, 11)] for row in rows], dtype=np.float32).T
    starts = [150 * i for i in range(31) if np.ascontiguousarray(eeg[:, 150 * i : 150 * i + 1500]).tobytes() in found]
    assert starts == [150 * i for i in (*range(13), *range(18, 31))]
    assert "optimistic" in source.description
    assert source.step_seconds == 3.0
    # Made once; another seed deals them anew.
    stamps = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.npz")}
    assert fog_source(config).patients == source.patients
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.npz")} == stamps
    other = fog_source(config.model_copy(update={"shuffle_seed": 1}))
    assert other.patients != source.patients


def test_shuffled_windows_come_out_even_over_the_published_shares(tmp_path: Path) -> None:
    config = FogConfig(folder=fog_set(tmp_path, patients=8, samples_of_008=15000), windows="shuffled_008")
    source = fog_source(config)
    assert len(source.patients) == 99
    assert sizes(split_patients(source, PUBLISHED)) == (33, 11, 33, 22)
    reader = NpzReader(source.reader_options)
    recordings = [reader.read(patient.files[0]) for patient in source.patients]
    segments = Counter(len(each.segments) for each in recordings)
    # Two tasks of 30 s, frozen from 15 s on: 91 windows each, of which those at 12.9 to 14.1 s are mixed.
    assert sum(count * number for count, number in segments.items()) == 2 * (91 - 5)
    assert set(segments) == {1, 2}
    assert {round(end - start, 9) for each in recordings for start, end in each.segments} == {3.0}


ARCHITECTURE = {"width": 8, "blocks": 2, "heads": 2, "tokens": 10}
ENCODERS: dict[str, Any] = {
    "old": {"rate_hz": 50, "architecture": ARCHITECTURE, "pretrain": {"steps": 1}, "supervised": {"steps": 2}},
    "new": {"rate_hz": 50, "architecture": ARCHITECTURE, "pretrain": {"steps": 1}},
}


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def configured(data: dict[str, Any]) -> SimulationConfig:
    content = {
        "name": "published",
        "data": data,
        "encoders": ENCODERS,
        "split": PUBLISHED.model_dump(),
        "partition": {"hospitals": 2},
    }
    return parse_model(content, SimulationConfig, "test")


class Study:
    """The site folders of a configuration, without models, and the one that the controls make of them all."""

    def __init__(self, data: dict[str, Any], folder: Path) -> None:
        config = configured(data)
        self.source = source = load_source(config.data, silent)
        dealt = hospitals(source, split_patients(source, config.split), config.partition, config.seed)
        write_sites(source, dealt, config, folder, copy=False, standalone=False, progress=silent)
        self.sites = [open_site(path) for path in site_folders(folder)]
        join_sites(self.sites, folder / "joined")
        self.everything = open_site(folder / "joined")
        self._formats: dict[Role, InputFormat] = {
            "old": InputFormat(
                window=config.encoders.old.spec(source.old, source.window_seconds), preprocessing=Preprocessing()
            ),
            "new": InputFormat(
                window=config.encoders.new.spec(source.new, source.window_seconds), preprocessing=Preprocessing()
            ),
        }

    def windows(self, site: Site, split: Part | None) -> Windows:
        return windows_of(site, split, formats=self._formats)

    def check_nobody_twice(self) -> None:
        splits = [each.file.splits for each in self.sites]
        seen = Counter(
            patient for each in splits for part in (each.pair, each.validation, each.test) for patient in part
        )
        assert set(seen.values()) == {1}
        assert set(seen) < {patient.patient for patient in self.source.patients}  # the others are public
        own = Counter(str(each) for site in self.sites for each in set(self.windows(site, None).table.patients))
        assert own == seen
        for split in SPLITS:
            together = self.windows(self.everything, split).table
            alone = [self.windows(site, split).table for site in self.sites if getattr(site.file.splits, split)]
            assert sorted(together.recordings) == sorted(name for each in alone for name in each.recordings)
        assert not (self.everything.folder / "labels.csv").exists()


def test_fog_goes_through_site_folders(tmp_path: Path) -> None:
    folder = fog_set(tmp_path / "set", samples=3000, samples_of_008=3000)
    study = Study({"source": "fog", "unlabelled": "reject", "fog": {"folder": str(folder)}}, tmp_path / "study")
    study.check_nobody_twice()
    table = study.windows(study.everything, "pair").table
    # 6 s, frozen from 3 s on: windows at 0 to 0.6 s and from 2.4 to 3 s, of two tasks and four patients.
    assert Counter(table.labels.tolist()) == {0: 8 * 3, 1: 8 * 3}
    assert sorted(set(np.round(table.starts / 0.3).astype(int).tolist())) == [0, 1, 2, 8, 9, 10]


def test_isruc_goes_through_site_folders(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in range(1, 13):
        write_isruc(folder, number, [0, 1, 5, 2] if number > 1 else None)
    study = Study({"source": "isruc", "isruc": {"folder": str(folder)}}, tmp_path / "study")
    study.check_nobody_twice()
    windows = study.windows(study.everything, None)
    scored = windows.table.patients != "subject1"
    assert Counter(windows.table.labels[scored].tolist()) == {0: scored.sum() // 4, 1: 3 * scored.sum() // 4}
    assert windows.old is not None
    assert windows.old.shape[1:] == (6, 1500)


def wesad_set(folder: Path) -> Path:
    for number in range(2, 14):
        labels = by_seconds((1, 65), (0, 1), (2, 64), (3, 60))
        write_wesad(folder, wesad_content(f"S{number}", labels, 190, seed=number))
    return folder


def test_wesad_goes_through_site_folders(tmp_path: Path) -> None:
    data = {"source": "wesad", "unlabelled": "reject", "wesad": {"folder": str(wesad_set(tmp_path / "set"))}}
    study = Study(data, tmp_path / "study")
    study.check_nobody_twice()
    table = study.windows(study.everything, "test").table
    # Baseline to 65 s: starts 0 and 5; stress from 66 to 130: only 70; amusement from 130 to 190: 130.
    assert Counter(table.labels.tolist()) == {0: 2 * 3, 1: 3, 2: 3}
    assert sorted(set(table.starts.tolist())) == [0, 5, 70, 130]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fog", "isruc", "wesad"])
def test_a_study_of_each_set_is_prepared_and_used(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    if name == "fog":
        fog_set(folder, samples=3000, samples_of_008=3000)
    elif name == "wesad":
        wesad_set(folder)
    else:
        for number in range(1, 13):
            write_isruc(folder, number, [0, 1, 5, 2])
    config = configured({"source": name, "unlabelled": "reject", name: {"folder": str(folder)}})
    prepared = prepare(config, tmp_path / "study")
    sites = [open_site(path) for path in site_folders(prepared)]
    classes = {site.head_card.classes for site in sites}
    assert classes == {load_source(config.data, silent).classes}
    for site in sites:
        assert len(windows_of(site, "pair").table) == len(features(site, "pair").table) > 0


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    for make in (
        lambda folder: isruc_source(IsrucConfig(folder=folder)),
        lambda folder: wesad_source(WesadConfig(folder=folder)),
        lambda folder: fog_source(FogConfig(folder=folder)),
    ):
        with pytest.raises(CohortError, match="no recordings") as caught:
            make(tmp_path / "nothing")
        assert "datasets.md" in caught.value.fix
    write_isruc(tmp_path / "isruc", 8, None, epochs=1, without=["C3_A2"])
    with pytest.raises(CohortError, match="no subject has all channels"):
        isruc_source(IsrucConfig(folder=tmp_path / "isruc"))
    path = write_isruc(tmp_path / "isruc", 9, None, epochs=1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CohortError, match=r"subject9\.mat: can't be read") as caught:
        isruc_source(IsrucConfig(folder=tmp_path / "isruc"))
    assert "truncated" in caught.value.why


def test_a_set_that_lies_there_twice_is_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        fog_set(tmp_path / place, patients=2)
    with pytest.raises(CohortError, match="2 recordings are called '001_task_1'"):
        fog_source(FogConfig(folder=tmp_path))
    (tmp_path / "b" / "FilteredData" / "002" / "task_1.txt").rename(tmp_path / "b" / "FilteredData" / "002" / "x.txt")
    for path in (tmp_path / "b").rglob("task_*.txt"):
        path.unlink()
    with pytest.raises(CohortError, match="patient 002 is in 2 folders"):
        fog_source(FogConfig(folder=tmp_path))


def test_shuffling_needs_labelled_windows_of_the_patient(tmp_path: Path, own_cache: Path) -> None:
    config = FogConfig(folder=fog_set(tmp_path / "few", patients=2), windows="shuffled_008")
    with pytest.raises(CohortError, match="no patient 008"):
        fog_source(config)
    config = FogConfig(folder=fog_set(tmp_path / "short", patients=8), windows="shuffled_008")
    with pytest.raises(CohortError, match="patient 008 has no window with a label"):
        fog_source(config)
    assert not list(own_cache.glob("fog/*"))


def test_a_source_needs_its_section() -> None:
    with pytest.raises(ConfigError, match="source 'wesad' needs the section 'wesad'"):
        parse_model({"name": "a", "data": {"source": "wesad"}}, SimulationConfig, "test")
