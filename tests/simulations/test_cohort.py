"""The built-in cohort: what its files hold, that its bodies do what their states say, and that making it is safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import find_peaks

from bridge.config import parse_model
from bridge.errors import ConfigError
from client.readers.npz import NpzReader
from simulations.cohort import CohortConfig, built_in_cohort, cohort_key
from simulations.cohort.devices import draw_device, store_ecg, store_ppg
from simulations.cohort.physiology import Segment, beat, draw_segments, draw_traits
from simulations.cohort.waves import ecg, ppg
from simulations.errors import CohortError
from simulations.source import Source

SMALL = CohortConfig(public_old_patients=2, public_new_patients=2, hospital_patients=4, seconds=60)
CALM = CohortConfig(patient_variability=0.0, state_separation=1.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "cache"))


def contents(source: Source) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for patient in source.patients for file in patient.files}


# What the files hold


def test_each_role_lends_what_it_should() -> None:
    source = built_in_cohort(SMALL)
    reader = NpzReader(source.reader_options)
    lends = {"public_old": {"ECG"}, "public_new": {"PPG"}, "hospital": {"ECG", "PPG"}}
    assert [patient.role for patient in source.patients] == ["public_old"] * 2 + ["public_new"] * 2 + ["hospital"] * 4
    for patient in source.patients:
        recording = reader.read(patient.files[0])
        assert set(recording.signals) == lends[patient.role]
        assert recording.patient == patient.patient
        assert recording.segments == ((0.0, 60.0),)
        assert bool(patient.labels) == (patient.role != "public_new")
        assert {label.recording for label in patient.labels} <= {recording.name}
        for modality, rate in (("ECG", 125.0), ("PPG", 64.0)):
            if modality in recording.signals:
                found = recording.signals[modality]
                assert (found.rate_hz, found.channels, found.data.shape) == (rate, (modality,), (1, int(60 * rate)))


def test_labels_cover_the_recording_in_stretches_of_the_dwell_time() -> None:
    source = built_in_cohort(SMALL.model_copy(update={"seconds": 130.0}))
    labels = source.patients[-1].labels
    assert [(row.start_seconds, row.end_seconds) for row in labels] == [(0, 30), (30, 60), (60, 90), (90, 130)]
    assert {row.label for row in labels} == {"rest", "stress", "arrhythmia"} == set(source.classes)


def test_devices_go_round_and_public_ones_are_others() -> None:
    source = built_in_cohort(SMALL)
    assert [p.device for p in source.patients] == [
        "public-0", "public-1", "public-0", "public-1", "device-0", "device-1", "device-2", "device-3"
    ]  # fmt: skip


def test_two_classes() -> None:
    source = built_in_cohort(SMALL.model_copy(update={"classes": 2}))
    assert source.classes == ("rest", "stress")
    assert {row.label for patient in source.patients for row in patient.labels} == {"rest", "stress"}


def test_the_same_configuration_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = contents(built_in_cohort(SMALL))
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "other"))
    assert contents(built_in_cohort(SMALL)) == first
    other = contents(built_in_cohort(SMALL.model_copy(update={"seed": 1})))
    assert all(other[name] != content for name, content in first.items())


def test_a_patient_does_not_depend_on_how_many_others_there_are() -> None:
    few = contents(built_in_cohort(SMALL))
    many = contents(built_in_cohort(SMALL.model_copy(update={"hospital_patients": 8, "public_old_patients": 5})))
    assert {name: many[name] for name in few} == few


def test_the_cohort_is_made_once() -> None:
    told: list[tuple[int, int]] = []
    first = built_in_cohort(SMALL, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 8) for i in range(1, 9)]
    assert built_in_cohort(SMALL, progress=lambda done, total: told.append((done, total))) == first
    assert len(told) == 8


# Bodies: measured by peak finding, not by the generator's own numbers


def course(
    state: int, config: CohortConfig, seed: int, seconds: float = 120
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean ECG and PPG of one body held in one state, and its true beat times."""
    config = config.model_copy(update={"seconds": seconds})
    traits = draw_traits(config, np.random.default_rng(seed))
    heart = beat(config, traits, [Segment(0, seconds, state)], np.random.default_rng(seed + 1))
    clean = ecg(heart, traits, 250, seconds, np.random.default_rng(seed + 2))
    return clean, ppg(heart, traits, 250, seconds), heart.times[(heart.times > 1) & (heart.times < seconds - 1)]


def peaks(signal_: np.ndarray, prominence: float) -> np.ndarray:
    found, _ = find_peaks(signal_, prominence=prominence, distance=int(0.25 * 250))
    at = found / 250
    return at[(at > 1) & (at < len(signal_) / 250 - 1)]


def test_r_peaks_and_pulses_lie_where_the_heart_beats() -> None:
    clean, pulses, beats = course(0, CALM, 5)
    assert np.abs(peaks(clean, 0.6) - beats).max() < 1 / 250
    followed = peaks(pulses, 0.6)
    after = followed[np.searchsorted(followed, beats[:-1])] - beats[:-1]
    # Transit 0.2 s and rise 0.115 s of the average body.
    assert after.mean() == pytest.approx(0.315, abs=0.02)


def test_states_change_rate_regularity_and_shape() -> None:
    measured = []
    for state in range(3):
        rows = []
        for seed in range(12):
            clean, pulses, beats = course(state, CALM, 100 * seed)
            intervals = np.diff(peaks(clean, 0.6))
            at = (beats * 250).astype(int)
            t_wave = np.median([clean[i + 40 : i + 100].max() for i in at])
            st = np.median([clean[i + 25 : i + 32].mean() for i in at])
            height = np.percentile(pulses, 95) - np.percentile(pulses, 5)
            rows.append([60 / intervals.mean(), np.diff(intervals).std(), t_wave, st, height])
        measured.append(np.mean(rows, axis=0))
    rest, stress, arrhythmia = measured
    assert rest[0] == pytest.approx(72, abs=3)
    assert stress[0] > rest[0] + 8
    assert arrhythmia[1] > 2.5 * max(rest[1], stress[1])
    assert stress[2] < rest[2] - 0.05
    assert stress[3] < rest[3] - 0.03
    assert stress[4] < 0.9 * rest[4]


def test_without_separation_the_states_are_the_same_signal() -> None:
    same = CohortConfig(state_separation=0.0)
    first, other = course(0, same, 7), course(2, same, 7)
    assert np.array_equal(first[0], other[0])
    assert np.array_equal(first[1], other[1])
    assert not np.array_equal(course(0, CALM, 7)[0], course(2, CALM, 7)[0])


def test_both_signals_follow_the_same_hidden_course() -> None:
    """The state changes half way: the pulse rate turns with the heart rate, and neither knows of the other's noise."""
    config = CALM.model_copy(update={"seconds": 240.0})
    traits = draw_traits(config, np.random.default_rng(1))
    heart = beat(config, traits, [Segment(0, 120, 0), Segment(120, 240, 1)], np.random.default_rng(2))
    hearts = peaks(ecg(heart, traits, 250, 240, np.random.default_rng(3)), 0.6)
    pulse = peaks(ppg(heart, traits, 250, 240), 0.4)
    for found in (hearts, pulse):
        before, after = (found < 118).sum(), ((found > 122) & (found < 240)).sum()
        assert after > 1.08 * before


def test_segments_have_the_patients_mix_and_every_state() -> None:
    config = CohortConfig(seconds=3600.0)
    mix = np.array([0.6, 0.3, 0.1])
    states = np.concatenate(
        [[s.state for s in draw_segments(config, mix, np.random.default_rng(seed))] for seed in range(20)]
    )
    assert np.bincount(states) / len(states) == pytest.approx(mix, abs=0.03)
    short = draw_segments(CohortConfig(seconds=90.0), np.array([1.0, 0, 0]), np.random.default_rng(0))
    assert sorted(s.state for s in short) == [0, 1, 2]


# Monitors


def test_without_noise_and_device_differences_a_monitor_only_filters_and_rounds() -> None:
    config = CohortConfig(noise=0, artefacts_per_minute=0, losses_per_hour=0, device_variability=0, seconds=60)
    device = draw_device(config, np.random.default_rng(0))
    assert draw_device(config, np.random.default_rng(1)).ecg_band == device.ecg_band
    at = np.arange(60 * 125) / 125
    stored = store_ecg(np.sin(2 * np.pi * 5 * at), device, config, np.random.default_rng(2))
    values = stored.samples[0] * stored.scale
    assert stored.samples.dtype == np.int16
    assert stored.ok.tolist() == [1] * 60
    # 5 Hz lies well inside the band: only the second-order filter's small loss, the straight lines and the rounding.
    assert np.abs(values[1250:]).max() == pytest.approx(1.0, abs=0.03)
    spectrum = np.abs(np.fft.rfft(values[1250:]))
    assert spectrum.argmax() * 125 / len(values[1250:]) == pytest.approx(5, abs=0.1)


def test_lost_contact_is_marked_missing_or_flat_as_often_as_asked() -> None:
    config = CohortConfig(losses_per_hour=60, artefacts_per_minute=0, seconds=1200)
    device = draw_device(config, np.random.default_rng(0))
    missing, flat = [], []
    for seed in range(10):
        stored = store_ppg(np.zeros(1200 * 64), device, config, np.random.default_rng(seed))
        still = np.abs(stored.samples[0]) == np.abs(stored.samples[0]).max()
        missing.append(1 - stored.ok.mean())
        flat.append(still.mean())
    # One a minute of 9 s on average is 15 %, half of it marked; marks round outwards to whole seconds.
    assert np.mean(missing) == pytest.approx(0.08, abs=0.02)
    assert np.mean(flat) == pytest.approx(0.07, abs=0.02)


def test_movement_disturbs_the_ppg_as_often_as_asked() -> None:
    quiet = CohortConfig(noise=0, artefacts_per_minute=0, losses_per_hour=0, device_variability=0, seconds=600)
    moved = quiet.model_copy(update={"artefacts_per_minute": 2.0})
    device = draw_device(quiet, np.random.default_rng(0))
    clean = np.sin(2 * np.pi * 1.2 * np.arange(600 * 64) / 64)
    shares = []
    for seed in range(10):
        first, second = (store_ppg(clean, device, c, np.random.default_rng(seed)) for c in (quiet, moved))
        shares.append(np.mean(np.abs(first.samples[0] * first.scale - second.samples[0] * second.scale) > 0.1))
    # Two a minute of 5.5 s are 18 % of the time; they swell and die away, so that less than that is above 0.1.
    assert 0.07 < np.mean(shares) < 0.18


# Making it


def test_a_killed_making_leaves_nothing_that_is_taken_for_a_cohort(tmp_path: Path) -> None:
    large = SMALL.model_copy(update={"hospital_patients": 200})
    script = (
        "from simulations.cohort import *\n"
        f"built_in_cohort(CohortConfig(**{large.model_dump()!r}), progress=lambda done, total: print(done, flush=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(5)][-1] == "5\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cohorts = tmp_path / "cache" / "cohorts"
    left = list(cohorts.iterdir())
    assert [folder.name.startswith(".making-") for folder in left] == [True]
    # Young leftovers may be another process's work; old ones are swept.
    os.utime(left[0], (time.time() - 7200,) * 2)
    built_in_cohort(SMALL)
    assert [folder.name for folder in cohorts.iterdir()] == [cohort_key(SMALL)]


def test_two_at_once_give_one_cohort(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: built_in_cohort(SMALL), range(4)))
    assert all(source == sources[0] for source in sources)
    assert [folder.name for folder in (tmp_path / "cache" / "cohorts").iterdir()] == [cohort_key(SMALL)]


def test_a_lost_file_and_an_unwritable_cache_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = built_in_cohort(SMALL)
    source.patients[3].files[0].unlink()
    with pytest.raises(CohortError, match="is damaged") as error:
        built_in_cohort(SMALL)
    assert "1 of 8 recordings are gone, public-new-001.npz first" in error.value.why
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CohortError, match="can't be written") as error:
        built_in_cohort(SMALL)
    assert "FEDBRIDGE_CACHE" in error.value.fix


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dwell_seconds": 25}, "multiple of window_seconds"),
        ({"seconds": 20}, "at least dwell_seconds"),
        ({"step_seconds": 11}, "must not exceed window_seconds"),
        ({"classes": 4}, "less than or equal to 3"),
        ({"seperation": 2}, "did you mean 'state_separation'"),
    ],
)
def test_a_wrong_configuration_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_model(values, CohortConfig, "demo.yaml")
