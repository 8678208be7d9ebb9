"""Recordings in numpy's `.npz`, one file a recording, with the arrays' names given in the options."""

from __future__ import annotations

import itertools
import zipfile
import zlib
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

Segments = tuple[tuple[float, float], ...]


class NpzSignal(Settings):
    """Where one modality lies in the file."""

    array: str
    """Name of the `(channels, n)` or `(n,)` array."""
    rate: str | float
    """Sampling rate in Hz: a number, or the name of the scalar that holds it."""
    scale: str | float = 1.0
    """Factor from stored to physical values: a number, or the name of the scalar that holds it."""
    channels: str | tuple[str, ...]
    """The rows' names, or the name of the array that holds them."""
    ok: str | None = None
    """Name of an array that is 0 where the signal is absent."""
    ok_per: Literal["second", "segment"] = "second"
    """What one value of `ok` speaks for."""


class NpzLabel(Settings):
    """Where labels lie: one scalar, or a regular track."""

    array: str
    rate: str | float | None = None
    """Labels a second, for a track: a number, or the name of the scalar that holds it."""
    names: str | None = None
    """Name of the array of label texts that the values index; without it the value itself is the text."""
    window: str | None = None
    """Name of the array `[start, end]` (seconds) in which a scalar label holds; without it, the whole recording."""


class NpzGroup(Settings):
    """A scalar that groups recordings for the report (for example the alarm type)."""

    array: str
    names: str | None = None


class NpzOptions(Settings):
    """`reader.options` of the site file for the reader `npz`."""

    pattern: str = "*.npz"
    """Which files of the folder (and below) are recordings."""
    subject: str | None = None
    """Name of the scalar that holds the patient's id; without it the file's name is the patient."""
    signals: dict[Modality, NpzSignal] = Field(min_length=1)
    segments: str | None = None
    """Name of the array of seconds at which a new segment begins; no window crosses one."""
    label: NpzLabel | None = None
    group: NpzGroup | None = None


class NpzReader(Reader):
    """Reads `.npz` files by `NpzOptions`, never with pickle."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, NpzOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All files that fit `pattern`, sorted."""
        return sorted(path for path in folder.rglob(self.options.pattern) if path.is_file())

    def read(self, path: Path) -> Recording:
        """One recording; raises `RecordingError` where the file is damaged or not laid out as the options say."""
        try:
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with loaded as archive:
                return self._recording(_Arrays(path, archive))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise RecordingError(
                f"{path.name}: can't be read as .npz",
                why=_why_unread(path, error),
                fix="copy the file again from its source, or exclude it in the site file",
            ) from error

    def _recording(self, arrays: _Arrays) -> Recording:
        options = self.options
        raw: dict[Modality, tuple[NpzSignal, NDArray[np.float32], float]] = {}
        absent: dict[Modality, str] = {}
        for modality, where in options.signals.items():
            if where.array in arrays.names:
                raw[modality] = (where, arrays.signal(where), arrays.number(where.rate))
            else:
                absent[modality] = f"no array '{where.array}', it holds {', '.join(sorted(arrays.names))}"
        seconds = max((data.shape[1] / rate for _, data, rate in raw.values()), default=0.0)
        segments = self._segments(arrays, seconds)
        signals = {
            modality: Signal(
                data, rate, arrays.texts(where.channels), masked=_mask(arrays, where, data, rate, segments)
            )
            for modality, (where, data, rate) in raw.items()
        }
        return Recording(
            patient=arrays.text(options.subject) if options.subject else arrays.path.stem,
            name=arrays.path.stem,
            signals={modality: _with_gaps(signal) for modality, signal in signals.items()},
            segments=segments,
            labels=_labels(arrays, options.label, seconds) if options.label else None,
            group=arrays.named(options.group.array, options.group.names) if options.group else "",
            absent=absent,
        )

    def _segments(self, arrays: _Arrays, seconds: float) -> Segments:
        if self.options.segments is None:
            return ((0.0, seconds),)
        inner = [float(value) for value in arrays.get(self.options.segments).ravel() if 0 < value < seconds]
        edges = [0.0, *sorted(set(inner)), seconds]
        return tuple(itertools.pairwise(edges))


class _Arrays:
    """Named access to one open archive, with errors that name the file and the key."""

    def __init__(self, path: Path, archive: Mapping[str, Any]) -> None:
        self.path = path
        self.names = set(archive)
        self._archive = archive

    def get(self, name: str) -> NDArray[Any]:
        if name not in self.names:
            raise RecordingError(
                f"{self.path.name}: has no array '{name}'",
                why=f"the site file's reader.options name it; the file holds {', '.join(sorted(self.names))}",
                fix="correct reader.options, or exclude the file",
            )
        return np.asarray(self._archive[name])

    def number(self, value: str | float) -> float:
        if isinstance(value, float):
            return value
        array = self.get(value)
        if array.size != 1 or array.dtype.kind not in "iuf":
            raise self._bad(value, f"one number is expected, not {array.dtype} of shape {array.shape}")
        return float(array.reshape(()))

    def text(self, name: str) -> str:
        array = self.get(name)
        if array.size != 1:
            raise self._bad(name, f"one value is expected, not shape {array.shape}")
        return str(array.reshape(()).item())

    def texts(self, value: str | tuple[str, ...]) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(str(each) for each in np.atleast_1d(self.get(value)))

    def named(self, name: str, names: str | None) -> str:
        if names is None:
            return self.text(name)
        return self.name_of(int(self.number(name)), self.texts(names), name)

    def name_of(self, index: int, texts: tuple[str, ...], name: str) -> str:
        if not 0 <= index < len(texts):
            raise self._bad(name, f"its values must index {len(texts)} names")
        return texts[index]

    def signal(self, where: NpzSignal) -> NDArray[np.float32]:
        array = self.get(where.array)
        if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
            raise self._bad(
                where.array, f"numbers (channels, n) are expected, not {array.dtype} of shape {array.shape}"
            )
        return np.atleast_2d(array).astype(np.float32) * np.float32(self.number(where.scale))

    def _bad(self, name: str, why: str) -> RecordingError:
        return RecordingError(
            f"{self.path.name}: array '{name}' is not as expected", why=why, fix="correct reader.options or the file"
        )


def _mask(
    arrays: _Arrays, where: NpzSignal, data: NDArray[np.float32], rate: float, segments: Segments
) -> NDArray[np.bool_] | None:
    """True for each sample that the file's own `ok` array calls absent."""
    if where.ok is None:
        return None
    ok = np.atleast_1d(arrays.get(where.ok)) != 0
    times = np.arange(data.shape[1]) / rate
    if where.ok_per == "second":
        index, needed = times.astype(np.int64), int(np.ceil(data.shape[1] / rate - 1e-9))
    else:
        index, needed = np.searchsorted([end for _, end in segments[:-1]], times, side="right"), len(segments)
    if len(ok) < needed:
        raise RecordingError(
            f"{arrays.path.name}: array '{where.ok}' has {len(ok)} values",
            why=f"{needed} are needed, one a {where.ok_per}",
            fix="correct ok and ok_per in reader.options, or the file",
        )
    return np.asarray(~ok[index], dtype=np.bool_)


def _with_gaps(signal: Signal) -> Signal:
    if signal.masked is not None:
        signal.data[:, signal.masked] = np.nan
    return signal


def _labels(arrays: _Arrays, where: NpzLabel, seconds: float) -> LabelTrack:
    values = arrays.get(where.array)
    names = arrays.texts(where.names) if where.names else None

    def text(value: Any) -> str:
        return str(value) if names is None else arrays.name_of(int(value), names, where.array)

    if values.ndim == 0:
        start, end = (float(each) for each in arrays.get(where.window).ravel()) if where.window else (0.0, seconds)
        return LabelTrack(np.array([start]), np.array([end]), (text(values.item()),))
    if where.rate is None:
        raise RecordingError(
            f"{arrays.path.name}: array '{where.array}' is a track of {values.size} labels",
            why="reader.options.label names no rate",
            fix="add reader.options.label.rate",
        )
    starts, ends, found = runs_of(values.ravel(), 1.0 / arrays.number(where.rate))
    return LabelTrack(starts, ends, tuple(text(value.item()) for value in found))


def _why_unread(path: Path, error: Exception) -> str:
    """numpy takes what is no archive for a pickle and advises to load it unsafely: never repeat that."""
    if isinstance(error, OSError) or zipfile.is_zipfile(path):
        return f"{type(error).__name__}: {error}"
    return "it is no .npz archive, or was cut short"
