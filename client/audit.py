"""The audit log of what left a site: hash-chained JSON lines that are on disk before a reply leaves.

Each line holds `when` (UTC), `run`, `round` (null outside rounds), `message`, `event`, `item`, `shape`, `bytes`,
`sha256` (of the item's content), `purpose`, `prev` (the hash of the line before) and `hash` (of the line without it).
The events: `sent` (an item of a reply), `refused` (a message that was answered by a reason code alone), `ledger` (the
head of the privacy ledger after a charge: `shape` holds the number of its last row, `sha256` that row's hash),
`withdrawn` (a patient, by keyed hash in `sha256`), `accepted` and `left` (a study: `run` is its id, `sha256` its hash,
`purpose` who and which code), `fitted` (a task head or model on this site's patients: `item` says which, `sha256` is
its digest, `bytes` the size of its weights) and `repaired` (see below).

Beside the log lies its head (`<log>.head`: lines, bytes, hash), so that removing the last lines is found too. Whoever
can write both files can forge both; a hospital that fears that copies the head elsewhere.

A process killed in the middle of an append leaves lines that the head doesn't know yet, and perhaps a torn one.
Neither was followed by a reply. The next append keeps whole lines, leaves the torn text where it is and writes a
`repaired` entry after it that names its size and sha256. `verify` accepts torn text there and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from bridge.files import sync_to_disk, write_whole
from bridge.hashing import canonical_json, sha256_json
from client.errors import AuditError

GENESIS = "0" * 64
"""`prev` of the first line."""

LOCK_SECONDS = 60.0

TAIL_BYTES = 65_536

Event = Literal["sent", "refused", "ledger", "withdrawn", "accepted", "left", "fitted", "repaired"]


@dataclass(frozen=True)
class Entry:
    """What one line tells, without its place in the chain."""

    run: str
    message: str
    purpose: str
    event: Event = "sent"
    round: int | None = None
    item: str = ""
    shape: tuple[int, ...] = ()
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Line:
    """One verified line: where it stands, when it was written, what it tells, and its hash."""

    number: int
    when: str
    entry: Entry
    hash: str


@dataclass(frozen=True)
class Head:
    """Where the log ends: how many lines and bytes, and the last hash."""

    lines: int = 0
    bytes: int = 0
    hash: str = GENESIS


class AuditLog:
    """The log at `path`; any number of processes may append at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head_path = path.with_name(path.name + ".head")

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries, all or none, and return only when they are on disk.

        Raises `AuditError` where the log can't be written, or lines that the head knows are missing or changed: a site
        whose log was tampered with answers nothing more.
        """
        try:
            with self._locked():
                head, text, marks = self._resume()
                for entry in (*marks, *entries):
                    line, last = _line(entry, head.hash)
                    text += line
                    head = Head(head.lines + 1, head.bytes + len(line), last)
                self._write(text, head)
        except OSError as error:
            raise AuditError(
                f"{self.path}: the audit log can't be written",
                why=error.strerror or "",
                fix="free space or correct the permissions; nothing leaves until it can be written",
            ) from error

    def verify(self) -> list[Line]:
        """Every line, checked against its hash, the line before and the head.

        Raises `AuditError` that names the first line that was changed, removed, moved or inserted.
        """
        if not self.path.exists() and not self._head_path.exists():
            return []
        try:
            with self._locked():
                head = self._read_head()
                data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise AuditError(f"{self.path}: the audit log can't be read", why=error.strerror or "") from error
        lines, _ = _scan(self.path, data, Head())
        self._check_head(head, data)
        return lines

    def newest(self, event: Event) -> Entry | None:
        """The last entry of that event, found from the end without checking the lines before. Of several in the last
        64 KB, which processes may have written at once, the one with the largest shape. Raises `AuditError`."""
        needle = f'"event":"{event}"'.encode()
        found = self._from_the_end(lambda raw: needle in raw, lambda entry: entry.event == event)
        return max(found, key=lambda entry: entry.shape, default=None)

    def newest_of(self, run: str, events: Collection[Event]) -> Entry | None:
        """The last entry of that run that tells one of these events, found as `newest` does. Raises `AuditError`."""
        needles = [f'"event":"{event}"'.encode() for event in events]
        found = self._from_the_end(
            lambda raw: any(needle in raw for needle in needles),
            lambda entry: entry.run == run and entry.event in events,
        )
        return found[-1] if found else None

    def _from_the_end(self, looks: Callable[[bytes], bool], wanted: Callable[[Entry], bool]) -> list[Entry]:
        """The wanted entries in the shortest end of the log that holds one, among lines that look like one."""
        if not self.path.exists():
            return []
        try:
            size = self.path.stat().st_size
            for length in _lengthening(size):
                with self.path.open("rb") as file:
                    file.seek(size - length)
                    lines = [raw for raw in _split(file.read(length)) if looks(raw)]
                records = [record for record in map(_parse, lines) if record is not None]
                found = [entry for entry in (_as_line(0, record).entry for record in records) if wanted(entry)]
                if found:
                    return found
        except OSError as error:
            raise AuditError(f"{self.path}: the audit log can't be read", why=error.strerror or "") from error
        return []

    def _resume(self) -> tuple[Head, bytes, list[Entry]]:
        """The end of the log, the newline that a torn line lacks, and the entry that marks torn text."""
        head = self._read_head()
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == head.bytes:
            return head, b"", []
        if size < head.bytes:
            raise _shortened(self.path, head)
        with self.path.open("rb") as file:
            file.seek(head.bytes)
            tail = file.read()
        newline = b"" if tail.endswith(b"\n") else b"\n"
        tail += newline
        _, end = _scan(self.path, tail, head)
        torn = tail[end.bytes - head.bytes :]
        gap = Head(end.lines + torn.count(b"\n"), end.bytes + len(torn), end.hash)
        return gap, newline, [_repair(torn.rstrip(b"\n"))] if torn or newline else []

    def _write(self, text: bytes, head: Head) -> None:
        new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        write_whole(self._head_path, canonical_json(asdict(head)), sync=True)
        if new:
            sync_to_disk(self.path.parent)

    def _read_head(self) -> Head:
        if not self._head_path.exists():
            return Head()
        try:
            return Head(**json.loads(self._head_path.read_bytes()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise AuditError(
                f"{self._head_path}: is not the head of an audit log",
                why="it was changed by another program",
                fix="restore it from a backup, or move the log and its head aside and tell the coordinator",
            ) from error

    def _check_head(self, head: Head, data: bytes) -> None:
        """Lines beyond the head are those of a killed append; fewer than it knows, or others, were tampered with."""
        if len(data) < head.bytes:
            raise _shortened(self.path, head)
        _, end = _scan(self.path, data[: head.bytes], Head())
        if end.hash != head.hash or end.lines != head.lines:
            raise _broken(self.path, head.lines, f"{self._head_path.name} knows another line there")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(self.path.name + ".lock"), timeout=LOCK_SECONDS)
        try:
            with lock:
                yield
        except Timeout as error:
            raise AuditError(
                f"{self.path}: another process holds the audit log",
                why=f"waited {LOCK_SECONDS:g} s for its lock",
                fix="end the process that hangs",
            ) from error


@dataclass(frozen=True)
class Total:
    """How often an item left in a run, and how many bytes in sum."""

    run: str
    item: str
    purpose: str
    count: int
    bytes: int


def totals(lines: Iterable[Line]) -> tuple[list[Total], int]:
    """Sums by run and item in order of first appearance, and the number of refused messages."""
    sums: dict[tuple[str, str], Total] = {}
    refused = 0
    for line in lines:
        entry = line.entry
        refused += entry.event == "refused"
        if entry.event == "sent":
            key = (entry.run, entry.item)
            before = sums.get(key, Total(*key, entry.purpose, 0, 0))
            sums[key] = replace(before, count=before.count + 1, bytes=before.bytes + entry.bytes)
    return list(sums.values()), refused


_TAMPERED = "keep the file as evidence and restore the log and its head from a backup"

_KEYS = {field.name for field in fields(Entry)} | {"when", "prev", "hash"}


def _line(entry: Entry, prev: str) -> tuple[bytes, str]:
    """One line of text and its hash."""
    body: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(entry), "prev": prev}
    body["shape"] = list(entry.shape)
    own = sha256_json(body)
    return canonical_json({**body, "hash": own}) + b"\n", own


def _repair(torn: bytes) -> Entry:
    return Entry(
        run="",
        message="",
        event="repaired",
        purpose="mark the torn text of an append that was interrupted; nothing of it left",
        bytes=len(torn),
        sha256=hashlib.sha256(torn).hexdigest(),
    )


def _scan(path: Path, data: bytes, start: Head) -> tuple[list[Line], Head]:
    """Check the lines of `data`, which follow `start`; returns them and the end of the last good one.

    Torn text must be followed by the `repaired` entry that describes it, except at the very end of the data.
    """
    lines: list[Line] = []
    end, torn, number, position = start, b"", start.lines, start.bytes
    for raw in _split(data):
        number, position = number + 1, position + len(raw)
        record = _parse(raw)
        if record is None:
            torn += raw
            continue
        _check_torn(path, number, torn, record)
        if record["prev"] != end.hash:
            raise _broken(path, number, "it does not follow the line before it: lines were removed, moved or inserted")
        body = {key: value for key, value in record.items() if key != "hash"}
        if sha256_json(body) != record["hash"] or canonical_json(record) + b"\n" != raw:
            raise _broken(path, number, "its content does not hash to its own hash: it was changed")
        torn = b""
        end = Head(number, position, record["hash"])
        lines.append(_as_line(number, record))
    return lines, end


def _lengthening(size: int) -> Iterator[int]:
    """How much of a file's end to read, four times as much each time, up to all of it."""
    length = TAIL_BYTES
    while length < size:
        yield length
        length *= 4
    yield size


def _split(data: bytes) -> list[bytes]:
    """Lines with their newlines; the last one may lack it."""
    pieces = data.split(b"\n")
    return [piece + b"\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


def _check_torn(path: Path, number: int, torn: bytes, record: dict[str, Any]) -> None:
    if record["event"] == "repaired":
        body = torn.rstrip(b"\n")
        if record["bytes"] != len(body) or record["sha256"] != hashlib.sha256(body).hexdigest():
            raise _broken(path, number, "the torn text before it is not the one that it marks: it was changed")
    elif torn:
        raise _broken(
            path, number - torn.count(b"\n"), "it is no entry, and no 'repaired' entry marks it: it was changed"
        )


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The record of a whole line; None where the line is torn or no entry."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and set(record) == _KEYS else None


def _as_line(number: int, record: dict[str, Any]) -> Line:
    values = {field.name: record[field.name] for field in fields(Entry)}
    values["shape"] = tuple(values["shape"])
    return Line(number, record["when"], Entry(**values), record["hash"])


def _broken(path: Path, number: int, why: str) -> AuditError:
    return AuditError(f"{path}: line {number} is not as it was written", why=why, fix=_TAMPERED)


def _shortened(path: Path, head: Head) -> AuditError:
    return AuditError(
        f"{path}: lines are missing at the end, up to line {head.lines}",
        why=f"the head knows {head.lines} lines of {head.bytes} bytes, the log is shorter",
        fix=_TAMPERED,
    )
