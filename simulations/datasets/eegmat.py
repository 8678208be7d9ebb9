"""PhysioNet "EEG During Mental Arithmetic Tasks" 1.0.0: rest against mental arithmetic, EEG and ECG (ODC-By 1.0).

Each subject's file holds a rest recording and then a task recording: two segments that no window crosses. The classes
are not balanced (rest is about three times as long). In some subjects the ECG electrode was off in one of the two
segments (`ECG_ok`): windows there count as missing, so that such a subject has windows of one class alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bridge.config import Settings
from simulations.datasets.files import recordings
from simulations.source import LabelRow, PatientData, SignalSource, Source

RATE_HZ = 250.0
CLASSES = ("rest", "mental arithmetic")
CHANNELS_EEG = (
    *("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T3", "C3", "Cz"),
    *("C4", "T4", "T5", "P3", "Pz", "P4", "T6", "O1", "O2"),
)

READER_OPTIONS: dict[str, Any] = {
    "segments": "segment_start",
    "signals": {
        "EEG": {"array": "EEG", "rate": "fs_EEG", "scale": "scale_EEG", "channels": "channels_EEG"},
        "ECG": {
            "array": "ECG",
            "rate": "fs_ECG",
            "scale": "scale_ECG",
            "channels": "channels_ECG",
            "ok": "ECG_ok",
            "ok_per": "segment",
        },
    },
}


class EegmatConfig(Settings):
    """Keys of the source `eegmat`."""

    folder: Path
    """Folder of the `.npz` recordings."""
    window_seconds: float = Field(default=10.0, ge=2, le=60)
    step_seconds: float = Field(default=2.0, gt=0)
    """From the start of one window to the next; below the window's length they overlap."""
    loose_electrode: bool = True
    """Keep the subjects whose ECG electrode was off in one segment: their other segment is used."""


def eegmat_source(config: EegmatConfig) -> Source:
    """The set as a source: one patient a subject, labels from the per-second track.

    Raises `CohortError` where the folder holds no recording or one of them lacks an array.
    """
    files = recordings(config.folder, ("EEG", "ECG", "label", "label_fs", "segment_start", "ECG_ok"))
    patients, loose = [], []
    for path in files:
        with np.load(path, allow_pickle=False) as archive:
            whole = bool(np.all(archive["ECG_ok"] > 0))
            rows = _rows(path.stem, archive["label"], float(archive["label_fs"]))
        if not whole:
            loose.append(path.stem)
        if whole or config.loose_electrode:
            stratum = "whole" if whole else "loose electrode"
            patients.append(PatientData(patient=path.stem, files=(path,), labels=rows, stratum=stratum))
    return Source(
        patients=tuple(patients),
        old=SignalSource("EEG", CHANNELS_EEG, RATE_HZ),
        new=SignalSource("ECG", ("ECG",), RATE_HZ),
        reader="npz",
        reader_options=READER_OPTIONS,
        classes=CLASSES,
        window_seconds=config.window_seconds,
        step_seconds=config.step_seconds,
        description=(
            f"PhysioNet EEG During Mental Arithmetic Tasks, {len(patients)} subjects, windows of "
            f"{config.window_seconds:g} s every {config.step_seconds:g} s; ECG electrode off in one segment of "
            f"{len(loose)} subjects ({'that segment' if config.loose_electrode else 'those subjects'} left out)"
        ),
        license="ODC-By 1.0",
    )


def _rows(name: str, track: np.ndarray[Any, np.dtype[Any]], rate_hz: float) -> tuple[LabelRow, ...]:
    """Stretches of one label, in seconds."""
    edges = [0, *(np.flatnonzero(np.diff(track)) + 1).tolist(), len(track)]
    return tuple(
        LabelRow(name, begin / rate_hz, end / rate_hz, CLASSES[int(track[begin])])
        for begin, end in itertools.pairwise(edges)
    )
