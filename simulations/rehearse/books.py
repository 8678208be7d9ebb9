"""Copies of a site's audit log, ledger and key, taken without changing, locking or marking anything at the site."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from bridge.files import cause
from client.site import Site
from simulations.errors import RehearsalError

_ATTEMPTS = 5


def copy_books(site: Site, copy: Site) -> None:
    """Copy what there is, under the names that `copy` has for it.

    The audit log first: a ledger may know more than the log, never less. Raises `RehearsalError` where they can't be
    read, or the site writes its ledger all the time.
    """
    try:
        _copy_audit(site.audit_path, copy.audit_path)
        _copy_ledger(site.ledger_path, copy.ledger_path)
        if site.key_path.exists():
            shutil.copy(site.key_path, copy.key_path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = cause(error) if isinstance(error, OSError) else "the audit log's head is damaged"
        raise RehearsalError(
            f"{site.folder}: audit log and ledger can't be read",
            why=why,
            fix="run this as the user that runs the site, and check them with `fedbridge-site audit verify`",
        ) from error


def _copy_audit(source: Path, target: Path) -> None:
    """The log as far as its head knows it. It only grows, so these bytes are there and stay."""
    head = source.with_name(source.name + ".head")
    if not head.exists():
        return
    content = head.read_bytes()
    target.with_name(target.name + ".head").write_bytes(content)
    with source.open("rb") as file:
        target.write_bytes(file.read(int(json.loads(content)["bytes"])))


def _copy_ledger(source: Path, target: Path) -> None:
    """The database and its write-ahead log, once both stood still while they were copied."""
    files = [source, source.with_name(source.name + "-wal")]
    for _ in range(_ATTEMPTS):
        before = [_state(file) for file in files]
        for file in files:
            copied = target.with_name(target.name + file.name.removeprefix(source.name))
            copied.unlink(missing_ok=True)
            if file.exists():
                shutil.copy(file, copied)
        if [_state(file) for file in files] == before:
            return
    raise OSError(None, "the site is answering messages and writes its ledger; try again later")


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - one call, so that size and time belong together
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
