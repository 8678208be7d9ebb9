"""WESAD (Schmidt et al. 2018): 15 subjects in three states, ECG of the chest and PPG of the wrist.

For research and without commercial use (docs/datasets.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from bridge.config import Settings
from client.readers.wesad import CLASSES, ECG_HZ, PPG_HZ, WesadReader
from simulations.datasets.files import found_files
from simulations.source import PatientData, SignalSource, Source


class WesadConfig(Settings):
    """Keys of the source `wesad`."""

    folder: Path
    """Folder that holds `S2/S2.pkl` and so on."""
    old: Literal["PPG", "ECG"] = "PPG"
    """The modality with the labelled model; the other one is to replace it."""
    classes: Literal[2, 3] = 3
    """3: baseline, stress, amusement. 2: no stress (baseline and amusement), stress."""
    labels: Literal["nearest", "fourier"] = "nearest"
    """`fourier`: labels are resampled by their spectrum and rounded, as published; that makes false ones at changes."""
    labels_hz: float = Field(default=100.0, gt=0)
    """`fourier`: rate of the rounded labels."""
    window_seconds: float = Field(default=60.0, gt=0)
    step_seconds: float = Field(default=5.0, gt=0)


def wesad_source(config: WesadConfig) -> Source:
    """The set as a source: one patient a subject. A window has a label where all of it has the same.

    Raises `CohortError` where the folder holds no subject.
    """
    options = config.model_dump(mode="json", include={"classes", "labels", "labels_hz"})
    files = found_files(config.folder, WesadReader(options), "S<N>/S<N>.pkl")
    signals = {"ECG": SignalSource("ECG", ("ECG",), ECG_HZ), "PPG": SignalSource("PPG", ("PPG",), PPG_HZ)}
    return Source(
        patients=tuple(PatientData(patient=path.stem, files=(path,), root=config.folder) for path in files),
        old=signals[config.old],
        new=signals["ECG" if config.old == "PPG" else "PPG"],
        reader="wesad",
        reader_options=options,
        classes=CLASSES[config.classes],
        window_seconds=config.window_seconds,
        step_seconds=config.step_seconds,
        labels="recording",
        description=(
            f"WESAD, {len(files)} subjects, windows of {config.window_seconds:g} s every {config.step_seconds:g} s, "
            f"{config.classes} classes, labels {config.labels}"
        ),
        license="for research, no commercial use",
    )
