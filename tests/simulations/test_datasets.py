"""The two real sets as sources: labels against beats that are known, and the whole set's counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.readers.npz import NpzReader
from simulations.datasets.cinc2015 import (
    HEART_RATE_CLASSES,
    Cinc2015Config,
    cinc2015_source,
    label_heart_rate,
    rate_class,
)
from simulations.datasets.eegmat import EegmatConfig, eegmat_source
from simulations.errors import CohortError

CONFIG = Cinc2015Config(folder=Path("unused"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ecg_of(beats: NDArray[np.float64], seconds: float, rate: float = 125.0) -> NDArray[np.float64]:
    """A made-up ECG: P, QRS and T waves as bells round each beat, with a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    ecg = 0.02 * np.random.default_rng(0).standard_normal(len(time))
    for shift, height, width in ((-0.16, 0.12, 0.02), (-0.025, -0.1, 0.01), (0, 1.0, 0.012), (0.2, 0.25, 0.04)):
        for beat in beats:
            ecg += height * np.exp(-0.5 * ((time - beat - shift) / width) ** 2)
    return ecg


def steady(rate: float, start: float, end: float) -> NDArray[np.float64]:
    return np.arange(start + 0.3, end, 60 / rate)


def test_rate_class_has_the_bounds_of_the_task() -> None:
    assert [rate_class(bpm) for bpm in (40, 74.9, 75, 100, 100.1, 180)] == [0, 0, 1, 1, 2, 2]
    assert HEART_RATE_CLASSES == ("under 75", "75 to 100", "over 100")


def test_windows_are_labelled_by_their_own_beats() -> None:
    beats = np.concatenate([steady(60, 0, 20), steady(85, 20, 40), steady(130, 40, 70)])
    found = label_heart_rate(ecg_of(beats, 70), np.ones(70 * 125, bool), 125.0, CONFIG)
    labels = dict(zip(found.starts, found.labels, strict=True))
    # A detector may miss a beat at the very ends of a recording: those windows may stay without a label.
    assert {start: labels[start] for start in (10.0, 20.0, 30.0, 40.0, 50.0)} == {10: 0, 20: 1, 30: 1, 40: 2, 50: 2}
    assert set(labels) <= {10.0 * i for i in range(7)}
    assert len(labels) + sum(found.unlabelled.values()) == 7


def test_windows_without_a_sure_rate_get_no_label() -> None:
    rng = np.random.default_rng(2)
    irregular = 20.3 + np.cumsum(rng.choice([0.45, 1.1], 12))
    beats = np.concatenate([steady(70, 0, 20), irregular[irregular < 30], steady(70, 30, 40)])
    ecg = ecg_of(beats, 50)
    present = np.ones(50 * 125, bool)
    present[5 * 125 : 6 * 125] = False
    found = label_heart_rate(ecg, present, 125.0, CONFIG)
    assert found.starts == [10.0, 30.0]
    assert found.labels == [0, 0]
    assert found.unlabelled["absent"] == 1
    assert found.unlabelled["irregular"] == 1
    assert sum(found.unlabelled.values()) == 3  # and the last ten seconds, which hold no beat


def test_a_flat_record_has_no_label() -> None:
    found = label_heart_rate(np.zeros(30 * 125), np.ones(30 * 125, bool), 125.0, CONFIG)
    assert (found.starts, found.labels) == ([], [])
    assert sum(found.unlabelled.values()) == 3


def some(shared: Path, folder: Path, count: int) -> Path:
    """A folder with links to the first recordings of a set."""
    folder.mkdir()
    for path in sorted(shared.glob("*.npz"))[:count]:
        (folder / path.name).symlink_to(path)
    return folder


def test_cinc2015_labels_are_plausible_and_kept(shared_data: Path, tmp_path: Path, own_cache: Path) -> None:
    folder = some(shared_data / "cinc2015", tmp_path / "cinc", 12)
    source = cinc2015_source(Cinc2015Config(folder=folder))
    assert len(source.patients) == 12
    rows = [(patient, row) for patient in source.patients for row in patient.labels]
    assert 100 <= len(rows) <= 360
    reader = NpzReader(source.reader_options)
    apart = []
    for patient, row in rows:
        # A rate of another kind: the strongest period of the window's squared slope, no beats found one by one.
        signal = reader.read(patient.files[0]).signals["ECG"]
        assert row.start_seconds % 10 == 0
        first = round(row.start_seconds * 125)
        window = signal.data[0, first : first + 1250]
        assert np.isfinite(window).all()
        energy = np.convolve(np.diff(window) ** 2, np.ones(13), "same")
        energy = np.clip(energy, 0, 4 * energy.mean())
        energy -= energy.mean()
        correlation = np.correlate(energy, energy, "full")[len(energy) - 1 :]
        lags = np.arange(35, 190)
        rate = 60 * 125 / lags[correlation[lags].argmax()]
        low, high = {"under 75": (0, 75), "75 to 100": (75, 100), "over 100": (100, 999)}[row.label]
        apart.append(max(low - rate, rate - high, 0) / rate)
    assert np.mean(np.array(apart) < 0.05) > 0.9
    kept = list((own_cache / "labels").glob("cinc2015-*.json"))
    assert len(kept) == 1
    assert cinc2015_source(Cinc2015Config(folder=folder)).patients == source.patients
    kept[0].write_text("[")
    assert cinc2015_source(Cinc2015Config(folder=folder)).patients == source.patients
    stricter = cinc2015_source(Cinc2015Config(folder=folder, rr_variation=0.05))
    assert 0 < sum(len(p.labels) for p in stricter.patients) < len(rows)


def test_cinc2015_alarms_hold_in_the_last_window_and_carry_their_type(shared_data: Path) -> None:
    source = cinc2015_source(Cinc2015Config(folder=shared_data / "cinc2015", task="alarm"))
    rows = [row for patient in source.patients for row in patient.labels]
    assert len(rows) == len(source.patients) == 521
    assert {(row.start_seconds, row.end_seconds) for row in rows} == {(290.0, 300.0)}
    assert len({row.group for row in rows}) == 5
    true_share = Counter(row.label for row in rows)["true alarm"] / 521
    labels = [int(np.load(path)["label"]) for path in sorted((shared_data / "cinc2015").glob("*.npz"))]
    assert true_share == pytest.approx(np.mean(labels))


@pytest.mark.slow
def test_cinc2015_whole_set_has_the_size_that_is_told(shared_data: Path) -> None:
    source = cinc2015_source(Cinc2015Config(folder=shared_data / "cinc2015"))
    assert 8_700 <= sum(len(patient.labels) for patient in source.patients) <= 11_600
    assert 445 <= sum(bool(patient.labels) for patient in source.patients) <= 495


def test_eegmat_labels_follow_the_segments(shared_data: Path) -> None:
    folder = shared_data / "eegmat"
    source = eegmat_source(EegmatConfig(folder=folder))
    assert len(source.patients) == 28
    assert Counter(patient.stratum for patient in source.patients) == {"whole": 24, "loose electrode": 4}
    for patient in source.patients:
        with np.load(patient.files[0]) as archive:
            edges = archive["segment_start"].tolist()
            assert archive["label"].sum() == edges[2] - edges[1]
        rest, task = patient.labels
        assert (rest.label, rest.start_seconds, rest.end_seconds) == ("rest", 0.0, float(edges[1]))
        assert (task.label, task.start_seconds, task.end_seconds) == ("mental arithmetic", edges[1], edges[2])
    assert len(eegmat_source(EegmatConfig(folder=folder, loose_electrode=False)).patients) == 24


def test_eegmat_reader_options_read_the_files(shared_data: Path) -> None:
    source = eegmat_source(EegmatConfig(folder=shared_data / "eegmat"))
    patient = next(p for p in source.patients if p.patient == "subject_02")
    recording = NpzReader(source.reader_options).read(patient.files[0])
    assert recording.signals["EEG"].channels == source.old.channels
    assert recording.signals["EEG"].data.shape == (19, 61000)
    assert recording.segments == ((0.0, 182.0), (182.0, 244.0))
    ecg = recording.signals["ECG"].data[0]
    assert np.isnan(ecg[: 182 * 250]).all()  # the electrode was off at rest
    assert np.isfinite(ecg[182 * 250 :]).all()


def test_wrong_folders_are_refused(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no recordings"):
        eegmat_source(EegmatConfig(folder=tmp_path / "nothing"))
    with pytest.raises(CohortError, match="is not a recording of this set") as caught:
        eegmat_source(EegmatConfig(folder=shared_data / "cinc2015"))
    assert "EEG" in caught.value.why
    cut = tmp_path / "cut"
    cut.mkdir()
    original = next(iter(sorted((shared_data / "eegmat").glob("*.npz"))))
    (cut / original.name).write_bytes(original.read_bytes()[:5000])
    with pytest.raises(CohortError, match=r"can't be read as \.npz"):
        eegmat_source(EegmatConfig(folder=cut))
