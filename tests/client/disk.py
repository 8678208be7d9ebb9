"""Real file systems that are soon full, or can only be read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MB at `folder`; skips where this machine may not mount one."""
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("mounting a small file system needs rights that this machine does not give")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


_REMOUNT_READ_ONLY_BIND = 32 | 1 | 4096
"""MS_REMOUNT | MS_RDONLY | MS_BIND of mount(2)."""


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder can only be read, by root too, while the block lasts; skips where this machine may not mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = str(folder).encode()
    if libc.mount(place, place, None, 4096, None) != 0:
        pytest.skip("mounting a folder read-only needs rights that this machine does not give")
    try:
        if libc.mount(None, place, None, _REMOUNT_READ_ONLY_BIND, None) != 0:
            pytest.skip("mounting a folder read-only needs rights that this machine does not give")
        yield
    finally:
        libc.umount2(place, 2)
