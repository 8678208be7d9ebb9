"""Reading a whole ledger against itself: the chain, the charges, the patients, the replies, and the audit log."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from bridge.hashing import canonical_json, sha256_json
from client.audit import GENESIS, AuditLog, Line
from client.errors import LedgerError
from client.ledger.book import Ledger, place
from client.ledger.plan import counts
from client.ledger.store import SCHEMA, Head, Row, Store, broken, unusable


@dataclass(frozen=True)
class Verified:
    """What a sound ledger holds. `lost` messages were charged and have no reply."""

    head: Head
    plans: int
    messages: int
    lost: int
    withdrawn: int


def verify(ledger: Ledger, audit: AuditLog) -> Verified:
    """Check every row. Raises `LedgerError` that names the first one that was changed, removed, moved or inserted, and
    `AuditError` where the audit log itself was tampered with.
    """
    store = ledger.store
    # The audit log first: what other processes book meanwhile is then in the ledger, and not the other way round.
    lines = audit.verify()
    with store.reading():
        _check_file(store)
        rows = store.rows()
        _check_chain(store, rows)
        _check_members(store, rows)
        _check_charges(store, rows)
        _check_replies(ledger, rows)
        _check_heads(store, rows, lines)
    kinds = Counter(row.kind for row in rows)
    head = Head(rows[-1].number, rows[-1].hash)
    return Verified(head, kinds["plan"], kinds["begun"], kinds["begun"] - kinds["answered"], kinds["forgotten"])


def _check_file(store: Store) -> None:
    """SQLite's own check, and the tables and triggers as they were made."""
    (found,) = store.execute("PRAGMA quick_check(1)")[0]
    if found != "ok":
        raise unusable(store.path, f"the file is damaged: {found}")
    there = {sql for (sql,) in store.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if there != set(SCHEMA):
        raise LedgerError(
            f"{store.path}: the ledger's tables are not as they were made",
            why="a table, index or trigger was added, changed or dropped",
            fix="keep the file as evidence and restore the newest backup",
        )


def _check_chain(store: Store, rows: list[Row]) -> None:
    bodies = dict(store.execute("SELECT number, body FROM chain"))
    previous = GENESIS
    for expected, row in enumerate(rows, start=1):
        if row.number != expected or row.previous != previous:
            why = "it does not follow the row before it: rows were removed, moved or inserted"
            raise broken(store.path, row.number, why)
        if row.own_hash != row.hash or canonical_json(row.body).decode() != bodies[row.number]:
            raise broken(store.path, row.number, "its content does not hash to its own hash: it was changed")
        previous = row.hash


def _check_members(store: Store, rows: list[Row]) -> None:
    """Every patient was added by a row that says so, and by none else."""
    there: dict[tuple[int, int, str], list[str]] = {}
    for plan, cohort, patient, row in store.execute("SELECT plan, cohort, patient, row FROM members ORDER BY patient"):
        there.setdefault((row, plan, cohort), []).append(patient)
    for row in rows:
        if row.kind in ("plan", "joined"):
            for cohort, digest in row.body["members"].items():
                patients = there.pop((row.number, row.body.get("plan", row.number), cohort), [])
                if digest != {"count": len(patients), "sha256": sha256_json(patients)}:
                    raise broken(store.path, row.number, f"the {cohort} patients that it charges were changed")
    if there:
        row_number = min(there)[0]
        raise broken(store.path, row_number, "patients were added to it later")


def _check_charges(store: Store, rows: list[Row]) -> None:
    """The running sums of each run are those of its messages, and within its plan."""
    reserved: dict[str, Counter[str]] = {}
    drawn: dict[str, Counter[str]] = {}
    for row in rows:
        if row.kind == "plan":
            reserved[row.run] = counts(row.body["releases"])
        if row.kind == "begun":
            drawn[row.run] = drawn.get(row.run, Counter()) + counts(row.body["releases"])
            if drawn[row.run] != row.body["drawn"] or not drawn[row.run] <= reserved.get(row.run, Counter()):
                raise broken(store.path, row.number, "its charge does not fit its run's plan")


def _check_replies(ledger: Ledger, rows: list[Row]) -> None:
    """Every reply is the announced one, can be opened, and is missing only where a row says why."""
    store = ledger.store
    purged = {int(row.name) for row in rows if row.kind == "purged"}
    announced = {row.body["begun"]: row for row in rows if row.kind == "answered"}
    there = {number for (number,) in store.execute("SELECT row FROM replies")}
    for number, row in announced.items():
        if number not in there:
            if number not in purged:
                raise broken(store.path, row.number, "the reply that it announces is gone")
            continue
        ((content,),) = store.execute("SELECT content FROM replies WHERE row = ?", (number,))
        if hashlib.sha256(content).hexdigest() != row.body["sha256"]:
            raise broken(store.path, row.number, "the stored reply is not the one that it announces")
        if row.body["sealed"]:
            ledger.vault.unseal(content, place(number))
    if strangers := there - set(announced):
        raise broken(store.path, min(strangers), "a reply is stored that no row announces")


def _check_heads(store: Store, rows: list[Row], lines: list[Line]) -> None:
    """Every head that the audit log was told is in the chain."""
    for line in lines:
        if line.entry.event == "ledger":
            (number,) = line.entry.shape
            if number > len(rows):
                raise broken(store.path, number, f"it is gone; line {line.number} of the audit log knows it")
            if rows[number - 1].hash != line.entry.sha256:
                raise broken(store.path, number, f"line {line.number} of the audit log knows another row in its place")
