"""Leaving a study: at once, for good, with its caches and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bridge.errors import StudyError
from bridge.messages import ReasonCode
from client.audit import AuditLog
from client.errors import AuditError, NotAcceptedError, OutputError
from client.ledger import Ledger
from client.site import Site, open_site
from client.study.acceptance import leaving, require_code, require_holding
from client.study.record import read_acceptance
from client.study.running import set_running_bundle
from client.study.withdraw import withdraw
from tests.client.agreements import BUNDLE, agree
from tests.client.disk import read_only
from tests.client.sites import PERMISSIVE, Small, build_job, build_site, send, start_arrays, train_config
from tests.client.study.studies import snapshot


@pytest.fixture
def site(small: Small, tmp_path: Path) -> Site:
    return open_site(build_site(tmp_path / "site", "beta", models=small.models, policy=PERMISSIVE))


def events(site: Site) -> list[str]:
    return [line.entry.event for line in AuditLog(site.audit_path).verify()]


def entries(site: Site) -> int:
    return len(list(site.cache_folder.glob("??/*")))


def train(site: Site, text: str) -> int:
    try:
        reply = send({"site": str(site.path)}, text, "train", train_config(), start_arrays())
    finally:
        set_running_bundle(BUNDLE)
    return reply.error.code if reply.has_error() else 0


def test_the_caches_go_and_the_logs_stay(small: Small, site: Site) -> None:
    study = agree(site, build_job(small.models))
    with Ledger.open(site):
        pass
    assert train(site, study.job_text) == 0
    filled, before = entries(site), site.audit_path.read_bytes()
    assert filled == 20 + 2 * 10  # windows of each recording, features of the paired ones under two encoders
    found = withdraw(site, study.id, "Dr Weber")
    assert (found.again, found.entries, found.kept_for) == (False, filled, "")
    assert entries(site) == 0
    assert site.audit_path.read_bytes().startswith(before)
    last = AuditLog(site.audit_path).verify()[-1].entry
    assert (last.event, last.run, last.sha256) == ("left", study.id, study.sha256)
    assert last.purpose == f'left by "Dr Weber"; code {BUNDLE}'
    assert site.ledger_path.exists()
    assert site.key_path.exists()
    assert train(site, study.job_text) == ReasonCode.STUDY_WITHDRAWN
    again = withdraw(site, study.id, "Dr Weber")
    assert (again.again, again.entries) == (True, 0)
    assert events(site).count("left") == 1


def test_another_study_that_needs_the_cache_keeps_it(small: Small, site: Site) -> None:
    first, second = agree(site, build_job(small.models)), agree(site, build_job(small.models, name="second"))
    assert train(site, first.job_text) == 0
    filled = entries(site)
    assert withdraw(site, first.id, "me").kept_for == second.id
    assert entries(site) == filled
    assert train(site, second.job_text) == 0
    assert withdraw(site, second.id, "me").entries == filled


def test_a_study_about_other_encoders_does_not_keep_it(small: Small, site: Site) -> None:
    job = build_job(small.models)
    models = job.models.model_copy(update={"old_encoder": "0" * 64, "new_encoder": "1" * 64})
    study = agree(site, job)
    agree(site, job.model_copy(update={"name": "second", "models": models}))
    assert train(site, study.job_text) == 0
    assert withdraw(site, study.id, "me").kept_for == ""


def test_a_study_that_is_not_there(small: Small, site: Site) -> None:
    study = agree(site, build_job(small.models))
    for name in ("other", "", ".", "..", f"../studies/{study.id}"):
        with pytest.raises(StudyError, match="was accepted at the site 'beta'"):
            withdraw(site, name, "me")
    require_code(site, BUNDLE)


@pytest.mark.parametrize("name", ["study.json", "study.sig", "job.yaml", "page.md", "acceptance.json"])
def test_a_damaged_record_can_be_left(small: Small, site: Site, name: str) -> None:
    study = agree(site, build_job(small.models))
    (study.folder / name).write_bytes(b"damaged")
    withdraw(site, study.id, "me")
    assert read_acceptance(study.folder).state == "withdrawn"
    assert events(site) == ["accepted", "left"]
    with pytest.raises(NotAcceptedError):
        require_code(site, BUNDLE)


def test_withdrawn_on_disk_before_the_log_knows(small: Small, site: Site) -> None:
    """With a log that can't be written the study is left all the same, and the command can be repeated."""
    study = agree(site, build_job(small.models))
    whole = site.audit_path.read_bytes()
    site.audit_path.write_bytes(b"")
    with pytest.raises(AuditError):
        withdraw(site, study.id, "me")
    assert read_acceptance(study.folder).state == "withdrawn"
    site.audit_path.write_bytes(whole)
    with pytest.raises(NotAcceptedError):
        require_holding(study)
    assert withdraw(site, study.id, "me").again
    assert events(site) == ["accepted", "left"]


def test_a_folder_that_can_only_be_read_is_told(small: Small, site: Site) -> None:
    study = agree(site, build_job(small.models))
    before = snapshot(site.studies_folder)
    with read_only(site.studies_folder), pytest.raises(OutputError, match="fedbridge-site stop"):
        withdraw(site, study.id, "me")
    assert snapshot(site.studies_folder) == before


_COMPUTE = """
import sys
from pathlib import Path
from client.study.running import set_running_bundle
from tests.client.agreements import BUNDLE
from tests.client.sites import send, start_arrays, train_config

set_running_bundle(BUNDLE)
reply = send({"site": sys.argv[1]}, Path(sys.argv[2]).read_text(), "train", train_config(), start_arrays())
print(reply.error.code if reply.has_error() else 0)
"""


def _computing(site: Site, job: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _COMPUTE, str(site.path), str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])


def _wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_being_computed_ends_and_does_not_leave(small: Small, site: Site) -> None:
    """A real process trains for minutes; it ends within seconds of the withdrawal, and its cache goes too."""
    study = agree(site, build_job(small.models, train={"local_steps": 1_000_000}))
    process = _computing(site, study.folder / "job.yaml")
    try:
        _wait_for(lambda: entries(site) >= 40, process)
        withdraw(site, study.id, "me")
        assert process.communicate(timeout=60)[0].split() == [str(int(ReasonCode.STUDY_WITHDRAWN))]
    finally:
        process.kill()
        process.wait()
    assert events(site) == ["accepted", "left", "refused"]
    assert entries(site) == 0


def test_a_withdrawal_waits_for_a_reply_that_is_being_handed_over(small: Small, site: Site) -> None:
    """One is wholly before the other: within the door the study holds, after it nothing passes."""
    study = agree(site, build_job(small.models))
    order: list[str] = []

    def leave() -> None:
        withdraw(site, study.id, "me")
        order.append("left")

    thread = threading.Thread(target=leave)
    with leaving(site, study):
        thread.start()
        time.sleep(0.3)
        order.append("sent")
    thread.join(timeout=30)
    assert order == ["sent", "left"]
    with pytest.raises(NotAcceptedError) as error, leaving(site, study):
        order.append("never")
    assert error.value.reason == ReasonCode.STUDY_WITHDRAWN
    assert order == ["sent", "left"]


def test_a_process_killed_at_the_door_holds_nobody_up(small: Small, site: Site) -> None:
    study = agree(site, build_job(small.models))
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom client.site import open_site\n"
        "from client.study.record import studies_lock\n"
        "with studies_lock(open_site(Path(sys.argv[1]))):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(site.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not withdraw(site, study.id, "me").again
