"""The multimodal freezing-of-gait set (Zhang et al. 2022, Mendeley Data r8gmbtv7w2, version 3), filtered data.

    FilteredData/NNN/*.txt, FilteredData/NNN/OFF_k/*.txt     one task a file, 500 Hz, comma separated, no header

Columns, counted from 0: 0 number, 1 time, 2 to 26 EEG in the cap's order, 27 to 31 EMG and others, 32 to 59 motion and
skin, 60 the label (1 freezing). Which columns hold the three EMG that all patients share is another for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bridge.config import parse_model
from bridge.windows import Modality
from client.errors import RecordingError
from client.readers.base import Reader, Recording, Signal
from client.readers.sampled import SampledLabels

RATE_HZ = 500.0
CLASSES = ("no freezing", "freezing")
EMG_CHANNELS = ("EMG1", "EMG2", "EMG3")

_COLUMNS = 61
_LABEL = 60
_EEG = {"F3": 4, "F4": 5, "C3": 6, "C4": 7, "O1": 10, "O2": 11}
_EMG: Mapping[str, tuple[int, int, int]] = {
    **dict.fromkeys(("001", "002", "006", "007", "008/OFF_1"), (27, 28, 31)),
    **dict.fromkeys(("003", "004", "005", "010", "011", "012"), (28, 27, 31)),
    "008/OFF_2": (27, 31, 28),
    "009": (28, 27, 30),
}


class FogOptions(SampledLabels):
    """`reader.options` of the site file for the reader `fog`."""

    eeg: dict[str, int] = Field(default_factory=lambda: dict(_EEG), min_length=1)
    """EEG channels and their columns, counted from 0."""
    emg: dict[str, tuple[int, int, int]] = Field(default_factory=dict)
    """Columns of EMG1, EMG2, EMG3 for a patient (`013`) or a session (`008/OFF_1`), beside or in the place of those
    that are known."""
    labels_hz: float = 200.0


class FogReader(Reader):
    """Reads the text files of the set; the folder of three digits is the patient."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, FogOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All `.txt` in a patient's folder or a session's, sorted."""
        return sorted(path for path in folder.rglob("*.txt") if session_of(path) and path.is_file())

    def name(self, path: Path) -> str:
        """Patient, session and task: `008_OFF_1_task_1`."""
        return f"{session_of(path).replace('/', '_')}_{path.stem}"

    def read(self, path: Path) -> Recording:
        """One task; raises `RecordingError`."""
        session = session_of(path)
        columns = self._emg_columns(session)
        table = read_table(path, (*self.options.eeg.values(), *(columns or ()), _LABEL))
        eeg = len(self.options.eeg)
        signals: dict[Modality, Signal] = {"EEG": _signal(table[:eeg], tuple(self.options.eeg))}
        if columns is not None:
            signals["EMG"] = _signal(table[eeg:-1], EMG_CHANNELS)
        samples = table.shape[1]
        return Recording(
            patient=session[:3],
            name=self.name(path),
            signals=signals,
            segments=((0.0, samples / RATE_HZ),),
            labels=self.options.track(table[-1], RATE_HZ, samples, dict(enumerate(CLASSES))),
            absent={} if columns else {"EMG": f"the EMG columns of {session} are not known: set reader.options.emg"},
        )

    def _emg_columns(self, session: str) -> tuple[int, int, int] | None:
        named = (known.get(place) for known in (self.options.emg, _EMG) for place in (session, session[:3]))
        return next((columns for columns in named if columns is not None), None)


def session_of(path: Path) -> str:
    """`NNN` or `NNN/OFF_k` of a file in a patient's folder; an empty text elsewhere."""
    parent, above = path.parent.name, path.parent.parent.name
    if re.fullmatch(r"\d{3}", parent):
        return parent
    return f"{above}/{parent}" if re.fullmatch(r"OFF_\d+", parent) and re.fullmatch(r"\d{3}", above) else ""


def read_table(path: Path, columns: tuple[int, ...]) -> NDArray[np.float64]:
    """Some columns as `(columns, samples)`, NaN where a cell is empty.

    Raises `RecordingError` where a line has another number of columns (a file cut short ends so), or a cell is no
    number.
    """
    outside = [column for column in columns if not 0 <= column < _COLUMNS]
    if outside:
        raise _wrong(path, f"reader.options name column {outside[0]}", f"name columns from 0 to {_COLUMNS - 1}")
    try:
        try:
            return _loaded(path, columns)
        except ValueError:
            # Slower, a cell at a time: some are empty.
            return _loaded(path, columns, converters=_cell)
    except (OSError, ValueError) as error:
        raise _wrong(path, str(error)) from error


def _loaded(path: Path, columns: tuple[int, ...], **more: Any) -> NDArray[np.float64]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = _lines(path, file)
        first = next(lines, None)
        if first is None:
            raise ValueError("it holds no sample")
        table = np.loadtxt(chain([first], lines), delimiter=",", usecols=columns, ndmin=2, comments=None, **more)
    table[~np.isfinite(table)] = np.nan
    return np.ascontiguousarray(table.T)


def _lines(path: Path, file: Iterator[str]) -> Iterator[str]:
    """The lines that are not empty, each with as many columns as the set's files have."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            found = line.count(",") + 1
            if found != _COLUMNS:
                raise _wrong(path, f"line {number} has {found} column(s), {_COLUMNS} are expected")
            yield line


def _cell(text: str) -> float:
    return float(text) if text.strip() else np.nan


def _signal(rows: NDArray[np.float64], names: tuple[str, ...]) -> Signal:
    return Signal(rows.astype(np.float32), RATE_HZ, names)


def _wrong(path: Path, why: str, fix: str = "copy the file again from its source, or exclude it") -> RecordingError:
    return RecordingError(f"{path.parent.name}/{path.name}: can't be read as a file of the FOG set", why=why, fix=fix)
