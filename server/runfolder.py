"""The run folder: may this run write here, and does it go on or begin?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bridge.job import Job
from server.checkpoint import Checkpoint, changed_config, newest_checkpoint
from server.errors import ResumeError, RunFolderError
from server.events import LOG
from server.record import RUN_JSON, RunRecord, read_record
from server.releases import RELEASES

BRIDGE, CHECKPOINTS = "bridge", "checkpoints"
_LOCK = ".lock"
_LOCK_SECONDS = 1.0
"""Whoever asks whether a run is alive (`is_held`) holds its lock for an instant."""


@contextmanager
def opened(folder: Path, resume: bool) -> Iterator[Path]:
    """The folder, ready to be written and held by this process alone.

    Raises `RunFolderError` where it can't be written, holds a run already (and this is no resume), or another process
    runs in it; `ResumeError` where there is nothing to resume.
    """
    if resume and not folder.is_dir():
        raise ResumeError(f"{folder}: nothing to resume", why="there is no such folder", fix="start the run first")
    if not resume and (taken := next((name for name in _CONTENT if (folder / name).exists()), None)):
        raise RunFolderError(
            f"{folder}: already holds a run",
            why=f"it has {taken}{_status(folder)}",
            fix="resume it, or name another folder",
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        probe = folder / f".write.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise RunFolderError(
            f"{folder}: another process runs here", why=f"{_LOCK} is held", fix="wait for it or end it, then resume"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{folder}: the run folder can't be written", why=error.strerror or "", fix="name a writable folder"
        ) from error
    try:
        sweep(folder)
        yield folder
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process runs in the folder now. Raises `RunFolderError` where that can't be found out."""
    if not (folder / _LOCK).exists():
        return False
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError as error:
        raise RunFolderError(
            f"{folder / _LOCK}: can't be opened", why=error.strerror or "", fix="correct the permissions"
        ) from error
    lock.release()
    return False


def holds_a_run(folder: Path) -> bool:
    """Whether a run has left anything there."""
    return any((folder / name).exists() for name in _CONTENT)


_CONTENT = (RUN_JSON, CHECKPOINTS, RELEASES, BRIDGE, LOG)


def sweep(folder: Path) -> None:
    """Remove half-written files of a process that was killed."""
    for pattern in (f".{RUN_JSON}.*", f"{CHECKPOINTS}/.round-*", f"{RELEASES}/.*", ".write.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def where_it_stands(folder: Path, job: Job, job_sha256: str) -> tuple[Checkpoint | None, list[str], bool]:
    """For a resume: the checkpoint to go on from (None: begin), damaged ones passed over, and whether all is done.

    Raises `ResumeError` where the folder's run had another job, naming the keys that differ.
    """
    record = _record(folder)
    if record is not None and record.config != (config := job.model_dump(mode="json", by_alias=True)):
        keys = ", ".join(_differences(record.config, config))
        raise changed_config(folder, f"; other values at: {keys}")
    checkpoint, damaged = newest_checkpoint(folder / CHECKPOINTS, job_sha256)
    done = record is not None and record.status == "completed"
    return checkpoint, damaged, done


def _record(folder: Path) -> RunRecord | None:
    return read_record(folder) if (folder / RUN_JSON).exists() else None


def _status(folder: Path) -> str:
    try:
        record = _record(folder)
    except RunFolderError:
        return ""
    return f" (status {record.status})" if record else ""


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted keys at which two configurations differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [path] if old != new else []
    keys = [*old, *(key for key in new if key not in old)]
    return [
        found
        for key in keys
        for found in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    ]
