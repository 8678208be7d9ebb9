"""How often each question of a study was answered: counted before any data is touched, and never beyond the study.

The count is a row in SQLite, on disk before the work begins. A process killed afterwards has used its turn up.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bridge.messages import ReasonCode
from client.errors import NotAcceptedError
from client.site import Site
from client.study.record import Accepted

ALLOWANCE = "allowance.sqlite"
BUSY_SECONDS = 60.0

_TABLE = (
    "CREATE TABLE IF NOT EXISTS taken (study TEXT NOT NULL, question TEXT NOT NULL, times INTEGER NOT NULL, "
    "PRIMARY KEY (study, question)) WITHOUT ROWID"
)
_ADD = (
    "INSERT INTO taken VALUES (?, ?, 1) ON CONFLICT (study, question) DO UPDATE SET times = times + 1 WHERE times < ?"
)


@dataclass(frozen=True)
class Question:
    """What makes two messages the same question, whatever positions or bridge they carry."""

    message: str
    round: int | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """As it is counted and shown."""
        where = [] if self.round is None else [f"round {self.round}"]
        return " ".join([self.message, *where, *([self.split] if self.split else [])])


def take(site: Site, study: Accepted, question: Question) -> None:
    """Use up one of the study's `attempts` for a question; on disk when it returns.

    Raises `NotAcceptedError`: ASKED_TOO_OFTEN where none is left, STORAGE where the count can't be written, and
    STUDY_UNUSABLE where its file is damaged.
    """
    path, attempts = site.studies_folder / ALLOWANCE, study.manifest.attempts
    with _writing(path) as database:
        added = database.execute(_ADD, (study.sha256, question.name, attempts)).rowcount
    if not added:
        raise NotAcceptedError(
            ReasonCode.ASKED_TOO_OFTEN,
            f"'{question.name}' of the study '{study.id}' was asked once too often",
            why=f"the study says that it is answered {attempts} times, over all runs",
            fix="nothing, if the coordinator did not say why; else accept a study with more attempts",
        )


def taken(site: Site, study: Accepted) -> dict[str, int]:
    """How often each question of a study was answered or begun, by its name. Raises as `take`."""
    path = site.studies_folder / ALLOWANCE
    if not path.exists():
        return {}
    # Not 'ro': what a killed process left half-written is taken back first.
    address = f"{path.absolute().as_uri()}?mode=rw"
    with _guarded(path), closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'taken'").fetchone():
            return {}
        rows = database.execute("SELECT question, times FROM taken WHERE study = ? ORDER BY question", (study.sha256,))
        return dict(rows.fetchall())


@contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction that holds the only write lock from its start, in a file that is made where there is none."""
    with _guarded(path), closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")
        database.execute(_TABLE)
        yield database
        database.execute("COMMIT")  # closing without it takes everything back


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn what SQLite says into a `NotAcceptedError`."""
    try:
        yield
    except sqlite3.Error as error:
        full = isinstance(error, sqlite3.OperationalError)
        raise NotAcceptedError(
            ReasonCode.STORAGE if full else ReasonCode.STUDY_UNUSABLE,
            f"{path}: the count of what was answered can't be used",
            why=str(error),
            fix="free space or correct the permissions" if full else "restore the file from a backup",
        ) from error
