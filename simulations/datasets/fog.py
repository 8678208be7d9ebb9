"""The multimodal freezing-of-gait set (Zhang et al. 2022, Mendeley Data r8gmbtv7w2): EEG and EMG of 12 patients.

Windows overlap (3 s every 0.3 s), so whole patients are divided. `windows: shuffled_008` is the published experiment:
windows of patient 008 alone, shuffled. Neighbours that share nine tenths of their samples then lie in training and in
test, and figures are far better than on a patient who was not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bridge.config import Settings
from bridge.files import whole_folder
from bridge.hashing import sha256_file, sha256_json
from client.labels import label_windows
from client.readers.base import Recording
from client.readers.fog import CLASSES, EMG_CHANNELS, RATE_HZ, FogReader
from client.site_file import LabelsSection
from simulations.datasets.files import found_files
from simulations.errors import CohortError
from simulations.source import PatientData, SignalSource, Source, cache_root

_PUBLISHED_PATIENT = "008"
_MADE_UP_PATIENTS = 99
"""Of the shuffled windows, so that shares of 33, 11, 33 and 22 come out even."""
_RECIPE = 1
"""Part of the cache key: raised when shuffling changes what it makes."""


class FogConfig(Settings):
    """Keys of the source `fog`."""

    folder: Path
    """Folder that holds the patients' folders `001` and so on, or `FilteredData`."""
    old: Literal["EEG", "EMG"] = "EEG"
    """The modality with the labelled model; the other one is to replace it."""
    windows: Literal["by_patient", "shuffled_008"] = "by_patient"
    """`by_patient`: all patients, each in one split. `shuffled_008`: as published, overlapping windows of patient 008
    shuffled over 99 made-up patients; what it gives is no estimate for a new patient."""
    shuffle_seed: int = Field(default=6, ge=0)
    """Of `shuffled_008`."""
    labels: Literal["nearest", "fourier"] = "nearest"
    """`fourier`: labels are resampled by their spectrum and rounded, as published; that makes false ones at changes."""
    labels_hz: float = Field(default=200.0, gt=0)
    """`fourier`: rate of the rounded labels."""
    agreement: float = Field(default=0.8, gt=0.5, le=1)
    """Share of a window that one label must cover."""
    window_seconds: float = Field(default=3.0, gt=0)
    step_seconds: float = Field(default=0.3, gt=0)


def fog_source(config: FogConfig) -> Source:
    """The set as a source: one patient a folder, a recording a task.

    Shuffled windows are written into the cache folder, once. Raises `CohortError` where the folder holds no patient, or
    no patient 008 whose windows could be shuffled; `RecordingError` where one of their files can't be read.
    """
    options = config.model_dump(mode="json", include={"labels", "labels_hz"})
    reader = FogReader(options)
    files = found_files(config.folder, reader, "<NNN>/*.txt and <NNN>/OFF_<k>/*.txt")
    by_patient: dict[str, list[Path]] = {}
    for path in files:
        by_patient.setdefault(reader.name(path)[:3], []).append(path)
    eeg = tuple(reader.options.eeg)
    shuffled = config.windows == "shuffled_008"
    if shuffled:
        patients = _shuffled(by_patient.get(_PUBLISHED_PATIENT, []), reader, config)
        what = f"windows of patient 008 shuffled over {len(patients)} made-up patients (optimistic: they overlap)"
    else:
        patients = [_patient(name, own) for name, own in by_patient.items()]
        what = f"{len(patients)} patients, {len(files)} tasks"
    signals = {"EEG": SignalSource("EEG", eeg, RATE_HZ), "EMG": SignalSource("EMG", EMG_CHANNELS, RATE_HZ)}
    return Source(
        patients=tuple(patients),
        old=signals[config.old],
        new=signals["EMG" if config.old == "EEG" else "EEG"],
        reader="npz" if shuffled else "fog",
        reader_options=_npz_options(eeg, config) if shuffled else options,
        classes=CLASSES,
        window_seconds=config.window_seconds,
        step_seconds=config.window_seconds if shuffled else config.step_seconds,
        labels="recording",
        coverage=config.agreement,
        description=(
            f"Multimodal freezing-of-gait set, {what}, windows of {config.window_seconds:g} s every "
            f"{config.step_seconds:g} s, labels {config.labels}, {config.agreement:g} of a window must agree"
        ),
        license="CC BY 4.0",
    )


def _patient(name: str, files: list[Path]) -> PatientData:
    """A patient's tasks; in a site's folder they keep the patient's folder and those of sessions."""
    roots = {next(parent for parent in path.parents if parent.name == name).parent for path in files}
    if len(roots) > 1:
        raise CohortError(
            f"patient {name} is in {len(roots)} folders",
            why=", ".join(sorted(map(str, roots))),
            fix="set source.folder to one copy of the set",
        )
    return PatientData(patient=name, files=tuple(files), root=roots.pop())


def _shuffled(files: list[Path], reader: FogReader, config: FogConfig) -> list[PatientData]:
    """Made-up patients with the labelled windows of some files, dealt at random; their files are kept in the cache."""
    if not files:
        raise CohortError(
            f"{config.folder}: no patient {_PUBLISHED_PATIENT}",
            why="windows: shuffled_008 is made of that patient's windows",
            fix="add the patient's folder, or set windows: by_patient",
        )
    rules = config.model_dump(mode="json", exclude={"folder", "old", "windows"})
    key = sha256_json([_RECIPE, rules, [[reader.name(path), sha256_file(path)] for path in files]])[:32]
    place = cache_root() / "fog" / key
    if not place.is_dir():
        with whole_folder(place) as partial:
            _write_parts(files, reader, config, partial)
    return [PatientData(patient=path.stem, files=(path,)) for path in sorted(place.glob("*.npz"))]


def _write_parts(files: list[Path], reader: FogReader, config: FogConfig, folder: Path) -> None:
    """One `.npz` a made-up patient: its windows end to end, each a segment of its own."""
    found = [each for path in files for each in _labelled_windows(reader.read(path), config)]
    if not found:
        raise CohortError(
            f"{config.folder}: patient {_PUBLISHED_PATIENT} has no window with a label",
            why=f"{config.agreement:g} of a window must agree",
            fix="lower agreement, or set windows: by_patient",
        )
    order = np.random.default_rng(config.shuffle_seed).permutation(len(found))
    for number in range(min(_MADE_UP_PATIENTS, len(found))):
        own = [found[row] for row in order[number::_MADE_UP_PATIENTS]]
        name = f"{_PUBLISHED_PATIENT}-part-{number + 1:02d}"
        np.savez(
            folder / f"{name}.npz",
            subject=name,
            EEG=np.concatenate([eeg for eeg, _, _ in own], axis=1),
            EMG=np.concatenate([emg for _, emg, _ in own], axis=1),
            label=np.array([label for _, _, label in own], dtype=np.int64),
            label_names=np.array(CLASSES),
            segment_start=np.arange(len(own)) * config.window_seconds,
        )


def _labelled_windows(
    recording: Recording, config: FogConfig
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], int]]:
    """EEG, EMG and label of each window of a task that has one."""
    eeg, emg = recording.signals["EEG"].data, recording.signals["EMG"].data
    samples = round(config.window_seconds * RATE_HZ)
    count = int((eeg.shape[1] - samples) / RATE_HZ / config.step_seconds + 1e-6) + 1 if eeg.shape[1] >= samples else 0
    starts = config.step_seconds * np.arange(count, dtype=np.float64)
    section = LabelsSection(source="recording", classes=CLASSES, coverage=config.agreement)
    labels = label_windows(recording.labels, starts, config.window_seconds, section, "").labels
    for start, label in zip(starts, labels, strict=True):
        first = round(start * RATE_HZ)
        if label >= 0:
            yield eeg[:, first : first + samples], emg[:, first : first + samples], int(label)


def _npz_options(eeg: tuple[str, ...], config: FogConfig) -> dict[str, Any]:
    return {
        "subject": "subject",
        "segments": "segment_start",
        "signals": {
            "EEG": {"array": "EEG", "rate": RATE_HZ, "channels": list(eeg)},
            "EMG": {"array": "EMG", "rate": RATE_HZ, "channels": list(EMG_CHANNELS)},
        },
        "label": {"array": "label", "rate": 1 / config.window_seconds, "names": "label_names"},
    }
