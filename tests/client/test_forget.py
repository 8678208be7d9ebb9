from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import numpy as np
import pytest

from bridge.job import job_text
from bridge.privacy.accounting import epsilon
from client.audit import AuditLog
from client.errors import BudgetError, LedgerError, NoWindowsError, RecordingError, ReplayError
from client.features import features
from client.forget import forget, withdrawn
from client.ledger import Ledger
from client.ledger.verify import verify
from client.ledger.view import view
from client.site import Site, open_site
from tests.client.ledgers import DELTA, PROBE, STEPS, ask, plan
from tests.client.sites import Small, build_job, build_site
from tests.client.test_cli import run

PATIENT = "s-p01"


@pytest.fixture
def site(small: Small, tmp_path: Path) -> Site:
    """Eight patients, four of them for pairs: s-p00 to s-p03."""
    return open_site(build_site(tmp_path / "s", "s", models=small.models, patients=8))


def never() -> bytes:
    raise AssertionError("computed again")


def cached(site: Site) -> list[str]:
    """The patient of every entry of the cache."""
    return [json.loads(path.read_text())["values"]["patient"] for path in site.cache_folder.rglob("entry.json")]


def test_a_withdrawn_patient_is_in_no_cache_and_in_no_later_set(site: Site) -> None:
    before = features(site, "pair")
    before.old_input_tokens(1, [0])
    assert set(before.table.patients) == {f"s-p0{number}" for number in range(4)}
    assert cached(site).count(PATIENT) == 3
    others = len(cached(site)) - 3
    found = forget(site, PATIENT)
    assert (found.entries, found.replies) == (3, 0)
    assert PATIENT not in cached(site)
    after = features(site, "pair")
    assert set(after.table.patients) == {"s-p00", "s-p02", "s-p03"}
    kept = before.table.patients != PATIENT
    np.testing.assert_array_equal(after.new_output(1), before.new_output(1)[kept])
    np.testing.assert_array_equal(after.pseudo_labels, before.pseudo_labels[kept])
    assert PATIENT not in cached(site)
    assert len(cached(site)) == others


def test_a_file_that_still_caches_the_patient_is_left_out(site: Site, tmp_path: Path) -> None:
    """As one that another process wrote while the patient withdrew."""
    forget(site, PATIENT)
    other = open_site(build_site(tmp_path / "t", "s", models=site.model_folder("old_encoder").parent, patients=8))
    features(other, "pair")
    assert cached(other).count(PATIENT) == 3
    (other.folder / "site.yaml").write_text(
        (other.folder / "site.yaml").read_text() + f"ledger: {site.ledger_path}\naudit: {site.audit_path}\n"
    )
    assert PATIENT not in set(features(open_site(other.folder), "pair").table.patients)


def test_all_patients_withdrawn_leaves_no_window(site: Site) -> None:
    for number in range(4):
        forget(site, f"s-p0{number}")
    with pytest.raises(NoWindowsError):
        features(site, "pair")


def test_stored_replies_of_the_patients_runs_are_gone_and_the_budget_is_spent(site: Site) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("with", plan(cohorts={"pair": [PATIENT, "s-p00"]}))
        ledger.reserve("without", plan(cohorts={"pair": ["s-p02"]}))
        for name in ("with", "without"):
            ask(ledger, 1, lambda: b"the stored reply", run=name)
    assert forget(site, PATIENT).replies == 1
    with Ledger.open(site) as ledger:
        with pytest.raises(ReplayError, match="was deleted since"):
            ask(ledger, 1, never, run="with")
        assert ask(ledger, 1, never, run="without") == b"the stored reply"
        assert ask(ledger, 2, lambda: b"next", run="with") == b"next"
        cap = epsilon((PROBE, STEPS), DELTA) + 1e-6
        with pytest.raises(BudgetError):
            ledger.reserve("again", plan(cap, cohorts={"pair": [PATIENT]}))
        assert view(ledger).withdrawn == 1
        verify(ledger, AuditLog(site.audit_path))
    assert forget(site, PATIENT).replies == 1
    files = [path for path in site.folder.glob("ledger.sqlite*") if path.is_file()]
    assert sum(path.read_bytes().count(b"the stored reply") for path in files) == 1


def test_a_reply_computed_while_a_patient_withdraws_is_not_given(site: Site) -> None:
    def compute() -> bytes:
        forget(site, PATIENT)
        return b"with the patient"

    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan(cohorts={"pair": [PATIENT]}))
        with pytest.raises(ReplayError, match="withdrew while"):
            ask(ledger, 1, compute)
        with pytest.raises(ReplayError, match="has no reply"):
            ask(ledger, 1, never)
        assert ask(ledger, 2, lambda: b"without") == b"without"
        assert view(ledger).plans[0].phases[1].used == 2


def test_the_audit_log_knows_the_withdrawal_by_keyed_hash(site: Site) -> None:
    forget(site, PATIENT)
    key = bytes.fromhex(site.key_path.read_text().strip())
    patients = hmac.new(key, b"fedbridge patients", hashlib.sha256).digest()
    expected = hmac.new(patients, PATIENT.encode(), hashlib.sha256).hexdigest()
    events = [(line.entry.event, line.entry.sha256) for line in AuditLog(site.audit_path).verify()]
    assert ("withdrawn", expected) in events
    assert PATIENT not in site.audit_path.read_text()


def test_a_typing_error_is_no_withdrawal(site: Site) -> None:
    with pytest.raises(RecordingError):
        forget(site, "s-p1")
    assert withdrawn(site).hashes == frozenset()


def test_a_site_without_a_ledger_gets_none_by_asking(site: Site) -> None:
    assert "anyone" not in withdrawn(site)
    assert not site.ledger_path.exists()
    assert not site.key_path.exists()


def test_a_lost_ledger_does_not_bring_a_patient_back(site: Site) -> None:
    forget(site, PATIENT)
    for path in [*site.folder.glob("ledger.sqlite"), *site.folder.glob("ledger.sqlite-*")]:
        path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        features(site, "pair")


def test_the_commands(
    small: Small, site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(*words: object) -> tuple[int, str]:
        code, out, err = run(capsys, monkeypatch, *words)
        return code, " ".join((out + err).split())

    for command in ("show", "verify"):
        code, text = said("ledger", command, site.folder)
        assert code == 0
        assert "no ledger yet" in text
    assert not site.ledger_path.exists()
    cost = epsilon((PROBE, STEPS), DELTA)
    with Ledger.open(site) as ledger:
        ledger.reserve("5" * 32, plan(cohorts={"pair": [PATIENT, "s-p00"]}))
        ask(ledger, 1, run="5" * 32)
    code, text = said("ledger", "show", site.folder)
    assert code == 0
    assert f"pair: 2 patient(s), each epsilon {cost:.3f} by this plan alone" in text
    assert "training pair 4.000 0.25 6 1" in text
    assert f"most spent: epsilon {cost:.3f} of 1 (the policy's epsilon_cap), {1 - cost:.3f} left" in text
    code, text = said("ledger", "verify", site.folder)
    assert code == 0
    assert "4 rows, each follows the one before it" in text
    code, text = said("forget", site.folder, PATIENT)
    assert code == 0
    assert "1 stored replies" in text
    assert said("forget", site.folder, "nobody")[0] == 3
    job = tmp_path / "job.yaml"
    job.write_text(job_of(small, 8.0))
    code, text = said("ledger", "forecast", site.folder, job)
    assert code == 0
    assert f"has spent epsilon {cost:.3f}" in text
    assert "it fits" in text
    job.write_text(job_of(small, 1.0))
    code, text = said("ledger", "forecast", site.folder, job)
    assert code == 5
    assert "does not fit" in text
    job.write_text(job_of(small, None))
    assert said("ledger", "forecast", site.folder, job)[0] == 2
    site.ledger_path.write_bytes(b"x" * 5000)
    assert said("ledger", "verify", site.folder)[0] == 7


def job_of(small: Small, noise: float | None) -> str:
    """A job with this noise in training and little cost elsewhere; without a private mechanism for None."""
    privacy: dict[str, object] = {"mechanism": "none" if noise is None else "local"}
    privacy |= {phase: {"noise_multiplier": 20.0} for phase in ("selection", "metrics")}
    privacy |= {"training": {"noise_multiplier": noise}}
    return job_text(build_job(small.models, privacy=privacy))
