"""PhysioNet's WFDB records (`.hea` with `.dat` or `.mat`), read with the package `wfdb`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.config import Settings, parse_model
from bridge.windows import Modality
from client.errors import RecordingError
from client.readers.base import LabelTrack, Reader, Recording, Signal
from client.readers.names import NamedFiles, chosen_labels, match_name


class WfdbAnnotations(Settings):
    """Labels from an annotation file: each holds until the next one."""

    extension: str
    """Of the annotation file, for example `atr`."""
    field: str = "aux_note"
    """`aux_note` (rhythms) or `symbol`; annotations with an empty text are passed over."""


class WfdbOptions(NamedFiles):
    """`reader.options` of the site file for the reader `wfdb`. Values are in the header's physical unit."""

    pattern: str = "*.hea"
    annotations: WfdbAnnotations | None = None


class WfdbReader(Reader):
    """Reads WFDB records by `WfdbOptions`. Samples that the format marks as invalid become a gap."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, WfdbOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All headers that fit `pattern`, sorted."""
        return sorted(path for path in folder.rglob(self.options.pattern) if path.is_file())

    def parts(self, path: Path) -> list[Path]:
        """The header, its signal files and, where labels come from one, the annotation file."""
        parts = [path, *_named_in_header(path)]
        if self.options.annotations is not None:
            annotations = path.with_suffix(f".{self.options.annotations.extension}")
            parts += [annotations] if annotations.is_file() else []
        return list(dict.fromkeys(parts))

    def read(self, path: Path) -> Recording:
        """One record; raises `RecordingError`."""
        record = _read("signals", path)
        if record.p_signal is None:
            raise RecordingError(f"{path.name}: the record has no signals", fix="exclude the file in the site file")
        values, names, rate = np.asarray(record.p_signal, dtype=np.float32).T, list(record.sig_name), float(record.fs)
        signals: dict[Modality, Signal] = {}
        absent: dict[Modality, str] = {}
        for modality, wanted in self.options.signals.items():
            labels, why = chosen_labels(wanted, names)
            if why:
                absent[modality] = why
                continue
            data = np.ascontiguousarray(values[[names.index(label) for label in labels]]) * np.float32(wanted.scale)
            signals[modality] = Signal(data, rate, tuple(wanted.channels), masked=np.isnan(data).any(axis=0))
        seconds = values.shape[1] / rate
        return Recording(
            patient=match_name(self.options.patient_pattern, path.stem, "patient"),
            name=path.stem,
            signals=signals,
            segments=((0.0, seconds),),
            labels=self._labels(path, rate, seconds),
            absent=absent,
        )

    def _labels(self, path: Path, rate: float, seconds: float) -> LabelTrack | None:
        if self.options.label_pattern is not None:
            text = match_name(self.options.label_pattern, path.stem, "label")
            return LabelTrack(np.array([0.0]), np.array([seconds]), (text,))
        if self.options.annotations is None:
            return None
        found = _read("annotations", path, self.options.annotations.extension)
        texts = [str(text).strip("\x00 ") for text in getattr(found, self.options.annotations.field)]
        kept = [(sample / rate, text) for sample, text in zip(found.sample, texts, strict=True) if text]
        starts: NDArray[np.float64] = np.array([start for start, _ in kept], dtype=np.float64)
        ends = np.append(starts[1:], seconds)[: len(starts)]
        return LabelTrack(starts, ends, tuple(text for _, text in kept))


def _named_in_header(path: Path) -> list[Path]:
    """The files that a header names (header(5) of the WFDB documentation), without the package: it loads slowly, and
    caches ask for this in every process.
    """
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
        record, *others = [line.split() for line in lines if line.strip() and not line.startswith("#")]
        names = [fields[0] for fields in others if fields[0] != "~"]
    except (OSError, ValueError) as error:
        raise RecordingError(
            f"{path.name}: the WFDB header can't be read",
            why=f"{type(error).__name__}: {error}",
            fix="copy the record's files again from their source, or exclude the file in the site file",
        ) from error
    if "/" not in record[0]:
        return [path.parent / name for name in names]
    # a record of segments: each has a header of its own
    segments = [path.parent / f"{name}.hea" for name in names]
    return [part for segment in segments for part in (segment, *_named_in_header(segment))]


def _read(what: str, path: Path, extension: str = "") -> Any:
    """One call of the package; whatever it raises on a damaged file becomes a `RecordingError`."""
    import wfdb

    record = str(path.with_suffix(""))
    try:
        return wfdb.rdrecord(record) if what == "signals" else wfdb.rdann(record, extension)
    # wfdb raises whatever its parsing runs into: ValueError, IndexError, TypeError, its own HeaderSyntaxError
    except Exception as error:
        raise RecordingError(
            f"{path.name}: the WFDB {what} can't be read",
            why=f"{type(error).__name__}: {error}",
            fix="copy the record's files again from their source, or exclude the file in the site file",
        ) from error
