"""Pickles as Python 2 wrote them: byte strings for texts and for arrays' memory, numpy's old module names."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar


class _Python2Pickler(pickle._Pickler):
    """Protocol 2 with the opcodes that Python 2 chose."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    # The parent has these two; its published types don't.
    write: Callable[[bytes], Any]
    memoize: Callable[[Any], None]

    def _string(self, value: str | bytes) -> None:
        raw = value.encode("latin-1") if isinstance(value, str) else value
        if len(raw) < 256:
            self.write(b"U" + bytes([len(raw)]) + raw)
        else:
            self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    def _name(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[str] = _string
    dispatch[bytes] = _string
    dispatch[type] = _name
    save_global = _name


def write_python2(path: Path, value: Any) -> Path:
    """Write a value of plain containers and arrays; makes the folder, returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(value)
    return path
