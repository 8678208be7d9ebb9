"""The ledger's file: SQLite (WAL, synchronous FULL), whose rows can only be added and carry the hash of the row before.

Tables:

- `chain`: number, written (UTC), kind, run, name, body (canonical JSON), previous, hash. `hash` is the sha256 of the
  canonical JSON of the seven other columns; `previous` is the hash of the row before.
- `members`: which patients (keyed hashes) a plan charges, by cohort. The row of `chain` that added them holds the
  sha256 of their sorted list.
- `replies`: the stored replies. The row of `chain` that announces one holds the sha256 of its stored bytes. A reply may
  be deleted once a `purged` row says so.

Triggers refuse every other change. They stop mistakes; who can write the file can drop them, and `verify` then finds
what was changed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bridge.files import sync_to_disk
from bridge.hashing import canonical_json, sha256_json
from client.audit import GENESIS
from client.errors import LedgerError

APPLICATION = 0x66626C67
"""SQLite's application_id of a ledger: 'fblg'."""

VERSION = 1

BUSY_SECONDS = 60.0

SCHEMA = (
    "CREATE TABLE chain (number INTEGER PRIMARY KEY, written TEXT NOT NULL, kind TEXT NOT NULL, run TEXT NOT NULL, "
    "name TEXT NOT NULL, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE members (plan INTEGER NOT NULL, cohort TEXT NOT NULL, patient TEXT NOT NULL, row INTEGER NOT NULL, "
    "PRIMARY KEY (plan, cohort, patient)) WITHOUT ROWID",
    "CREATE TABLE replies (row INTEGER PRIMARY KEY, content BLOB NOT NULL)",
    "CREATE INDEX chain_names ON chain (kind, run, name)",
    "CREATE UNIQUE INDEX plan_once ON chain (run) WHERE kind = 'plan'",
    "CREATE UNIQUE INDEX message_once ON chain (run, name) WHERE kind = 'begun'",
    "CREATE INDEX members_patients ON members (patient)",
    *(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END"
        for table, verb in (
            ("chain", "UPDATE"),
            ("chain", "DELETE"),
            ("members", "UPDATE"),
            ("members", "DELETE"),
            ("replies", "UPDATE"),
        )
    ),
    "CREATE TRIGGER replies_no_delete BEFORE DELETE ON replies WHEN NOT EXISTS (SELECT 1 FROM chain WHERE "
    "kind = 'purged' AND name = OLD.row) BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END",
)


@dataclass(frozen=True)
class Row:
    """One row of the chain; `body` is parsed."""

    number: int
    written: str
    kind: str
    run: str
    name: str
    body: dict[str, Any]
    previous: str
    hash: str

    @property
    def own_hash(self) -> str:
        """The hash that the row's content has."""
        return sha256_json(
            [self.number, self.written, self.kind, self.run, self.name, self.body, self.previous],
        )


@dataclass(frozen=True)
class Head:
    """Where the chain ends: the number of its last row, and that row's hash. `(0, GENESIS)`: an empty one."""

    number: int
    hash: str


class Store:
    """An open ledger file. Every `sqlite3` error leaves as a `LedgerError`; nothing is ever half-written."""

    def __init__(self, path: Path) -> None:
        """Open an existing file; raises `LedgerError` where it is none of this schema."""
        self.path = path
        with self.guarded():
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None
            )
            try:
                self._check_kind()
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.execute("PRAGMA secure_delete = ON")
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self.guarded():
            self._database.close()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what SQLite says into a `LedgerError`."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise unusable(self.path, str(error)) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that holds the only write lock from its start: all of the block is on disk, or nothing."""
        with self.guarded():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A transaction that sees one state of the file throughout."""
        with self.guarded():
            self._database.execute("BEGIN")
            try:
                yield
            finally:
                self._database.execute("ROLLBACK")

    def append(self, kind: str, run: str, name: str, body: dict[str, Any]) -> Head:
        """Add a row to the chain, inside `writing`; returns the new head."""
        head = self.head()
        written = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = Row(head.number + 1, written, kind, run, name, body, head.hash, "")
        self._database.execute(
            "INSERT INTO chain VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row.number, written, kind, run, name, canonical_json(body).decode(), head.hash, row.own_hash),
        )
        return Head(row.number, row.own_hash)

    def execute(self, statement: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        with self.guarded():
            return self._database.execute(statement, tuple(values)).fetchall()

    def insert_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each row, inside `writing`."""
        self._database.executemany(statement, rows)

    def head(self) -> Head:
        """The end of the chain."""
        found = self.execute("SELECT number, hash FROM chain ORDER BY number DESC LIMIT 1")
        return Head(*found[0]) if found else Head(0, GENESIS)

    def rows(self, where: str = "1", values: Iterable[Any] = ()) -> list[Row]:
        """Rows of the chain in their order. Raises `LedgerError` where one is no longer what a ledger writes."""
        return [self._row(each) for each in self.execute(f"SELECT * FROM chain WHERE {where} ORDER BY number", values)]

    def last(self, where: str, values: Iterable[Any] = ()) -> Row | None:
        """The newest row of the chain that fits, or None."""
        found = self.execute(f"SELECT * FROM chain WHERE {where} ORDER BY number DESC LIMIT 1", values)
        return self._row(found[0]) if found else None

    def _row(self, values: tuple[Any, ...]) -> Row:
        number, written, kind, run, name, body, previous, hash_ = values
        try:
            parsed = json.loads(body)
        except (ValueError, TypeError):
            parsed = None
        if not isinstance(parsed, dict):
            raise broken(self.path, number, "its body is no JSON object")
        return Row(number, written, kind, run, name, parsed, previous, hash_)

    def _check_kind(self) -> None:
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise unusable(self.path, "it is a file of another program")
        if version != VERSION:
            raise unusable(self.path, f"its version is {version}, this fedbridge reads version {VERSION}")


def create_store(path: Path, body: dict[str, Any]) -> None:
    """Write a new ledger file with one row, of kind `opened`, whole or not at all. The caller holds the set-up lock;
    there is no such file yet. Raises `LedgerError`."""
    partial = path.with_name(f".{path.name}.new")
    store = object.__new__(Store)
    store.path = path
    with store.guarded():
        for left in (partial, *_companions(partial), *_companions(path)):
            left.unlink(missing_ok=True)
        # Owner only: the chain tells when the site took part in what.
        partial.touch(mode=0o600)
        store._database = sqlite3.connect(partial, isolation_level=None)
        try:
            store._database.execute("PRAGMA journal_mode = WAL")
            store._database.execute("PRAGMA synchronous = FULL")
            with store.writing():
                for statement in SCHEMA:
                    store._database.execute(statement)
                store.append("opened", "", "", body)
                store._database.execute(f"PRAGMA application_id = {APPLICATION}")
                store._database.execute(f"PRAGMA user_version = {VERSION}")
        finally:
            store._database.close()
        sync_to_disk(partial)
        partial.rename(path)
        sync_to_disk(path.parent)


def _companions(path: Path) -> tuple[Path, Path]:
    """The files that SQLite keeps beside an open one."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def unusable(path: Path, why: str) -> LedgerError:
    """The error of a file that can't be read or written."""
    return LedgerError(
        f"{path}: the privacy ledger can't be used",
        why=why,
        fix="free space, correct the permissions, or restore ledger, key file and audit log from their newest backup; "
        "until then the site answers nothing under a private mechanism",
    )


def broken(path: Path, number: int, why: str) -> LedgerError:
    """The error of a row that is not as it was written."""
    return LedgerError(
        f"{path}: row {number} of the ledger is not as it was written",
        why=why,
        fix="keep the file as evidence and restore the newest backup; a ledger that was changed proves nothing",
    )
