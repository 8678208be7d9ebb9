"""Reads pickles of arrays and plain containers, and nothing else: a file from outside can't make anything happen.

A pickle is a program for a small machine that may call whatever it names. Here the names it may use are a few, none of
them leads to code of numpy or of anybody else, and what it builds is checked before it becomes an array. The machine is
the one written in Python: the one written in C takes memory that a file merely mentions.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.errors import RecordingError, UnsafePickleError

_NUMBERS_AND_TEXTS = re.compile(r"^[biufcSU]\d{1,4}$")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_DEEPEST = 50


class _RefusedError(Exception):
    """The pickle names or builds what is not admitted; the text says what."""


def load_plain(path: Path) -> Any:
    """What a pickle holds: dicts, lists, tuples and sets of texts, numbers and numpy arrays of these. Python 2's are
    read as latin-1.

    Raises `UnsafePickleError` where it asks for anything else (nothing of it is run), `RecordingError` where it is
    damaged or can't be read.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, fix_imports=False, encoding="latin1").load(), {}, 0)
    except _RefusedError as error:
        raise UnsafePickleError(
            f"{path.name}: is a pickle that asks for {error}",
            why="only numbers, texts, arrays of them and plain containers are read; nothing of it was run",
            fix="get the file from its official source again, or exclude it in the site file",
        ) from error
    # The machine raises whatever damaged bytes run into.
    except Exception as error:
        raise RecordingError(
            f"{path.name}: can't be read as a pickle",
            why=f"{type(error).__name__}: {error}",
            fix="copy the file again from its source, or exclude it in the site file",
        ) from error


class _Dtype:
    """A type of numbers or texts; what a pickle calls `numpy.dtype`."""

    __slots__ = ("_order", "code")

    def __init__(self, code: object, *more: object) -> None:
        # Python 2 may give the code as bytes, Python 3 as text.
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _NUMBERS_AND_TEXTS.match(text):
            raise _RefusedError(f"an array of the type {text!r}")
        self.code = text
        self._order: Literal["<", ">", "|", "="] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *parts = state
        if parts[:3] != [None, None, None] or order not in ("<", ">", "|", "="):
            raise _RefusedError("an array of a composed type")
        self._order = order

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self._order)


class _Array:
    """An array; what a pickle calls `numpy.ndarray`."""

    __slots__ = ("values",)
    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.values = _array(raw, dtype, shape, "F" if is_fortran else "C")


def _array(raw: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    """Bytes as an array in native byte order, in memory of its own."""
    content = raw.encode("latin-1") if isinstance(raw, str) else raw
    sizes = shape if isinstance(shape, tuple) and all(isinstance(each, int) and each >= 0 for each in shape) else None
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, _Dtype) or sizes is None:
        raise _RefusedError("an array that is built in an unknown way")
    kind = dtype.numpy
    if len(content) != math.prod(sizes) * kind.itemsize:
        raise ValueError(f"an array of shape {sizes} has {len(content)} bytes")
    values = np.frombuffer(content, kind) if kind.itemsize else np.zeros(math.prod(sizes), kind)
    return values.astype(kind.newbyteorder("=")).reshape(sizes, order="F" if order == "F" else "C")


class _Unpickler(pickle._Unpickler):
    """Python's machine with few names. Each is answered by a new object: no file can change one for the next."""

    def find_class(self, module: str, name: str) -> Any:
        def reconstruct(kind: object, *more: object) -> _Array:
            if kind is not _Array:
                raise _RefusedError("an array of another class")
            return _Array()

        def from_buffer(raw: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
            return _array(raw, dtype, shape, order)

        def scalar(dtype: object, raw: object) -> Any:
            return _array(raw, dtype, (), "C").item()

        def encode(text: str, encoding: str) -> bytes:
            if encoding not in ("latin1", "latin-1"):
                raise _RefusedError(f"the encoding {encoding!r}")
            return text.encode("latin-1")

        def no_bytes() -> bytes:
            return b""

        names: dict[tuple[str, str], type | Callable[..., Any]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            # How Python 3 writes bytes for Python 2.
            ("_codecs", "encode"): encode,
            ("__builtin__", "bytes"): no_bytes,
            **{(where, "_reconstruct"): reconstruct for where in _MULTIARRAY},
            **{(where, "scalar"): scalar for where in _MULTIARRAY},
            **{(where, "_frombuffer"): from_buffer for where in _NUMERIC},
        }
        if (module, name) not in names:
            raise _RefusedError(f"{module}.{name}")
        return names[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise _RefusedError("something outside the file")


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
    """The value with its arrays unpacked; each object once, however often it is referred to."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | bytearray | np.ndarray):
        return value
    if id(value) in done:
        if done[id(value)] is _RefusedError:
            raise _RefusedError("a container that holds itself")
        return done[id(value)]
    if depth > _DEEPEST:
        raise _RefusedError(f"containers more than {_DEEPEST} deep")
    done[id(value)] = _RefusedError
    done[id(value)] = found = _unpacked(value, done, depth + 1)
    return found


def _unpacked(value: Any, done: dict[int, Any], depth: int) -> Any:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {_plain(key, done, depth): _plain(each, done, depth) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_plain(each, done, depth) for each in value)
    raise _RefusedError(f"an object of the kind {type(value).__name__}")
