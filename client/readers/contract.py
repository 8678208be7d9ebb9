"""The contract test kit for readers: run it on an own reader and a folder with a few files (docs/own-reader.md)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np

from bridge.windows import Modality
from client.readers.base import LabelTrack, Reader, Recording, Signal


class ContractError(AssertionError):
    """A reader breaks the contract; the text names the clause and what was found."""


def check_reader(reader: Reader, folder: Path) -> list[Recording]:
    """Check every clause of the contract on all files of `folder`; return the recordings, for checks of one's own.

    Clauses: `files` is sorted, without repeats, and finds at least one; `parts` names files that exist, the path itself
    among them; `read` gives the same twice; patient and name are not empty, the name is the one that `name` tells and
    no other recording's; signals are float32 `(channels, n)`, finite or NaN, with at least one sample; segments are in
    order, do not overlap and lie within the signals; labels are in order, do not overlap, and have one text each.
    """
    _require(isinstance(reader, Reader), "a reader is a subclass of client.readers.base.Reader", type(reader).__name__)
    paths = reader.files(folder)
    _require(bool(paths), "files finds at least one recording", f"none in {folder}")
    _require(paths == sorted(set(paths)), "files is sorted and without repeats", f"{len(paths)} paths")
    recordings = []
    for path in paths:
        parts = reader.parts(path)
        _require(path in parts, "parts names the path itself", f"{[each.name for each in parts]} for {path.name}")
        _require(all(each.is_file() for each in parts), "parts names files that exist", path.name)
        first, second = reader.read(path), reader.read(path)
        _require(_same(first, second), "read gives the same recording twice", path.name)
        _require(first.name == reader.name(path), "a recording's name is the one that name tells", repr(first.name))
        _check_recording(first, path)
        recordings.append(first)
    names = [recording.name for recording in recordings]
    _require(len(set(names)) == len(names), "no two recordings have the same name", f"{sorted(names)}")
    return recordings


def _check_recording(recording: Recording, path: Path) -> None:
    _require(bool(recording.patient), "a recording names its patient", path.name)
    _require(bool(recording.name), "a recording has a name", path.name)
    _require(bool(recording.signals or recording.absent), "a recording has signals, or says what is absent", path.name)
    for modality, signal in recording.signals.items():
        _require(modality in get_args(Modality), f"modalities are {', '.join(get_args(Modality))}", repr(modality))
        _check_signal(signal, f"{modality} of {path.name}")
    if recording.signals:
        first = min(signal.start_seconds for signal in recording.signals.values())
        last = max(signal.end_seconds for signal in recording.signals.values())
        edges = [edge for segment in recording.segments for edge in segment]
        _require(bool(edges) and edges == sorted(edges), "segments are in order and do not overlap", path.name)
        _require(first - 1e-6 <= edges[0] and edges[-1] <= last + 1e-6, "segments lie within the signals", path.name)
    if recording.labels is not None:
        _check_labels(recording.labels, path)


def _check_signal(signal: Signal, where: str) -> None:
    _require(signal.data.dtype == np.float32 and signal.data.ndim == 2, "data are float32 (channels, n)", where)
    _require(signal.data.shape[1] > 0, "a signal has at least one sample", where)
    _require(not np.isinf(signal.data).any(), "values are finite or NaN", where)


def _check_labels(labels: LabelTrack, path: Path) -> None:
    lengths = {len(labels.starts), len(labels.ends), len(labels.values)}
    _require(len(lengths) == 1, "labels have one start, one end and one text each", path.name)
    _require(len(labels.groups) in (0, len(labels.values)), "labels have one group each, or none", path.name)
    _require(bool((labels.starts < labels.ends).all()), "a label ends after it starts", path.name)
    apart = all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(zip(labels.starts, labels.ends, strict=True)))
    _require(apart, "labels are in order and do not overlap", path.name)


def _same(first: Recording, second: Recording) -> bool:
    names = (first.patient, first.name, first.segments) == (second.patient, second.name, second.segments)
    return (
        names
        and first.signals.keys() == second.signals.keys()
        and all(
            np.array_equal(each.data, second.signals[modality].data, equal_nan=True)
            and each.rate_hz == second.signals[modality].rate_hz
            for modality, each in first.signals.items()
        )
    )


def _require(holds: bool, clause: str, found: str) -> None:
    if not holds:
        raise ContractError(f"{clause}; found: {found}")
