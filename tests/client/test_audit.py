from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.audit import GENESIS, AuditLog, Entry, totals
from client.errors import AuditError


def entry(number: int, run: str = "r") -> Entry:
    return Entry(
        run=run, message="train", purpose="train the bridge", round=number, item="update.A", shape=(3, 2), bytes=24
    )


def filled(path: Path, lines: int = 6) -> AuditLog:
    log = AuditLog(path)
    for number in range(lines):
        log.append([entry(number)])
    return log


def test_lines_hold_every_field_and_hash_as_documented(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 3)
    prev = "0" * 64
    for raw in log.path.read_text().splitlines():
        record = json.loads(raw)
        assert set(record) == {
            *("when", "run", "round", "message", "event", "item", "shape", "bytes", "sha256", "purpose", "prev", "hash")
        }
        assert record["prev"] == prev
        body = {key: value for key, value in record.items() if key != "hash"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        prev = hashlib.sha256(text.encode()).hexdigest()
        assert record["hash"] == prev
    assert [line.entry.round for line in log.verify()] == [0, 1, 2]
    assert log.verify()[-1].hash == prev
    assert GENESIS == "0" * 64


def test_an_absent_log_verifies_as_empty(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "audit.jsonl").verify() == []
    assert list(tmp_path.iterdir()) == []


def changed(lines: list[str]) -> list[str]:
    lines[2] = lines[2].replace('"bytes":24', '"bytes":25')
    return lines


def garbled(lines: list[str]) -> list[str]:
    lines[2] = lines[2][:-9]
    return lines


def removed(lines: list[str]) -> list[str]:
    return lines[:2] + lines[3:]


def swapped(lines: list[str]) -> list[str]:
    lines[2], lines[3] = lines[3], lines[2]
    return lines


def inserted(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[0], *lines[2:]]


def rechained(lines: list[str]) -> list[str]:
    """A forger who recomputes the line's own hash, but not those after it."""
    record = json.loads(lines[2])
    record["bytes"] = 1
    body = {key: value for key, value in record.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    record["hash"] = hashlib.sha256(text.encode()).hexdigest()
    lines[2] = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return lines


def spaced(lines: list[str]) -> list[str]:
    lines[2] = lines[2].replace(":", ": ", 1)
    return lines


def last_removed(lines: list[str]) -> list[str]:
    return lines[:-1]


def last_changed(lines: list[str]) -> list[str]:
    lines[-1] = lines[-1].replace("update.A", "update.B")
    return lines


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (changed, "line 3 "),
        (garbled, "line 3 "),
        (removed, "line 3 "),
        (swapped, "line 3 "),
        (inserted, "line 3 "),
        (rechained, "line 4 "),
        (spaced, "line 3 "),
        (last_removed, "up to line 6"),
        (last_changed, "line 6 "),
    ],
)
def test_verify_names_the_line_that_was_tampered_with(tmp_path: Path, tamper: object, named: str) -> None:
    log = filled(tmp_path / "audit.jsonl")
    lines = log.path.read_text().splitlines()
    log.path.write_text("".join(line + "\n" for line in tamper(lines)))  # type: ignore[operator]
    with pytest.raises(AuditError) as caught:
        log.verify()
    assert named in str(caught.value)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_no_single_byte_can_be_changed(tmp_path: Path, place: float, byte: int) -> None:
    if not (log := AuditLog(tmp_path / "audit.jsonl")).path.exists():
        filled(log.path, 4)
    good = log.path.read_bytes()
    index = int(place * len(good))
    log.path.write_bytes(good[:index] + bytes([byte]) + good[index + 1 :])
    try:
        if byte == good[index]:
            assert len(log.verify()) == 4
        else:
            with pytest.raises(AuditError):
                log.verify()
    finally:
        log.path.write_bytes(good)


def test_a_log_cut_short_takes_no_more_entries(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl")
    log.path.write_text("".join(line + "\n" for line in log.path.read_text().splitlines()[:4]))
    before = log.path.read_bytes()
    with pytest.raises(AuditError, match="missing at the end"):
        log.append([entry(9)])
    assert log.path.read_bytes() == before


def test_a_log_without_its_head_is_still_checked_line_by_line(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 3)
    (tmp_path / "audit.jsonl.head").unlink()
    assert len(log.verify()) == 3
    log.append([entry(3)])
    assert len(log.verify()) == 4


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_line_is_marked_by_the_next_append(tmp_path: Path, cut: int) -> None:
    log = filled(tmp_path / "audit.jsonl", 3)
    head = (tmp_path / "audit.jsonl.head").read_bytes()
    whole = log.path.read_bytes()
    log.append([entry(3)])
    torn = log.path.read_bytes()[len(whole) :][:cut]
    log.path.write_bytes(whole + torn)
    (tmp_path / "audit.jsonl.head").write_bytes(head)
    assert len(log.verify()) == 3 if cut > 0 else 4
    log.append([entry(4)])
    lines = log.verify()
    mark = next(line for line in lines if line.entry.event == "repaired")
    if cut > 0:
        assert mark.entry.bytes == len(torn)
        assert mark.entry.sha256 == hashlib.sha256(torn).hexdigest()
        assert [line.entry.round for line in lines] == [0, 1, 2, None, 4]
        assert torn in log.path.read_bytes()
    else:
        # only the newline was missing: the entry itself is whole and stays
        assert mark.entry.bytes == 0
        assert [line.entry.round for line in lines] == [0, 1, 2, 3, None, 4]


def test_torn_text_can_be_neither_changed_nor_added_later(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 2)
    with log.path.open("ab") as file:
        file.write(b'{"bytes":24,"ev')
    log.append([entry(2)])
    log.append([entry(3)])
    good = log.path.read_bytes()
    log.path.write_bytes(good.replace(b'{"bytes":24,"ev\n', b'{"bytes":99,"ev\n'))
    with pytest.raises(AuditError, match="torn text"):
        log.verify()
    lines = good.splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:-1], b"hello\n", lines[-1]]))
    with pytest.raises(AuditError, match="line 6 "):
        log.verify()


def test_torn_twice_in_a_row(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 1)
    with log.path.open("ab") as file:
        file.write(b'{"bytes":24\n{"bytes":0,"event":"rep')
    log.append([entry(1)])
    lines = log.verify()
    assert [line.entry.event for line in lines] == ["sent", "repaired", "sent"]
    assert lines[1].entry.bytes == len(b'{"bytes":24\n{"bytes":0,"event":"rep')
    assert [line.number for line in lines] == [1, 4, 5]


def test_totals_by_run_and_item(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 3)
    log.append([entry(0, "s"), Entry(run="s", message="train", event="refused", purpose="answered by TOO_SLOW alone")])
    sent, refused = totals(log.verify())
    assert [(row.run, row.item, row.count, row.bytes) for row in sent] == [
        ("r", "update.A", 3, 72),
        ("s", "update.A", 1, 24),
    ]
    assert refused == 1


def test_an_unwritable_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(AuditError, match="can't be written"):
        AuditLog(tmp_path / "audit.jsonl").append([entry(0)])


def append_many(path: Path, run: str, count: int) -> None:
    log = AuditLog(path)
    for number in range(count):
        log.append([entry(number, run), entry(number, run)])


def test_two_processes_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=append_many, args=(path, run, 15)) for run in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    lines = AuditLog(path).verify()
    assert [line.number for line in lines] == list(range(1, 61))
    for run in ("a", "b"):
        own = [line.entry.round for line in lines if line.entry.run == run]
        assert own == [number for number in range(15) for _ in range(2)]
    # a message's two entries are never parted by another process
    assert all(lines[i].entry == lines[i + 1].entry for i in range(0, 60, 2))


_KILLED = """
import sys
from pathlib import Path
from client.audit import AuditLog, Entry
log = AuditLog(Path(sys.argv[1]))
number = 0
while True:
    log.append([Entry(run="k", message="train", purpose="p" * 2000, round=number, item="x") for _ in range(4)])
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_no_acknowledged_entry(tmp_path: Path) -> None:
    import random

    path, draw, acknowledged = tmp_path / "audit.jsonl", random.Random(3), 0
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().decode()
        child.wait()
        acknowledged += 1 + rest.count("\n")
    log = AuditLog(path)
    log.append([entry(0)])
    sent = [line for line in log.verify() if line.entry.run == "k"]
    assert len(sent) >= 4 * acknowledged
