"""EDF and EDF+C recordings, read with the package `mne`; the header is checked here first.

Without a word the package shortens a truncated file and brings channels of different rates to the highest one. So each
modality is read on its own, and a file that is shorter than its header says is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.config import parse_model
from bridge.windows import Modality
from client.errors import RecordingError
from client.readers.base import LabelTrack, Reader, Recording, Signal
from client.readers.names import NamedFiles, NamedSignal, chosen_labels, match_name

ANNOTATIONS = "EDF Annotations"


class EdfOptions(NamedFiles):
    """`reader.options` of the site file for the reader `edf`.

    `scale` of a signal is from mne's volt: 1e6 for microvolt. Channels without a unit of voltage keep the file's value.
    """

    pattern: str = "*.edf"
    annotations: bool = False
    """Take labels from the file's annotations (EDF+): each holds for its duration, or until the next without one."""


@dataclass(frozen=True)
class EdfHeader:
    """What the fixed header of an EDF file says (Kemp et al. 1992, Kemp and Olivan 2003)."""

    labels: list[str]
    samples: list[int]
    """Of each channel in one data record."""
    records: int
    record_seconds: float
    header_bytes: int
    discontinuous: bool

    @property
    def file_bytes(self) -> int:
        """Size of a whole file."""
        return self.header_bytes + 2 * self.records * sum(self.samples)


class EdfReader(Reader):
    """Reads EDF files by `EdfOptions`, one file a recording; several may belong to one patient."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, EdfOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All files that fit `pattern`, sorted."""
        return sorted(path for path in folder.rglob(self.options.pattern) if path.is_file())

    def read(self, path: Path) -> Recording:
        """One recording; raises `RecordingError`."""
        header = read_header(path)
        signals: dict[Modality, Signal] = {}
        absent: dict[Modality, str] = {}
        for modality, wanted in self.options.signals.items():
            labels, why = chosen_labels(wanted, [label for label in header.labels if label != ANNOTATIONS])
            if why:
                absent[modality] = why
            else:
                signals[modality] = _signal(path, header, modality, wanted, labels)
        seconds = header.records * header.record_seconds
        return Recording(
            patient=match_name(self.options.patient_pattern, path.stem, "patient"),
            name=path.stem,
            signals=signals,
            segments=((0.0, seconds),),
            labels=self._labels(path, seconds),
            absent=absent,
        )

    def _labels(self, path: Path, seconds: float) -> LabelTrack | None:
        if self.options.label_pattern is not None:
            text = match_name(self.options.label_pattern, path.stem, "label")
            return LabelTrack(np.array([0.0]), np.array([seconds]), (text,))
        if not self.options.annotations:
            return None
        notes = _open(path, []).annotations
        starts = np.asarray(notes.onset, dtype=np.float64)
        following = np.append(starts[1:], seconds)[: len(starts)]
        ends = np.where(notes.duration > 0, np.minimum(starts + notes.duration, following), following)
        return LabelTrack(starts, ends, tuple(str(text) for text in notes.description))


def read_header(path: Path) -> EdfHeader:
    """The fixed header. Raises `RecordingError` where it is none, the data are discontinuous, or the file is short."""
    try:
        with path.open("rb") as file:
            content = file.read(256)
            channels = int(content[252:256])
            whole = content + file.read(256 * channels)
        labels = _texts(whole, 256, 16, channels)
        samples = [int(text) for text in _texts(whole, 256 + 216 * channels, 8, channels)]
        header = EdfHeader(
            labels, samples, int(content[236:244]), float(content[244:252]), int(content[184:192]),
            content[192:236].startswith(b"EDF+D"),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise _damaged(path, f"no EDF header: {error}") from error
    if header.discontinuous:
        raise RecordingError(
            f"{path.name}: is a discontinuous EDF+ file",
            why="its gaps have no place on a common time axis",
            fix="export it as EDF+C, one file a continuous stretch",
        )
    size = path.stat().st_size
    if header.records < 1 or header.record_seconds <= 0 or min(samples, default=0) < 1:
        raise _damaged(path, f"{header.records} data records of {header.record_seconds:g} s")
    if size < header.file_bytes:
        raise _damaged(path, f"it is truncated: {size} bytes, the header promises {header.file_bytes}")
    return header


def _texts(whole: bytes, first: int, width: int, count: int) -> list[str]:
    fields = [whole[first + width * i : first + width * (i + 1)] for i in range(count)]
    return [field.decode("latin-1").strip() for field in fields]


def _signal(path: Path, header: EdfHeader, modality: Modality, wanted: NamedSignal, labels: list[str]) -> Signal:
    rates = {header.samples[header.labels.index(label)] / header.record_seconds for label in labels}
    if len(rates) > 1:
        raise RecordingError(
            f"{path.name}: the {modality} channels {', '.join(labels)} have different rates",
            why=f"they were sampled at {', '.join(f'{rate:g}' for rate in sorted(rates))} Hz",
            fix="name channels of one rate in reader.options",
        )
    raw = _open(path, labels)
    try:
        data = raw.get_data(picks=labels)
    except Exception as error:  # see _open
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    values = (np.asarray(data) * wanted.scale).astype(np.float32)
    return Signal(values, rates.pop(), tuple(wanted.channels))


def _open(path: Path, labels: list[str]) -> Any:
    import mne

    try:
        return mne.io.read_raw_edf(path, include=labels or None, preload=False, verbose="ERROR")
    # mne raises whatever its parsing runs into
    except Exception as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, why: str) -> RecordingError:
    return RecordingError(
        f"{path.name}: can't be read as EDF",
        why=why,
        fix="copy the file again from its source, or exclude it in the site file",
    )
