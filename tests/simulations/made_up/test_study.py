"""Made-up recordings as their readers see them, and a configuration cut down to what a run of a minute can do."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.signal import find_peaks

from bridge.errors import ConfigError, FedbridgeError
from client.readers.base import Recording
from client.readers.fog import FogReader
from client.readers.isruc import IsrucReader
from client.readers.wesad import WesadReader
from simulations.config import DataConfig, load_simulation
from simulations.errors import UnwritableError
from simulations.made_up.recordings import write_recordings
from simulations.made_up.study import WARNING, make_study
from simulations.prepare import load_source
from simulations.split import split_patients
from tests.conftest import ROOT

READERS = {"isruc": IsrucReader({}), "wesad": WesadReader({}), "fog": FogReader({})}
DIRECTIONS = sorted(path for kind in ("isruc", "wesad", "fog") for path in (ROOT / "configs").glob(f"{kind}_*2*.yaml"))


def data(source: str, folder: Path, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"source": source, source: {"folder": folder, **options}})


def recordings(
    source: str, folder: Path, *, patients: int = 2, windows: int = 2, seed: int = 0, **options: Any
) -> list[Recording]:
    write_recordings(data(source, folder, **options), folder, patients=patients, windows=windows, seed=seed)
    return [READERS[source].read(path) for path in READERS[source].files(folder)]


def seconds_by_label(recording: Recording) -> dict[str, float]:
    assert recording.labels is not None
    found: Counter[str] = Counter()
    for start, end, value in zip(recording.labels.starts, recording.labels.ends, recording.labels.values, strict=True):
        found[value] += end - start
    return dict(found)


@pytest.mark.parametrize(
    ("source", "shapes", "labels"),
    [
        ("isruc", {"EEG": (6, 4 * 6000), "ECG": (1, 4 * 6000)}, {"wake": 60, "sleep": 60}),
        (
            "wesad",
            {"ECG": (1, 360 * 700), "PPG": (1, 360 * 64 + 32)},
            {"baseline": 120, "stress": 120, "amusement": 120},
        ),
        ("fog", {"EEG": (6, 6000), "EMG": (3, 6000)}, {"no freezing": 6, "freezing": 6}),
    ],
)
def test_a_patient_has_as_many_windows_of_each_class(
    tmp_path: Path, source: str, shapes: dict[str, tuple[int, int]], labels: dict[str, float]
) -> None:
    for recording in recordings(source, tmp_path):
        assert {name: signal.data.shape for name, signal in recording.signals.items()} == shapes
        assert all(np.isfinite(signal.data).all() for signal in recording.signals.values())
        assert seconds_by_label(recording) == pytest.approx(labels)


def test_patient_008_of_the_freezing_set_comes_twice(tmp_path: Path) -> None:
    found = {each.name: each for each in recordings("fog", tmp_path, patients=8, windows=1)}
    assert len(found) == 9
    assert {name for name in found if name.startswith("008")} == {"008_OFF_1_task_1", "008_OFF_2_task_1"}
    assert sorted(set(seconds_by_label(found["008_OFF_1_task_1"])) | set(seconds_by_label(found["008_OFF_2_task_1"]))) \
        == ["freezing", "no freezing"]  # fmt: skip


def test_five_stages_are_all_there(tmp_path: Path) -> None:
    reader = IsrucReader({"classes": 5})
    write_recordings(data("isruc", tmp_path, classes=5), tmp_path, patients=1, windows=1, seed=0)
    recording = reader.read(reader.files(tmp_path)[0])
    assert seconds_by_label(recording) == dict.fromkeys(("wake", "N1", "N2", "N3", "REM"), 30)


@pytest.mark.parametrize("source", ["isruc", "wesad", "fog"])
def test_signals_follow_the_seed_and_the_patient(tmp_path: Path, source: str) -> None:
    first, again, other = (
        recordings(source, tmp_path / name, windows=1, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for modality in first[0].signals:
        one, two = (each.signals[modality].data for each in first)
        assert np.array_equal(one, again[0].signals[modality].data)
        assert not np.array_equal(one, other[0].signals[modality].data)
        assert not np.array_equal(one, two)


def power(x: Any, rate: float, low: float, high: float) -> float:
    spectrum = np.abs(np.fft.rfft(x - x.mean())) ** 2
    hertz = np.fft.rfftfreq(len(x), 1 / rate)
    return float(spectrum[(hertz >= low) & (hertz < high)].sum() / spectrum[1:].sum())


def test_the_state_can_be_seen_in_either_modality(tmp_path: Path) -> None:
    """Waking EEG is at 10 Hz, a waking heart is faster; freezing EEG is at 21 Hz, and the muscles tremble at 6 Hz."""
    beats: Counter[str] = Counter()
    for recording in recordings("isruc", tmp_path / "isruc", windows=1, patients=8):
        assert recording.labels is not None
        alpha = {}
        for epoch, state in enumerate(recording.labels.values):
            cut = slice(6000 * epoch, 6000 * (epoch + 1))
            alpha[state] = power(recording.signals["EEG"].data[0, cut], 200, 9, 11)
            ecg = recording.signals["ECG"].data[0, cut]
            beats[state] += len(find_peaks(ecg, height=0.5 * ecg.max(), distance=80)[0])
        assert alpha["wake"] > 3 * alpha["sleep"]
    assert beats["wake"] > 1.1 * beats["sleep"]
    for recording in recordings("fog", tmp_path / "fog", windows=1, patients=4):
        assert recording.labels is not None
        beta, tremor = {}, {}
        for stretch, state in enumerate(recording.labels.values):
            cut = slice(1500 * stretch, 1500 * (stretch + 1))
            beta[state] = power(recording.signals["EEG"].data[0, cut], 500, 19, 23)
            tremor[state] = power(np.abs(recording.signals["EMG"].data[0, cut]), 500, 5, 7)
        assert beta["freezing"] > 3 * beta["no freezing"]
        assert tremor["freezing"] > 3 * tremor["no freezing"]


def no_weights(model: str, path: Path, size: str = "base", **_: Any) -> Path:
    """The files themselves are tested beside; of full size they take seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{model} {size}")
    return path


@pytest.mark.parametrize("config", DIRECTIONS, ids=lambda path: path.stem)
def test_a_direction_is_cut_down(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.made_up.study.write_checkpoint", no_weights)
    monkeypatch.setattr("simulations.made_up.study.write_recordings", lambda *_, **__: None)
    before = load_simulation(config)
    made = make_study(config, tmp_path / "it's here")
    assert made.config.read_text().startswith(f"# {WARNING}\n")
    after = load_simulation(made.config)
    source = before.data.source
    assert getattr(after.data, source).folder == made.folder / "data"
    for side in ("old", "new"):
        published = getattr(after.encoders, side).published
        assert published is not None
        assert published.file.parent == made.folder / "weights"
        assert published.file.read_text() == f"{published.model} {published.size or 'base'}"
        assert published.options == getattr(before.encoders, side).published.options
    assert after.name == f"{before.name}-made-up"
    assert (after.selection.mode, after.selection.input_position) == ("scores", None)
    assert (after.train.rounds, after.train.local_steps, after.controls, after.baselines) == (2, 1, (), ())
    assert after.bridge == before.bridge
    assert after.alignment == before.alignment
    assert after.train.learning_rate == before.train.learning_rate
    assert after.encoders.old.head is not None
    assert before.encoders.old.head is not None
    assert after.encoders.old.head.train == before.encoders.old.head.train
    assert after.encoders.old.head.epochs <= 5
    slow = {"normwear", "ecg-fm"} & {after.encoders.old.published.model, after.encoders.new.published.model}  # type: ignore[union-attr]  # fmt: skip
    assert made.windows == (1 if slow else 2)


def test_there_are_enough_patients_for_every_part(tmp_path: Path) -> None:
    assert len(DIRECTIONS) == 7
    for config in (ROOT / "configs" / "wesad_ecg2ppg.yaml", ROOT / "configs" / "fog_emg2eeg.yaml"):
        settings = load_simulation(config)
        folder = tmp_path / config.stem
        write_recordings(settings.data, folder, patients=12, windows=1, seed=0)
        section = getattr(settings.data, settings.data.source).model_copy(update={"folder": folder})
        placed = settings.data.model_copy(update={settings.data.source: section})
        source = load_source(placed, lambda *_: None)
        assert len(source.patients) == 12
        split = split_patients(source, settings.split)
        assert [len(part) for part in (split.public_old, split.validation, split.pair, split.test)] == [4, 1, 4, 3]
        shutil.rmtree(folder)


def refusal(*arguments: Any, **words: Any) -> FedbridgeError:
    with pytest.raises(FedbridgeError) as caught:
        make_study(*arguments, **words)
    return caught.value


def test_what_can_not_be_made_up_is_refused(tmp_path: Path) -> None:
    fog = ROOT / "configs" / "fog_eeg2emg.yaml"
    out = tmp_path / "out"
    assert "source 'builtin'" in refusal(ROOT / "configs" / "demo.yaml", out).what
    assert "11 patient(s) are too few" in refusal(fog, out, patients=11).what
    many = refusal(fog, out, patients=13)
    assert isinstance(many, ConfigError)
    assert "13 patients" in many.what
    assert "can't be read" in refusal(tmp_path / "nothing.yaml", out).what
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({"name": "a", "data": {"source": "fog"}}))
    assert "needs the section 'fog'" in str(refusal(broken, out))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_nothing_is_overwritten_or_left_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fog = ROOT / "configs" / "fog_eeg2emg.yaml"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "exists already" in refusal(fog, tmp_path / "out").what
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("x")
    assert isinstance(refusal(fog, tmp_path / "file" / "out"), UnwritableError)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simulations.made_up.study.write_recordings", full)
    assert "No space left" in refusal(fog, tmp_path / "other").why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
