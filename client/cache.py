"""A content-keyed cache on disk: what was computed once is memory-mapped by every later process.

An entry is a folder `<first two digits of the key>/<key>` with one `.npy` an array and `entry.json`, which holds plain
values and, for each array, its size, modification time and sha256. It is written to a temporary folder beside its
place and renamed, so an entry is whole or absent: a process killed half way leaves a temporary folder that is swept
later, and of two processes that write the same entry one wins and the other drops its own. An entry whose files are
not as recorded is deleted and computed again. Deleting what another process has mapped is safe: its pages stay.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from bridge.hashing import sha256_file
from client.errors import CacheError
from client.mapping import mapped

log = logging.getLogger("fedbridge.site")

ENTRY = "entry.json"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 24 * 3600
_RESCAN_EVERY = 64
_GIGABYTE = 10**9


@dataclass(frozen=True)
class Entry:
    """One entry: plain JSON values and memory-mapped, read-only arrays."""

    values: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


@dataclass
class Cache:
    """The entries below `folder`, together at most `max_gigabytes`; beyond it, the least recently used are deleted."""

    folder: Path
    max_gigabytes: float
    _bytes: int | None = field(default=None, init=False)
    _puts: int = field(default=0, init=False)
    _opened: float = field(default_factory=time.time, init=False)
    _warned: bool = field(default=False, init=False)

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None where there is none, or a damaged one (it is deleted, and the log says so)."""
        place = self._place(key)
        try:
            entry = _read(place)
        except FileNotFoundError:
            if not place.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("cache entry %s is damaged (%s) and is computed again", key[:16], error)
        else:
            _touch(place / ENTRY)
            return entry
        _delete(place)
        return None

    def put(self, key: str, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Entry:
        """Store an entry and return it as `get` would. Raises `CacheError` and leaves nothing half-written."""
        return self._put(key, values, _whole(arrays), iter([arrays]))

    def put_parts(
        self, key: str, values: Mapping[str, Any], rows: int, parts: Iterable[Mapping[str, NDArray[Any]]]
    ) -> Entry:
        """As `put`, from parts that are written one after the other, so that the entry never lies in memory whole.

        The parts hold the same arrays, with `rows` rows in all.
        """
        waiting = iter(parts)
        first = next(waiting)
        forms = {name: _Form(array.dtype, (rows, *array.shape[1:])) for name, array in first.items()}
        return self._put(key, values, forms, itertools.chain([first], waiting))

    def _put(
        self,
        key: str,
        values: Mapping[str, Any],
        forms: Mapping[str, _Form],
        parts: Iterator[Mapping[str, NDArray[Any]]],
    ) -> Entry:
        size = sum(form.bytes for form in forms.values())
        if size > self._limit:
            raise CacheError(
                f"one cache entry needs {size / _GIGABYTE:.3f} GB",
                why=f"cache.max_gigabytes is {self.max_gigabytes:g}",
                fix="raise it in the site file",
            )
        place = self._place(key)
        temporary = place.with_name(f"{_TEMPORARY}{uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            _write(temporary, values, forms, parts)
            # Mapped before it is in place: another process may make room right after and delete it.
            entry = _read(temporary)
            _move(temporary, place)
        except OSError as error:
            raise CacheError(
                f"{self.folder}: the feature cache can't be written",
                why=f"{error.strerror or error}; the entry has {size / _GIGABYTE:.3f} GB",
                fix="free space, correct the permissions, or name another cache.folder in the site file",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._make_room(size, keep=place)
        return entry

    def sweep(self) -> int:
        """Delete what killed processes left half-written over a day ago; return how many folders."""
        old = [path for path in self.folder.glob(f"*/{_TEMPORARY}*") if _age(path) > _STALE_SECONDS]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return len(old)

    def delete(self, values: Mapping[str, Any]) -> int:
        """Delete every entry that holds these values, half-written ones too; return how many there were."""
        found = [path.parent for path in self.folder.glob(f"??/*/{ENTRY}") if values.items() <= _values(path).items()]
        for place in found:
            _delete(place)
        self._bytes = None
        return len(found)

    def clear(self) -> int:
        """Delete everything, also what another process is writing just now; return how many entries there were."""
        count = self.delete({})
        for path in self.folder.glob(f"*/{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        return count

    @property
    def _limit(self) -> int:
        return int(self.max_gigabytes * _GIGABYTE)

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _make_room(self, added: int, keep: Path) -> None:
        """Delete the least recently used entries beyond the limit, down to nine tenths of it."""
        # Other processes write too: count again now and then, and always before anything is deleted.
        self._puts += 1
        if self._bytes is None or self._puts % _RESCAN_EVERY == 0:
            self._bytes = sum(size for _, size, _ in self._entries())
        else:
            self._bytes += added
        if self._bytes <= self._limit:
            return
        self.sweep()
        entries = sorted(self._entries())
        self._bytes = sum(size for _, size, _ in entries)
        for used, size, place in entries:
            if self._bytes <= 0.9 * self._limit:
                return
            if place != keep:
                if used > self._opened and not self._warned:
                    log.warning("cache.max_gigabytes is too small: entries of this very pass are deleted again")
                    self._warned = True
                _delete(place)
                self._bytes -= size

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes and folder of every entry."""
        found = []
        for place in self.folder.glob("??/*"):
            if place.name.startswith(_TEMPORARY):
                continue
            try:
                size = sum(file.stat().st_size for file in place.iterdir())
                found.append(((place / ENTRY).stat().st_mtime, size, place))
            except OSError:
                continue  # another process has just deleted it
        return found


@dataclass(frozen=True)
class _Form:
    """What an array will be once all its parts are written."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _whole(arrays: Mapping[str, NDArray[Any]]) -> dict[str, _Form]:
    return {name: _Form(array.dtype, array.shape) for name, array in arrays.items()}


def _write(
    folder: Path,
    values: Mapping[str, Any],
    forms: Mapping[str, _Form],
    parts: Iterator[Mapping[str, NDArray[Any]]],
) -> None:
    paths = {name: folder / f"{name}.npy" for name in forms}
    with ExitStack() as open_files:
        files = {name: open_files.enter_context(path.open("wb")) for name, path in paths.items()}
        for name, form in forms.items():
            header = {
                "descr": np.lib.format.dtype_to_descr(form.dtype),
                "fortran_order": False,
                "shape": form.shape,
            }
            np.lib.format.write_array_header_1_0(files[name], header)
        for part in parts:
            for name, array in part.items():
                files[name].write(np.ascontiguousarray(array).data)  # numpy's own writing hides that the disk is full
    stamps = {}
    for name, path in paths.items():
        status = path.stat()
        stamps[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256_file(path)}
    text = json.dumps({"values": values, "arrays": stamps}, ensure_ascii=False, allow_nan=False)
    (folder / ENTRY).write_text(text, encoding="utf-8")


def _read(folder: Path) -> Entry:
    index = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    arrays = {name: _open(folder / f"{name}.npy", stamp) for name, stamp in index["arrays"].items()}
    return Entry(index["values"], arrays)


def _values(path: Path) -> dict[str, Any]:
    """The plain values of an entry's file; none where another process has just deleted it, or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


def _open(path: Path, stamp: Mapping[str, Any]) -> NDArray[Any]:
    """One array, memory-mapped; raises `ValueError` where it is not the one that was written."""
    status = path.stat()
    if status.st_size != stamp["bytes"]:
        raise ValueError(f"{path.name} has {status.st_size} bytes, not {stamp['bytes']}")
    # Hashing every byte at each opening would read what the map leaves on disk; an untouched file needs no second look.
    if status.st_mtime_ns != stamp["mtime_ns"] and sha256_file(path) != stamp["sha256"]:
        raise ValueError(f"{path.name} was changed")
    return mapped(path)


def _move(temporary: Path, place: Path) -> None:
    """Rename into place; where a whole entry is there already, another process was faster and has the same content."""
    try:
        temporary.rename(place)
    except OSError:
        if not (place / ENTRY).exists():
            raise


def _delete(place: Path) -> None:
    """Take an entry out of sight in one step, then delete its files."""
    grave = place.with_name(f"{_TEMPORARY}{uuid4().hex}")
    try:
        place.rename(grave)
    except OSError:
        return  # another process has just deleted it
    shutil.rmtree(grave, ignore_errors=True)


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        return  # a read-only cache folder, or an entry just deleted, is still a good answer


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
