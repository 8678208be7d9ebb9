from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest

from bridge.messages import ReasonCode
from client.audit import AuditLog, Entry
from client.errors import LedgerError, ReplayError, SiteError
from client.ledger import Ledger
from client.ledger.store import SCHEMA
from client.ledger.verify import verify
from client.site import Site, open_site
from tests.client.disk import read_only, small_disk
from tests.client.ledgers import ask, ledger_site, plan


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return ledger_site(tmp_path / "site")


@pytest.fixture
def used(built: Path, tmp_path: Path) -> Site:
    """A site with two plans, three answered messages (one sealed) and one that failed."""
    return open_site(shutil.copytree(built, tmp_path / "used"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = ledger_site(tmp_path_factory.mktemp("ledger") / "site")
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        for round_ in (1, 2):
            ask(ledger, round_, lambda: b"noised reply")
        ask(ledger, 3, lambda: b"raw sum of gradients", encrypt=True)
        with pytest.raises(ZeroDivisionError):
            ask(ledger, 4, failing)
        ledger.reserve("other", plan(sha256="b" * 64, cohorts={"pair": ["p2", "p3"]}))
    return site.folder


def failing() -> bytes:
    raise ZeroDivisionError


def never() -> bytes:
    raise AssertionError("computed again")


def raw(site: Site) -> sqlite3.Connection:
    return sqlite3.connect(site.ledger_path, isolation_level=None)


def check(site: Site) -> None:
    with Ledger.open(site) as ledger:
        verify(ledger, AuditLog(site.audit_path))


def test_rows_hash_as_documented(used: Site) -> None:
    previous = "0" * 64
    kinds = []
    for number, written, kind, run, name, body, before, own in raw(used).execute("SELECT * FROM chain"):
        assert before == previous
        content = [number, written, kind, run, name, json.loads(body), before]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = hashlib.sha256(text.encode()).hexdigest()
        assert own == previous
        kinds.append(kind)
    assert kinds == [
        *("opened", "plan", "begun", "answered", "begun", "answered", "begun", "answered", "begun", "plan"),
    ]
    assert verify(Ledger.open(used), AuditLog(used.audit_path)).lost == 1


def test_the_file_is_durable_and_its_owners(used: Site) -> None:
    with Ledger.open(used) as ledger:
        assert ledger.store.execute("PRAGMA journal_mode") == [("wal",)]
        assert ledger.store.execute("PRAGMA synchronous") == [(2,)]
    for path in (used.ledger_path, used.key_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert used.ledger_path == used.folder / "ledger.sqlite"
    assert used.key_path == used.folder / "ledger.key"


def test_no_patient_and_no_unnoised_reply_lies_readable(used: Site) -> None:
    with Ledger.open(used) as ledger:
        assert ask(ledger, 3, never, encrypt=True) == b"raw sum of gradients"
        members = {row[0] for row in ledger.store.execute("SELECT patient FROM members")}
    assert all(len(each) == 64 for each in members)
    plain = {hashlib.sha256(name.encode()).hexdigest() for name in ("p1", "p2", "p3")}
    assert len(members) == 3
    assert not members & plain
    content = b"".join(path.read_bytes() for path in used.folder.iterdir() if path.is_file())
    assert b"noised reply" in content
    assert b"raw sum" not in content


def test_two_sites_name_a_patient_differently(tmp_path: Path) -> None:
    hashes = [Ledger.open(ledger_site(tmp_path / name)).vault.patient("p1") for name in ("a", "b")]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("table", ["chain", "members", "replies"])
def test_rows_can_only_be_added(used: Site, table: str) -> None:
    with raw(used) as database:
        column = {"chain": "body", "members": "cohort", "replies": "content"}[table]
        for statement in (f"UPDATE {table} SET {column} = 'x'", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                database.execute(statement)
    check(used)


def tampered(site: Site, *statements: str) -> None:
    """Change rows behind the triggers' back, and put the triggers in place again."""
    database = raw(site)
    triggers = [sql for sql in SCHEMA if sql.startswith("CREATE TRIGGER")]
    for sql in triggers:
        database.execute(f"DROP TRIGGER {sql.split()[2]}")
    for statement in (*statements, *triggers):
        database.execute(statement)
    database.close()


@pytest.mark.parametrize("number", range(1, 11))
@pytest.mark.parametrize("change", ["written = '2001'", "kind = 'x'", "run = 'x'", "name = 'x'", "hash = 'x'"])
def test_a_changed_row_is_found_and_named(used: Site, number: int, change: str) -> None:
    tampered(used, f"UPDATE chain SET {change} WHERE number = {number}")
    with pytest.raises(LedgerError, match=f"row {1 if number == 1 and 'kind' in change else number} of"):
        check(used)


FIRST = "SELECT min(patient) FROM members WHERE plan ="

TAMPERINGS = {
    "less used": ("UPDATE chain SET body = replace(body, '\"count\":1', '\"count\":0') WHERE number = 5", 5),
    "a cheaper plan": ("UPDATE chain SET body = replace(body, '4.0', '9.0') WHERE number = 2", 2),
    "spaces in a body": ("UPDATE chain SET body = body || ' ' WHERE number = 3", 3),
    "no JSON": ("UPDATE chain SET body = 'x' WHERE number = 3", 3),
    "removed": ("DELETE FROM chain WHERE number = 5", 6),
    "removed and renumbered": ("DELETE FROM chain WHERE number = 10", 10),
    "patient removed": (f"DELETE FROM members WHERE plan = 2 AND patient = ({FIRST} 2)", 2),
    "reply changed": ("UPDATE replies SET content = x'00' WHERE row = 5", 6),
    "reply removed": ("DELETE FROM replies WHERE row = 5", 6),
    "reply added": ("INSERT INTO replies VALUES (9, x'00')", 9),
    "patient added": (f"INSERT INTO members VALUES (2, 'test', '{'f' * 64}', 2)", 2),
    "patient moved": (f"UPDATE members SET cohort = 'test' WHERE plan = 10 AND patient = ({FIRST} 10)", 10),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_names_the_row(used: Site, name: str) -> None:
    statement, row = TAMPERINGS[name]
    tampered(used, statement)
    with pytest.raises(LedgerError) as found:
        check(used)
    text = str(found.value)
    assert f"row {row}" in text


def test_a_dropped_trigger_is_found(used: Site) -> None:
    raw(used).execute("DROP TRIGGER chain_no_update")
    with pytest.raises(LedgerError, match="tables are not as they were made"):
        check(used)


def test_a_sealed_reply_can_not_be_opened_for_another_message(used: Site) -> None:
    with Ledger.open(used) as ledger:
        sealed = ledger.vault.seal(b"a raw sum", "row 7")
        assert ledger.vault.unseal(sealed, "row 7") == b"a raw sum"
        for content, place in ((sealed, "row 5"), (sealed[:-1], "row 7"), (b"", "row 7")):
            with pytest.raises(LedgerError, match="can't be decrypted"):
                ledger.vault.unseal(content, place)


def test_a_chain_rewritten_as_a_whole_is_found_by_the_audit_log(used: Site, tmp_path: Path) -> None:
    """Whoever has the key can write a sound chain with fewer charges; the audit log knows better."""
    fresh = ledger_site(tmp_path / "fresh")
    used.ledger_path.unlink()
    shutil.copy(used.key_path, fresh.key_path)
    with Ledger.open(fresh) as ledger:
        for run in range(12):
            ledger.reserve(f"run{run}", plan(cohorts={"pair": ["p9"]}))
    shutil.copy(fresh.ledger_path, used.ledger_path)
    with pytest.raises(LedgerError, match="row 10 of the ledger"):
        Ledger.open(used)


def copy_of(site: Site, folder: Path) -> Path:
    folder.mkdir()
    for path in site.folder.glob("ledger.sqlite*"):
        if path.is_file():
            shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.parametrize("charge", ["plan", "message", "withdrawal"])
def test_an_old_copy_is_refused(used: Site, tmp_path: Path, charge: str) -> None:
    copy = copy_of(used, tmp_path / "copy")
    with Ledger.open(used) as ledger:
        if charge == "plan":
            ledger.reserve("newer", plan(sha256="d" * 64))
        elif charge == "message":
            ask(ledger, 5)
        else:
            ledger.forget("p1")
    for path in used.folder.glob("ledger.sqlite*"):
        if path.is_file():
            path.unlink()
    for path in copy.iterdir():
        shutil.copy(path, used.folder / path.name)
    with pytest.raises(LedgerError, match="old copy") as refused:
        Ledger.open(used)
    assert refused.value.reason == ReasonCode.LEDGER_UNUSABLE


def test_the_audit_logs_head_is_found_behind_many_other_lines(used: Site) -> None:
    log = AuditLog(used.audit_path)
    log.append([Entry(run="r", message="train", purpose="x" * 200) for _ in range(2000)])
    assert used.audit_path.stat().st_size > 4 * 65_536
    newest = log.newest("ledger")
    assert newest is not None
    assert newest.shape == (10,)
    used.ledger_path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        Ledger.open(used)


def test_a_ledger_without_its_key_is_refused(used: Site, tmp_path: Path) -> None:
    key = used.key_path.read_bytes()
    used.key_path.unlink()
    with pytest.raises(LedgerError, match="key can't be read"):
        Ledger.open(used)
    assert not used.key_path.exists()
    for content in (b"", b"short", b"zz" * 32, key[:-10]):
        used.key_path.write_bytes(content)
        used.key_path.chmod(0o600)
        with pytest.raises(LedgerError, match="is not a site's key"):
            Ledger.open(used)
    used.key_path.write_bytes(b"11" * 32)
    with pytest.raises(LedgerError, match="another key"):
        Ledger.open(used)
    used.key_path.write_bytes(key)
    used.key_path.chmod(0o640)
    with pytest.raises(LedgerError, match="others than its owner"):
        Ledger.open(used)
    used.key_path.chmod(0o600)
    check(used)


def test_a_file_of_another_program_or_version_is_refused(site: Site) -> None:
    site.ledger_path.write_bytes(b"")
    with pytest.raises(LedgerError, match="another program"):
        Ledger.open(open_with_key(site))
    site.ledger_path.write_bytes(os.urandom(8192))
    with pytest.raises(LedgerError):
        Ledger.open(site)
    site.ledger_path.unlink()
    sqlite3.connect(site.ledger_path).execute("CREATE TABLE chain (number INTEGER)")
    with pytest.raises(LedgerError, match="another program"):
        Ledger.open(site)
    site.ledger_path.unlink()
    Ledger.open(site).close()
    raw(site).execute("PRAGMA user_version = 2")
    with pytest.raises(LedgerError, match="version is 2"):
        Ledger.open(site)


def open_with_key(site: Site) -> Site:
    site.key_path.write_text("11" * 32)
    site.key_path.chmod(0o600)
    return site


def test_a_truncated_file_is_refused(used: Site) -> None:
    whole = used.ledger_path.read_bytes()
    for length in (0, 1, 50, 100, 4096, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        used.ledger_path.write_bytes(whole[:length])
        with pytest.raises(LedgerError):
            check(used)
    used.ledger_path.write_bytes(whole)
    check(used)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            return


def test_a_full_disk_answers_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        site = ledger_site(folder / "site")
        with Ledger.open(site) as ledger:
            ledger.reserve("run", plan())
            assert ask(ledger, 1, lambda: b"x" * 1000) == b"x" * 1000
            with pytest.raises(LedgerError):
                ask(ledger, 2, lambda: b"x" * 3_000_000)
        check(site)
        with Ledger.open(site) as ledger:
            with pytest.raises(ReplayError):
                ask(ledger, 2, never)
            fill(folder / "filler")
            for round_ in (3, 4):
                with pytest.raises(SiteError) as refused:
                    ask(ledger, round_, never)
                assert refused.value.reason in (ReasonCode.LEDGER_UNUSABLE, ReasonCode.STORAGE)
            (folder / "filler").unlink()
        check(site)
        with Ledger.open(site) as ledger:
            assert ask(ledger, 1, never) == b"x" * 1000
            assert ask(ledger, 6) == b"reply"


def test_a_read_only_folder_answers_nothing(used: Site) -> None:
    with read_only(used.folder), pytest.raises(SiteError) as refused, Ledger.open(used) as ledger:
        ask(ledger, 5, never)
    assert refused.value.reason == ReasonCode.LEDGER_UNUSABLE
    check(used)


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    site = ledger_site(tmp_path / "site")
    (site.folder / "site.yaml").write_text((site.folder / "site.yaml").read_text() + "ledger: site.yaml/x.sqlite\n")
    with pytest.raises(LedgerError):
        Ledger.open(open_site(site.folder))
