"""ISRUC-Sleep, subgroup 1 (Khalighi et al. 2016): extracted channels as MATLAB files, sleep stages as texts.

    ExtractedChannels/subjectN.mat     for each channel (epochs, samples), 30 s an epoch, microvolt
    RawData/N/N_1.txt, N_2.txt         the stages of two experts, one integer a line

Line k is the stage of epoch k. The recording went on after the last epoch: lines beyond it have no signal.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bridge.config import Settings, parse_model
from bridge.windows import Modality
from client.errors import RecordingError
from client.readers.base import LabelTrack, Reader, Recording, Signal, runs_of
from client.readers.names import NamedSignal, chosen_labels

EPOCH_SECONDS = 30.0
RATE_HZ = 200.0
"""Of the set's own files; a reader takes the rate from the samples of an epoch."""

CLASSES: Mapping[int, tuple[str, ...]] = {2: ("wake", "sleep"), 5: ("wake", "N1", "N2", "N3", "REM")}
"""Label texts by number of classes, in the published order: of five, REM (5 in the files) is the last."""

_STAGES: Mapping[int, Mapping[int, str]] = {
    2: {0: "wake", 1: "sleep", 2: "sleep", 3: "sleep", 5: "sleep"},
    5: {0: "wake", 1: "N1", 2: "N2", 3: "N3", 5: "REM"},
}
_SILENT_LINES = 30


def _signals() -> dict[Modality, NamedSignal]:
    eeg = {"F3": "F3_A2", "C3": "C3_A2", "O1": "O1_A2", "F4": "F4_A1", "C4": "C4_A1", "O2": "O2_A1"}
    return {"EEG": NamedSignal(channels=dict(eeg)), "ECG": NamedSignal(channels={"ECG": "X2"})}


class IsrucOptions(Settings):
    """`reader.options` of the site file for the reader `isruc`."""

    signals: dict[Modality, NamedSignal] = Field(default_factory=_signals, min_length=1)
    """For each modality our channel names and the file's; by default six EEG channels and the ECG `X2`."""
    classes: Literal[2, 5] = 2
    """2: wake, sleep. 5: wake, N1, N2, N3, REM."""
    scorer: Literal[1, 2] = 1
    """Which of the two experts' stages."""
    last_stages: Literal["by_epoch", "drop_30"] = "by_epoch"
    """`by_epoch`: every epoch that has a line has its stage. `drop_30`: the last 30 lines are dropped whatever the
    number of epochs, as in the published experiments. On whole files the two are the same."""


class IsrucReader(Reader):
    """Reads ISRUC's `subjectN.mat`.

    An epoch that a channel lacks at the end counts as missing, one without a line has no label.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, IsrucOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All `subject<number>.mat` of the folder and below, sorted."""
        return sorted(path for path in folder.rglob("subject*.mat") if _number(path) and path.is_file())

    def parts(self, path: Path) -> list[Path]:
        """The MATLAB file and, where it is there, the expert's."""
        return [path, *(each for each in [self.stages_path(path)] if each.is_file())]

    def stages_path(self, path: Path) -> Path:
        """Where the stages of a subject's file are."""
        number = _number(path)
        return path.parent.parent / "RawData" / number / f"{number}_{self.options.scorer}.txt"

    def missing_channels(self, path: Path) -> dict[Modality, str]:
        """For each modality that the file lacks, what is missing; looks at the names alone. Raises `RecordingError`."""
        names = _names(path)
        missing = {modality: chosen_labels(wanted, names)[1] for modality, wanted in self.options.signals.items()}
        return {modality: why for modality, why in missing.items() if why}

    def read(self, path: Path) -> Recording:
        """One subject; raises `RecordingError`."""
        absent = self.missing_channels(path)
        wanted = {modality: each for modality, each in self.options.signals.items() if modality not in absent}
        arrays = {modality: _epochs(path, each) for modality, each in wanted.items()}
        count = max((len(channel) for channels in arrays.values() for channel in channels), default=0)
        return Recording(
            patient=path.stem,
            name=path.stem,
            signals={modality: _joined(arrays[modality], count, self.options.signals[modality]) for modality in arrays},
            segments=((0.0, count * EPOCH_SECONDS),),
            labels=self._labels(path, count),
            absent=absent,
        )

    def _labels(self, path: Path, epochs: int) -> LabelTrack | None:
        place = self.stages_path(path)
        if not place.is_file():
            return None
        stages = read_stages(place)
        if self.options.last_stages == "drop_30":
            stages = stages[:-_SILENT_LINES]
        stages = stages[:epochs]
        if not len(stages):
            return None
        names = _STAGES[self.options.classes]
        starts, ends, found = runs_of(stages, EPOCH_SECONDS)
        return LabelTrack(starts, ends, tuple(names.get(int(stage), f"stage {stage}") for stage in found))


def read_stages(path: Path) -> NDArray[np.int64]:
    """The stages of a text file, one integer a line, without empty lines at its end. Raises `RecordingError`."""
    try:
        lines = path.read_text(encoding="ascii").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(
            f"{path.name}: the stages can't be read", why=str(error), fix="copy the file again from its source"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"\s*\d\s*", line):
            raise RecordingError(
                f"{path.name}: line {number} is {line[:20]!r}",
                why="each line is the stage of one epoch, a digit",
                fix="copy the file again from its source, or correct the line",
            )
    return np.array([int(line) for line in lines], dtype=np.int64)


def _number(path: Path) -> str:
    """The N of `subjectN.mat`, or an empty text."""
    found = re.fullmatch(r"subject(\d+)", path.stem)
    return found.group(1) if found else ""


def _names(path: Path) -> list[str]:
    from scipy.io import whosmat

    try:
        _check_whole(path)
        return [str(name) for name, _, _ in whosmat(path, appendmat=False)]
    # scipy raises whatever its parsing runs into: ValueError, TypeError, MatReadError, zlib.error, NotImplementedError
    except Exception as error:
        raise _damaged(path, error) from error


def _check_whole(path: Path) -> None:
    """Raise `ValueError` where a variable goes on beyond the file's end: scipy passes over it without a word."""
    size, place = path.stat().st_size, 128
    with path.open("rb") as file:
        mark = file.read(128)[126:]
        if mark not in (b"IM", b"MI"):
            return  # an older format, of which scipy notices it
        while place < size:
            file.seek(place)
            _, length = struct.unpack("<II" if mark == b"IM" else ">II", file.read(8).ljust(8, b"\xff"))
            place += 8 + length
    if place > size:
        raise ValueError(f"it is truncated: {size} bytes, its last variable ends at {place}")


def _epochs(path: Path, wanted: NamedSignal) -> list[NDArray[np.float32]]:
    """The channels of one modality, each float32 `(epochs, samples)`, NaN for what is no number."""
    from scipy.io import loadmat

    names = chosen_labels(wanted, _names(path))[0]
    try:
        content = loadmat(path, variable_names=names, appendmat=False)
    except Exception as error:  # see _names
        raise _damaged(path, error) from error
    arrays = []
    for name in names:
        values = content.get(name)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf" or values.ndim != 2 or not values.size:
            raise _damaged(path, f"{name} is no table of numbers (epochs, samples)")
        data = values.astype(np.float32) * np.float32(wanted.scale)
        data[~np.isfinite(data)] = np.nan
        arrays.append(data)
    widths = sorted({each.shape[1] for each in arrays})
    if len(widths) > 1:
        raise _damaged(path, f"{', '.join(names)} have {' and '.join(map(str, widths))} samples an epoch")
    return arrays


def _joined(channels: list[NDArray[np.float32]], epochs: int, wanted: NamedSignal) -> Signal:
    """The channels over the same epochs; what one lacks at the end is masked."""
    samples = channels[0].shape[1]
    data = np.full((len(channels), epochs * samples), np.nan, dtype=np.float32)
    for row, channel in zip(data, channels, strict=True):
        row[: channel.size] = channel.ravel()
    shortest = min(len(channel) for channel in channels)
    masked = np.arange(epochs * samples) >= shortest * samples
    return Signal(data, samples / EPOCH_SECONDS, tuple(wanted.channels), masked=masked if masked.any() else None)


def _damaged(path: Path, why: object) -> RecordingError:
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
    return RecordingError(
        f"{path.name}: can't be read as extracted channels of ISRUC-Sleep",
        why=reason,
        fix="copy the file again from its source, or exclude it in the site file",
    )
