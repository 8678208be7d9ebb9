"""What every reader returns, and the small interface that a site's own reader implements (docs/own-reader.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.windows import Modality
from client.errors import RecordingError, SiteFileError

GROUP = "fedbridge.readers"
"""Entry point group in which readers are found."""


@dataclass(frozen=True)
class Signal:
    """One modality of one recording.

    `data` is float32 `(channels, n)` in the file's physical unit (microvolt where the file has one), NaN where a value
    is missing. `masked` is bool `(n,)`, true where the file or device itself says that the signal is absent: such
    windows are counted as `missing`, other NaN as `nan`. `start_seconds` is the time of the first sample on the
    recording's axis.
    """

    data: NDArray[np.float32]
    rate_hz: float
    channels: tuple[str, ...]
    start_seconds: float = 0.0
    masked: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.dtype != np.float32:
            raise RecordingError(
                f"a signal is {self.data.dtype} of shape {self.data.shape}",
                why="float32 (channels, samples) is expected",
                fix="correct the reader",
            )
        if self.data.shape[0] != len(self.channels) or len(set(self.channels)) != len(self.channels):
            raise RecordingError(
                f"a signal of {self.data.shape[0]} rows has the channel names {list(self.channels)}",
                why="one different name a row is expected",
                fix="correct the channel names in the reader's options",
            )
        if not np.isfinite(self.rate_hz) or self.rate_hz <= 0:
            raise RecordingError(
                f"a signal has the sampling rate {self.rate_hz}",
                why="a positive number of Hz is expected",
                fix="correct the file or the reader's options",
            )
        if self.masked is not None and self.masked.shape != (self.data.shape[1],):
            raise RecordingError(
                f"a mask of shape {self.masked.shape} for {self.data.shape[1]} samples",
                why="one value a sample is expected",
                fix="correct the reader",
            )

    @property
    def end_seconds(self) -> float:
        """Time of the end of the last sample."""
        return float(self.start_seconds + self.data.shape[1] / self.rate_hz)


@dataclass(frozen=True)
class LabelTrack:
    """Labels by time: `values[i]` holds from `starts[i]` to `ends[i]` (seconds); no two stretches overlap."""

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    values: tuple[str, ...]
    groups: tuple[str, ...] = ()
    """A public group of each stretch (for example the alarm type); empty: the recording's group holds."""


@dataclass(frozen=True)
class Recording:
    """One recording of one patient: its signals on one time axis, in seconds.

    `segments` are the stretches `(start, end)` that no window may cross. `absent` tells, for a modality that the
    options name but the file lacks, what is missing: whoever needs that modality refuses the file with this text.
    """

    patient: str
    name: str
    signals: Mapping[Modality, Signal]
    segments: tuple[tuple[float, float], ...]
    labels: LabelTrack | None = None
    group: str = ""
    absent: Mapping[Modality, str] = field(default_factory=dict)


class Reader(ABC):
    """Turns a site's files into recordings. Made from the `reader.options` of the site file; holds no state of a file.

    A subclass validates its options in `__init__` (raise `bridge.errors.ConfigError`, most simply through
    `bridge.config.parse_model`), and raises `RecordingError` for a file that it can't read.
    """

    version: int = 1
    """Raise it when the reader's results change, so that cached features are computed again."""

    @abstractmethod
    def __init__(self, options: dict[str, Any]) -> None:
        """Check and keep the options."""

    @abstractmethod
    def files(self, folder: Path) -> list[Path]:
        """One path a recording, sorted."""

    @abstractmethod
    def read(self, path: Path) -> Recording:
        """The recording at one of the paths of `files`. Raises `RecordingError`."""

    def name(self, path: Path) -> str:
        """What the recording at a path is called; labels and results are joined by it, so no two may share one."""
        return path.stem

    def parts(self, path: Path) -> list[Path]:
        """All files whose bytes make up the recording (a header and its signal files); what caches are keyed by."""
        return [path]


def find_reader(name: str) -> type[Reader]:
    """The reader class of an entry point; raises `SiteFileError` that lists the readers there are."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise SiteFileError(
            f"there is no reader '{name}'",
            why=f"installed readers: {', '.join(sorted(found)) or 'none'}",
            fix=f"correct reader.name, or install the package with the entry point '{name}' in the group {GROUP}",
        )
    try:
        kind = found[name].load()
    except (ImportError, AttributeError) as error:
        raise SiteFileError(
            f"the reader '{name}' can't be loaded", why=str(error), fix="reinstall the package that brings it"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Reader)):
        raise SiteFileError(
            f"the reader '{name}' is not a subclass of client.readers.base.Reader",
            why=f"its entry point names {found[name].value}",
            fix="see docs/own-reader.md",
        )
    return kind


def runs_of(values: NDArray[Any], seconds_each: float) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any]]:
    """Starts, ends (seconds) and values of the stretches of equal neighbours in a regular track."""
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    first = np.concatenate([[0], edges])
    last = np.concatenate([edges, [len(values)]])
    return first * seconds_each, last * seconds_each, values[first]
