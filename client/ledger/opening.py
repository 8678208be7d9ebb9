"""Opening a site's ledger: made once with its key, and afterwards refused wherever it is not the newest one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from client.audit import AuditLog
from client.errors import LedgerError
from client.ledger.store import Head, Store, broken, create_store, unusable
from client.vault import Vault, create_key, read_key

if TYPE_CHECKING:
    from client.site import Site

SETUP_SECONDS = 60.0


def open_store(site: Site, audit: AuditLog) -> tuple[Store, Vault]:
    """The ledger's file and the key that belongs to it; new ones where there was never one. Raises as `Ledger.open`."""
    path, known = site.ledger_path, known_head(audit)
    with _setting_up(site):
        if not path.exists():
            _refuse_lost(site, known)
            if not site.key_path.exists():
                create_key(site.key_path)
            create_store(path, {"key": read_key(site.key_path).check})
    vault, store = read_key(site.key_path), Store(path)
    try:
        _check_opened(store, vault, known)
    except BaseException:
        store.close()
        raise
    return store, vault


def exists(site: Site) -> bool:
    """Whether the site has a ledger, or the audit log knows that it should have one."""
    return site.ledger_path.exists() or known_head(AuditLog(site.audit_path)) is not None


def known_head(audit: AuditLog) -> Head | None:
    """The newest head of the ledger that the audit log knows."""
    found = audit.newest("ledger")
    return None if found is None else Head(found.shape[0], found.sha256)


@contextmanager
def _setting_up(site: Site) -> Iterator[None]:
    path = site.ledger_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=SETUP_SECONDS):
            yield
    except (OSError, Timeout) as error:
        if isinstance(error, Timeout):
            raise unusable(path, f"another process has been setting it up for {SETUP_SECONDS:g} s") from error
        raise unusable(path, error.strerror or str(error)) from error


def _refuse_lost(site: Site, known: Head | None) -> None:
    if known is not None:
        raise LedgerError(
            f"{site.ledger_path}: the privacy ledger is gone",
            why=f"the audit log {site.audit_path} knows its row {known.number}",
            fix="restore ledger and key file; a new ledger would give every patient a fresh budget",
        )


def _check_opened(store: Store, vault: Vault, known: Head | None) -> None:
    """The cheap checks: the key, the last row, and the head that the audit log knows."""
    first, last = store.last("number = 1"), store.last("1")
    if first is None or last is None or first.kind != "opened":
        raise broken(store.path, 1, "it does not open a ledger")
    if first.body["key"] != vault.check:
        raise LedgerError(
            f"{store.path}: the ledger was written with another key",
            why="its patients would not be known again",
            fix="restore the key file that belongs to it",
        )
    if last.own_hash != last.hash:
        raise broken(store.path, last.number, "its content does not hash to its own hash")
    if known is None:
        return
    there = store.last("number = ?", (known.number,))
    if there is None:
        raise LedgerError(
            f"{store.path}: the ledger is an old copy, or rows were removed",
            why=f"it ends at row {last.number}; the audit log knows row {known.number}",
            fix="restore the newest ledger: an old one does not know what was spent since",
        )
    if there.hash != known.hash:
        raise broken(store.path, known.number, "the audit log knows another row in its place")
