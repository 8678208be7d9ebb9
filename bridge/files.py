"""Files that are there whole or not at all, whatever is killed when."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bridge.errors import ConfigError


def cause(error: OSError) -> str:
    """What the system said, for the `why` of an error; of a copied folder that failed, its first file's."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def require_free(path: Path) -> None:
    """Raises `ConfigError` where there is something of that name, if only a link to nothing."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already", why="nothing is overwritten", fix="name another folder, or move it")


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """An open file that takes the name `path` when the block has ended well, in one rename, and is gone otherwise.

    `sync` puts its content on the disk first: against a power cut, where a kill alone needs none. Raises `OSError`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, *, sync: bool = False) -> None:
    """Write a file, text as UTF-8, in one rename. Raises `OSError`; then what was there before is there still."""
    with whole_file(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name when the block has ended well, in one rename, and is gone otherwise.

    Its maker alone may read it, unless the block changes that. Folders above are made. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_to_disk(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
