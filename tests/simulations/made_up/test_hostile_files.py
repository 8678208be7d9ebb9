"""A hostile pickle under the name of any set's file is refused by that set's reader, and nothing of it runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from client.errors import RecordingError
from client.readers.base import Reader
from client.readers.fog import FogReader
from client.readers.isruc import IsrucReader
from client.readers.npz import NpzReader
from client.readers.wesad import WesadReader
from simulations.made_up.formats import fog_rows, write_fog, write_isruc
from simulations.made_up.python2 import write_python2

NPZ = {"subject": "subject", "signals": {"ECG": {"array": "ECG", "rate": 100.0, "channels": ["ECG"]}}}


class Evil:
    """Opens a file for writing as it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.victim), "w"))


def bare(path: Path, evil: Evil) -> None:
    path.write_bytes(pickle.dumps(evil, protocol=2))


def python2(path: Path, evil: Evil) -> None:
    write_python2(path, {"subject": "S2", "label": evil})


def in_text(path: Path, evil: Evil) -> None:
    write_fog(path, fog_rows([0.0] * 20))
    path.write_bytes(path.read_bytes() + pickle.dumps(evil, protocol=0))


def in_matlab(path: Path, evil: Evil) -> None:
    """An array of objects: scipy stores no pickles, and takes such objects apart."""
    del evil
    scipy.io.savemat(path, {"X2": np.array([{"a": 1}, "x"], dtype=object)})


def in_archive(path: Path, evil: Evil) -> None:
    np.savez(path, subject="a", ECG=np.array([evil], dtype=object))


@pytest.mark.parametrize(
    ("reader", "name", "write"),
    [
        (WesadReader({}), "S2/S2.pkl", bare),
        (WesadReader({}), "S2/S2.pkl", python2),
        (IsrucReader({}), "ExtractedChannels/subject1.mat", bare),
        (IsrucReader({}), "ExtractedChannels/subject1.mat", in_matlab),
        (FogReader({}), "FilteredData/001/task_1.txt", bare),
        (FogReader({}), "FilteredData/001/task_1.txt", in_text),
        (NpzReader(NPZ), "a.npz", bare),
        (NpzReader(NPZ), "a.npz", in_archive),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__ if isinstance(value, Reader) else value),
)
def test_nothing_runs(tmp_path: Path, reader: Reader, name: str, write: Callable[[Path, Evil], None]) -> None:
    victim = tmp_path / "written"
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    write(path, Evil(victim))
    assert reader.files(tmp_path / "set") == [path]
    with pytest.raises(RecordingError) as caught:
        reader.read(path)
    assert path.name in caught.value.what
    assert caught.value.fix
    assert not victim.exists()


def test_a_hostile_text_of_stages_has_no_effect(tmp_path: Path) -> None:
    victim = tmp_path / "written"
    path = write_isruc(tmp_path / "set", 7, [0, 1, 0, 1])
    stages = tmp_path / "set" / "RawData" / "7" / "7_1.txt"
    stages.write_bytes(pickle.dumps(Evil(victim), protocol=0))
    with pytest.raises(RecordingError, match=r"7_1\.txt: line 1"):
        IsrucReader({}).read(path)
    assert not victim.exists()
