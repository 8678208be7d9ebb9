"""ISRUC-Sleep, subgroup 1 (Khalighi et al. 2016): a night a patient, EEG and ECG, sleep stages of 30 s.

Free for research after a request to its authors (docs/datasets.md). Subjects without one of the channels are left out:
in the set that is subject 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bridge.config import Settings
from client.errors import RecordingError
from client.readers.isruc import CLASSES, EPOCH_SECONDS, RATE_HZ, IsrucReader
from simulations.datasets.files import found_files
from simulations.errors import CohortError
from simulations.source import PatientData, SignalSource, Source


class IsrucConfig(Settings):
    """Keys of the source `isruc`."""

    folder: Path
    """Folder that holds `ExtractedChannels` and `RawData`."""
    old: Literal["EEG", "ECG"] = "EEG"
    """The modality with the labelled model; the other one is to replace it."""
    classes: Literal[2, 5] = 2
    """2: wake, sleep. 5: wake, N1, N2, N3, REM."""
    scorer: Literal[1, 2] = 1
    """Which of the two experts' stages."""
    last_stages: Literal["by_epoch", "drop_30"] = "by_epoch"
    """`by_epoch`: every epoch that has a line has its stage. `drop_30`: the last 30 lines are dropped, as published."""


def isruc_source(config: IsrucConfig) -> Source:
    """The set as a source: one patient a subject; windows are the epochs.

    Raises `CohortError` where the folder holds no subject with all channels, or a file can't be read.
    """
    options = config.model_dump(mode="json", include={"classes", "scorer", "last_stages"})
    reader = IsrucReader(options)
    patients, incomplete, unscored = [], [], 0
    for path in found_files(config.folder, reader, "ExtractedChannels/subject<N>.mat"):
        try:
            missing = reader.missing_channels(path)
        except RecordingError as error:
            raise CohortError(f"{path}: can't be read", why=error.why, fix="copy the file again") from error
        if missing:
            incomplete.append(path.stem)
            continue
        files = tuple(reader.parts(path))
        unscored += len(files) == 1
        patients.append(PatientData(patient=path.stem, files=files, root=path.parent.parent))
    if not patients:
        raise CohortError(
            f"{config.folder}: no subject has all channels",
            why=f"{len(incomplete)} subject(s) were looked at, {incomplete[0]} lacks one",
            fix="set source.folder to the folder of subgroup 1",
        )
    signals = {
        "EEG": SignalSource("EEG", tuple(reader.options.signals["EEG"].channels), RATE_HZ),
        "ECG": SignalSource("ECG", tuple(reader.options.signals["ECG"].channels), RATE_HZ),
    }
    return Source(
        patients=tuple(patients),
        old=signals[config.old],
        new=signals["ECG" if config.old == "EEG" else "EEG"],
        reader="isruc",
        reader_options=options,
        classes=CLASSES[config.classes],
        window_seconds=EPOCH_SECONDS,
        step_seconds=EPOCH_SECONDS,
        labels="recording",
        description=(
            f"ISRUC-Sleep subgroup 1, {len(patients)} subjects, epochs of 30 s, {config.classes} classes; "
            f"left out for a missing channel: {', '.join(incomplete) or 'none'}; without stages: {unscored}"
        ),
        license="for research, on request to its authors",
    )
