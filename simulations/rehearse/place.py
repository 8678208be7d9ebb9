"""Where a rehearsal works: a folder beside OUT that nobody else may read, gone when the rehearsal ends, however.

It holds what is computed from patients' recordings. A killed rehearsal is cleaned up after by a small process that
waits for its end, and should that be killed too, by the next rehearsal into the same parent folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.files import cause
from server.errors import RunFolderError

_SUFFIX = ".rehearsing"
_TIDY = """
import shutil, sys, time
sys.stdin.read()
for _ in range(20):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    time.sleep(0.25)
"""
"""Ends when the rehearsal has; a process that it had started may still write for a moment."""


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A working folder for as long as the block lasts. Its folder `out` takes the name OUT when the block ends well.

    Raises `RunFolderError` where OUT holds something, can't be written, or another rehearsal makes it.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link is kept as the user named it
    check_free(out)
    place = out.parent / f".{out.name}{_SUFFIX}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(out.parent)
        place.mkdir(mode=0o700)
    except OSError as error:
        if isinstance(error, FileExistsError) and place.exists():
            raise RunFolderError(f"{out}: another rehearsal makes it", why=f"it works in {place}") from error
        raise _unwritable(out, error) from error
    with _held(place), _tidied(place):
        try:
            (place / "out").mkdir(mode=0o700)
            yield place
            if out.exists():
                out.rmdir()
            (place / "out").rename(out)
        except OSError as error:
            raise _unwritable(out, error) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raise `RunFolderError` unless OUT is not there or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"{out}: is not an empty folder",
            why="a rehearsal is written into a folder of its own",
            fix="name another --out, or remove it",
        )


def _remove_left_over(parent: Path) -> None:
    """Working folders that nobody holds any more; those of other users stay."""
    for place in parent.glob(f".*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place)
            finally:
                os.close(descriptor)


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """The lock by which another rehearsal sees that this one lives; the system drops it with the process."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _tidied(place: Path) -> Iterator[None]:
    """A process of its own that removes the folder once this one has gone."""
    command = [sys.executable, "-I", "-c", _TIDY, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def _unwritable(out: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{out}: can't be written", why=cause(error), fix="free space or choose a writable --out")
