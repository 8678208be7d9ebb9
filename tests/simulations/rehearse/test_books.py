from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.audit import AuditLog, Entry
from client.ledger import Ledger
from client.ledger.view import view
from client.site import Site
from simulations.errors import RehearsalError
from simulations.rehearse.books import copy_books
from tests.client.ledgers import ledger_site, plan
from tests.simulations.rehearse.study_files import state_of

ENTRY = Entry(run="7", message="train", purpose="a test", item="weight", bytes=8)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return ledger_site(tmp_path / "hospital")


def copied(site: Site, place: Path) -> Site:
    place.mkdir()
    books = {"audit": place / "audit.jsonl", "ledger": place / "ledger.sqlite"}
    copy = Site(site.path, site.file.model_copy(update=books))
    copy_books(site, copy)
    return copy


def test_nothing_to_copy(site: Site, tmp_path: Path) -> None:
    copied(site, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


def test_log_ledger_and_key_are_copied_and_the_site_is_as_it_was(site: Site, tmp_path: Path) -> None:
    AuditLog(site.audit_path).append([ENTRY])
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        ledger.forget("p1")
        gone, known = ledger.withdrawn(), view(ledger)
    before = state_of(site.folder)
    copy = copied(site, tmp_path / "copy")
    assert state_of(site.folder) == before
    with Ledger.open(copy) as ledger:
        assert ledger.withdrawn() == gone
        assert view(ledger) == known
        assert (known.patients, known.withdrawn, len(known.plans)) == (2, 1, 1)
    assert AuditLog(copy.audit_path).verify() == AuditLog(site.audit_path).verify()
    assert copy.key_path.stat().st_mode & 0o777 == 0o600


def test_an_open_ledger_is_copied_with_its_write_ahead_log(site: Site, tmp_path: Path) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        assert site.ledger_path.with_name("ledger.sqlite-wal").stat().st_size > 0
        with Ledger.open(copied(site, tmp_path / "copy")) as copy:
            assert view(copy) == view(ledger)
            assert view(copy).patients == 2


def test_of_a_log_that_is_being_written_what_its_head_knows_is_copied(site: Site, tmp_path: Path) -> None:
    AuditLog(site.audit_path).append([ENTRY])
    with site.audit_path.open("ab") as file:
        file.write(b'{"half')
    assert len(AuditLog(copied(site, tmp_path / "copy").audit_path).verify()) == 1


@pytest.mark.parametrize("head", ["", "[]", "{}", json.dumps({"bytes": "many"})])
def test_a_damaged_head_is_named(site: Site, tmp_path: Path, head: str) -> None:
    AuditLog(site.audit_path).append([ENTRY])
    site.audit_path.with_name("audit.jsonl.head").write_text(head)
    with pytest.raises(RehearsalError, match="can't be read"):
        copied(site, tmp_path / "copy")
