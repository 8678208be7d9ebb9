"""A `.npy` file in memory without a file descriptor that stays open: a site may have thousands of recordings.

Python's own `mmap` keeps a duplicate of the descriptor for as long as the map lives (until 3.13), so that a thousand
recordings reach the usual limit of open files. The map itself needs none.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL = 1 << 16
"""Bytes up to which a file is read at once: a map costs at least a page, and a place in the kernel's list."""

_FAILED = ctypes.c_void_p(-1).value


def mapped(path: Path) -> NDArray[Any]:
    """The read-only array of a `.npy` file; pages come when they are looked at. Raises `OSError`, `ValueError`."""
    size = path.stat().st_size
    if size <= SMALL or sys.platform == "win32":
        array: NDArray[Any] = np.load(path, mmap_mode=None if size <= SMALL else "r", allow_pickle=False)
        array.flags.writeable = False
        return array
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} is not as the cache writes it")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            raise ValueError(f"{path.name} is not as the cache writes it")
        start = file.tell()
        if size - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path.name} is cut short")
        content = _map(file.fileno(), size)
    array = np.frombuffer(memoryview(content).cast("B"), dtype, math.prod(shape), start).reshape(shape)
    array.flags.writeable = False
    return array


def _map(descriptor: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """The first `size` bytes of an open file; given back when nothing refers to them any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    content = (ctypes.c_char * size).from_address(address)
    weakref.finalize(content, libc.munmap, address, size)
    return content
