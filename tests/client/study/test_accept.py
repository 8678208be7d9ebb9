"""`fedbridge-site accept`: what it compares, what it refuses by which name, and that a refusal changes nothing."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bridge.errors import StudyError
from bridge.job import Job
from bridge.messages import ReasonCode
from bridge.study.manifest import Code
from bridge.study.signing import new_key
from client.audit import AuditLog
from client.errors import NotAcceptedError, OutputError, SiteFileError
from client.ledger import Ledger, Plan
from client.ledger.view import view
from client.patients import cohorts_of
from client.site import Site, open_site
from client.study.accept import plain, run_accept
from client.study.acceptance import accepted
from client.study.record import FILES
from tests.client.agreements import write_coordinator
from tests.client.disk import read_only
from tests.client.ledgers import PROBE
from tests.client.sites import PERMISSIVE, Small, build_job, build_models
from tests.client.study.studies import PAGE_TEXT, change_site, fresh_site, own_code, snapshot, study_file

PRIVATE = {
    "privacy": {
        "mechanisms": ["local"],
        "epsilon_cap": 4.0,
        "delta": 1e-3,
        "noise_multiplier_min": 0,
        "sampling_rate_max": 0.5,
    }
}


def accept(study: Path, site: Site, *, answer: bool | None = True, who: str = "Dr Weber") -> str:
    """What the command prints; `answer` None: there is no terminal."""
    text = io.StringIO()
    consent = None if answer is None else lambda _: answer
    run_accept(study, site.path, who, consent, Console(file=text, width=300))
    return text.getvalue()


def refused(study: Path, site: Site, reason: ReasonCode, *words: str, answer: bool | None = True) -> NotAcceptedError:
    """The error, once it was seen that nothing at the site has changed."""
    before = snapshot(site.folder)
    with pytest.raises(NotAcceptedError) as found:
        accept(study, site, answer=answer)
    assert snapshot(site.folder) == before
    assert found.value.reason == reason
    for word in words:
        assert word in str(found.value)
    return found.value


def private_job(models: Path, **changes: Any) -> Job:
    from bridge.privacy.calibration import resolved

    return resolved(
        build_job(
            models,
            coordinator="lab",
            selection={"mode": "fixed", "input_position": 2, "output_position": 1},
            evaluate={"final": False},
            privacy={"mechanism": "local", "epsilon": 2.0, "delta": 1e-3, **changes},
        )
    )


# accepted


def test_a_study_is_shown_asked_and_put_on_record(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    name = study_file(tmp_path / "study.zip", small.models)
    before = snapshot(site.folder)
    text = accept(tmp_path / "study.zip", site)
    assert PAGE_TEXT in text
    assert text.index(PAGE_TEXT) < text.index("What this site says to it") < text.index("Accepted by Dr Weber")
    for topic in ("coordinator", "code", "policy", "old_encoder", "task_head", "old signal", "labels"):
        assert f"\n {topic} " in text
    assert "refused" not in text.replace("\n", "")

    (found,) = accepted(site)
    assert (found.id, found.holds, found.acceptance.who, found.manifest.attempts) == (name, True, "Dr Weber", 2)
    assert sorted(path.name for path in found.folder.iterdir()) == sorted(FILES)
    (line,) = AuditLog(site.audit_path).verify()
    assert (line.entry.event, line.entry.run, line.entry.sha256) == ("accepted", name, found.sha256)
    assert '"Dr Weber"' in line.entry.purpose
    assert found.bundle_sha256 in line.entry.purpose
    new = {path for path in snapshot(site.folder) if path not in before}
    assert new == {
        "audit.jsonl",
        "audit.jsonl.head",
        "audit.jsonl.lock",
        "studies",
        "studies/studies.lock",
        f"studies/{name}",
        *(f"studies/{name}/{file}" for file in FILES),
    }
    assert "was accepted by Dr Weber" in accept(tmp_path / "study.zip", site, answer=False)
    assert len(AuditLog(site.audit_path).verify()) == 1


def test_models_that_come_with_the_study_are_installed(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, own_models=False)
    (site.folder / "models" / "old_encoder").mkdir(parents=True)  # an empty folder is in nobody's way
    study_file(tmp_path / "study.zip", small.models)
    accept(tmp_path / "study.zip", site)
    assert snapshot(site.folder / "models") == snapshot(small.models)
    site = open_site(site.path)
    assert site.head_card.old_encoder == site.old_card.digest
    assert not [path for path in site.folder.iterdir() if path.name.startswith(".")]


def test_one_missing_model_is_installed_beside_two_equal_ones(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    shutil.rmtree(site.folder / "models" / "task_head")
    study_file(tmp_path / "study.zip", small.models)
    weights = site.folder / "models" / "old_encoder" / "weights.safetensors"
    kept = (weights.stat().st_ino, weights.stat().st_mtime_ns)
    assert f"comes with the study, for {site.folder / 'models' / 'task_head'}" in accept(tmp_path / "study.zip", site)
    assert snapshot(site.folder / "models") == snapshot(small.models)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == kept


def test_a_page_that_tells_less_than_is_asked_is_refused(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models, page="# Nothing leaves\n")
    before = snapshot(site.folder)
    with pytest.raises(StudyError, match="does not tell what the study asks"):
        accept(tmp_path / "study.zip", site)
    assert snapshot(site.folder) == before


def test_models_by_hash_alone_that_the_site_has(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models, include=False)
    accept(tmp_path / "study.zip", site)
    assert len(accepted(site)) == 1


def test_other_versions_and_a_site_that_is_not_asked_are_notes(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    job = build_job(small.models, coordinator="lab", sites={"expected": ("beta", "gamma")})
    study_file(tmp_path / "study.zip", small.models, job, versions={"numpy": "0.1", "no-such-package": "3"})
    text = accept(tmp_path / "study.zip", site)
    assert "no-such-package not installed (study: 3), numpy " in text
    assert "the study does not ask 'alpha'" in text


def test_a_private_study_within_the_budget(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, policy=PRIVATE)
    study_file(tmp_path / "study.zip", small.models, private_job(small.models))
    text = accept(tmp_path / "study.zip", site)
    assert "the most charged patient has spent epsilon 0.000 and would come to 2.0" in text
    assert not site.ledger_path.exists()
    assert not site.key_path.exists()


# refused


def test_a_study_of_another_key(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models, secret=new_key())
    before = snapshot(site.folder)
    with pytest.raises(StudyError, match="not signed by the coordinator 'lab'"):
        accept(tmp_path / "study.zip", site)
    assert snapshot(site.folder) == before


def test_a_coordinator_file_of_another_name_or_none(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models)
    write_coordinator(site, "another")
    refused(tmp_path / "study.zip", site, ReasonCode.COORDINATOR_UNKNOWN, "'lab'", "'another'")
    site.coordinator_path.write_text("name: lab\n")
    refused(tmp_path / "study.zip", site, ReasonCode.STUDY_UNUSABLE, "coordinator.yaml")
    site.coordinator_path.unlink()
    refused(tmp_path / "study.zip", site, ReasonCode.STUDY_UNUSABLE, "coordinator.yaml", "No such file")


@pytest.mark.parametrize("damage", ["gone", "torn", "text", "member"])
def test_a_damaged_study_file(small: Small, tmp_path: Path, damage: str) -> None:
    site = fresh_site(tmp_path / "site", small.models, own_models=False)
    path = tmp_path / "study.zip"
    study_file(path, small.models)
    content = path.read_bytes()
    weights = (small.models / "new_encoder" / "weights.safetensors").read_bytes()[-64:]
    changed = {
        "torn": content[: len(content) // 2],
        "text": b"no zip\n",
        "member": content.replace(weights, bytes(64)),
    }
    path.unlink() if damage == "gone" else path.write_bytes(changed[damage])
    before = snapshot(site.folder)
    with pytest.raises(StudyError):
        accept(path, site)
    assert snapshot(site.folder) == before


def test_other_code_is_told_file_by_file(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    own = own_code()
    files = {**own.files, "client/training.py": "0" * 64, "client/spy.py": "1" * 64}
    del files["client/outbox.py"]
    study_file(
        tmp_path / "study.zip", small.models, code=Code(sha256="f" * 64, files=files), versions={"fedbridge": "99.0"}
    )
    words = ("changed: client/training.py", "only in the study: client/spy.py", "only installed: client/outbox.py")
    refused(tmp_path / "study.zip", site, ReasonCode.CODE_NOT_ACCEPTED, *words, "(study: 99.0)")


def test_the_same_files_in_another_bundle(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models, code=Code(sha256="f" * 64, files=own_code().files))
    refused(tmp_path / "study.zip", site, ReasonCode.CODE_NOT_ACCEPTED, "the bundle made of them is not")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"privacy": {"mechanisms": ["local"]}}, ReasonCode.MECHANISM_FORBIDDEN),
        ({**PERMISSIVE, "max_rounds": 2}, ReasonCode.TOO_MANY_ROUNDS),
        ({**PERMISSIVE, "coordinators": ["another"]}, ReasonCode.COORDINATOR_UNKNOWN),
        ({**PERMISSIVE, "items": ["site", "reason"]}, ReasonCode.POLICY_FORBIDS),
        ({**PERMISSIVE, "encoders": {"new": ["0" * 64]}}, ReasonCode.POLICY_FORBIDS),
    ],
)
def test_a_policy_that_forbids(small: Small, tmp_path: Path, policy: Mapping[str, Any], reason: ReasonCode) -> None:
    site = fresh_site(tmp_path / "site", small.models, policy=policy)
    study_file(tmp_path / "study.zip", small.models)
    refused(tmp_path / "study.zip", site, reason, "the policy's")


def test_a_policy_of_another_site(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, policy={**PERMISSIVE, "site": "beta"})
    study_file(tmp_path / "study.zip", small.models)
    with pytest.raises(SiteFileError, match="the policy is for the site 'beta'"):
        accept(tmp_path / "study.zip", site)


def test_privacy_that_is_too_weak_or_seeded(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, policy=PRIVATE)
    study_file(tmp_path / "study.zip", small.models, private_job(small.models, epsilon=8.0))
    refused(tmp_path / "study.zip", site, ReasonCode.PRIVACY_TOO_WEAK, "epsilon_cap is 4")
    study_file(tmp_path / "seeded.zip", small.models, private_job(small.models, simulation_seed=3))
    refused(tmp_path / "seeded.zip", site, ReasonCode.JOB_INVALID, "simulation_seed")


def test_a_budget_that_was_spent(small: Small, tmp_path: Path) -> None:
    """An earlier run has charged one pair patient; the ledger is as it was after the question."""
    site = fresh_site(tmp_path / "site", small.models, policy=PRIVATE)
    patient = cohorts_of(site)["pair"][0]
    with Ledger.open(site) as ledger:
        ledger.reserve("earlier", Plan("a" * 64, (PROBE,) * 60, 1e-3, 100.0, {"pair": [patient]}))
        before = view(ledger)
    assert 2 < before.worst < 4
    study_file(tmp_path / "study.zip", small.models, private_job(small.models))
    refused(tmp_path / "study.zip", site, ReasonCode.BUDGET_SPENT, f"has spent epsilon {before.worst:.3f}", "cap is 4")
    with Ledger.open(site) as ledger:
        assert view(ledger) == before


def test_other_models_are_not_overwritten(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", build_models(tmp_path / "others", seed=5))
    study_file(tmp_path / "study.zip", small.models)
    error = refused(tmp_path / "study.zip", site, ReasonCode.WEIGHTS_DIFFER, "what is there is not overwritten")
    assert "see the table for the others" in error.fix


def test_models_by_hash_alone_that_the_site_lacks(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, own_models=False)
    study_file(tmp_path / "study.zip", small.models, include=False)
    refused(tmp_path / "study.zip", site, ReasonCode.WEIGHTS_MISSING, "the lab's archive")


@pytest.mark.parametrize("damage", ["weights", "card", "file"])
def test_damaged_models_are_not_overwritten(small: Small, tmp_path: Path, damage: str) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    folder = site.folder / "models" / "new_encoder"
    if damage == "weights":
        (folder / "weights.safetensors").write_bytes(b"torn")
    elif damage == "card":
        (folder / "card.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.write_text("a file in the way")
    study_file(tmp_path / "study.zip", small.models)
    refused(tmp_path / "study.zip", site, ReasonCode.WEIGHTS_MISSING)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"models": None}, ReasonCode.WEIGHTS_MISSING, "names no models"),
        ({"old": {"modality": "ECG", "channels": ["V5"], "rate_hz": 64}}, ReasonCode.WEIGHTS_MISSING, "channel(s) I"),
        ({"new": {"modality": "EEG", "channels": ["P"], "rate_hz": 32}}, ReasonCode.WEIGHTS_MISSING, "it reads PPG"),
        ({"window": {"seconds": 8, "step_seconds": 8}}, ReasonCode.WEIGHTS_MISSING, "windows of 4 s"),
        (
            {"labels": {"source": "recording", "classes": ["fast", "slow"]}},
            ReasonCode.WEIGHTS_MISSING,
            "are not the task head's classes",
        ),
    ],
)
@pytest.mark.parametrize("own_models", [True, False])
def test_recordings_that_do_not_fit(
    small: Small, tmp_path: Path, changes: dict[str, Any], reason: ReasonCode, words: str, own_models: bool
) -> None:
    """Found out whether the site has the models or gets them with the study."""
    site = change_site(fresh_site(tmp_path / "site", small.models, own_models=own_models), **changes)
    study_file(tmp_path / "study.zip", small.models)
    refused(tmp_path / "study.zip", site, reason, words)


def test_everything_that_stands_in_the_way_is_told_at_once(small: Small, tmp_path: Path) -> None:
    policy = {**PERMISSIVE, "max_rounds": 1}
    site = fresh_site(tmp_path / "site", build_models(tmp_path / "others", seed=5), policy=policy)
    study_file(tmp_path / "study.zip", small.models, code=Code(sha256="f" * 64, files={}))
    text = io.StringIO()
    with pytest.raises(NotAcceptedError) as error:
        run_accept(tmp_path / "study.zip", site.path, "me", lambda _: True, Console(file=text, width=300))
    assert error.value.what.endswith("can't be accepted: CODE_NOT_ACCEPTED, TOO_MANY_ROUNDS, WEIGHTS_DIFFER")
    for name in ("CODE_NOT_ACCEPTED", "TOO_MANY_ROUNDS", "WEIGHTS_DIFFER"):
        assert name in text.getvalue()


def test_nobody_to_ask_and_no_as_an_answer(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models, own_models=False)
    study_file(tmp_path / "study.zip", small.models)
    refused(tmp_path / "study.zip", site, ReasonCode.OK, "no terminal to ask at", "--yes", answer=None)
    refused(tmp_path / "study.zip", site, ReasonCode.OK, "the answer was no", answer=False)


def test_a_folder_that_can_only_be_read(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models)
    with read_only(site.folder), pytest.raises(OutputError, match="can't be written"):
        accept(tmp_path / "study.zip", site)
    (site.folder / "studies").write_text("a file in the way")
    with pytest.raises(OutputError, match="can't be recorded"):
        accept(tmp_path / "study.zip", site)
    assert not site.audit_path.exists()


def test_a_damaged_record_is_replaced(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    study_file(tmp_path / "study.zip", small.models)
    accept(tmp_path / "study.zip", site)
    (found,) = accepted(site)
    (found.folder / "job.yaml").write_text("name: other\n")
    accept(tmp_path / "study.zip", site, who="Dr Sommer")
    (again,) = accepted(site)
    assert (again.id, again.acceptance.who, again.job_text) == (found.id, "Dr Sommer", found.job_text)
    assert not [path for path in site.studies_folder.iterdir() if path.name.startswith(".")]


def test_what_steers_a_terminal_is_not_shown() -> None:
    assert plain("a\x1b[31mb\u202ec\u2028d\te\nf\x07ü") == "a[31mbcd\te\nfü"


# the command


def run(*words: object, answer: str = "", terminal: bool = False) -> tuple[int, str]:
    """`fedbridge-site WORDS` in a process of its own: its exit code, and what it says."""
    command = [sys.executable, "-c", "from client.cli import main; main()", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "300", "TERM": "dumb"}
    if not terminal:
        done = subprocess.run(command, input=answer, capture_output=True, text=True, timeout=120, env=environment)
        return done.returncode, done.stdout + done.stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text, sent = b"", False
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1.0)[0]:
                continue
            try:
                text += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not sent and b"[y/N]" in text:
                os.write(ours, answer.encode())
                sent = True
        return process.wait(timeout=30), text.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_command_at_a_terminal_in_a_script_and_without_either(small: Small, tmp_path: Path) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    name = study_file(tmp_path / "study.zip", small.models)
    before = snapshot(site.folder)
    words = ("accept", tmp_path / "study.zip", "--site", site.folder, "--who", "Dr Weber")
    code, text = run(*words, answer="y\n")
    assert (code, "no terminal to ask at" in text) == (5, True)
    code, text = run(*words, answer="n\n", terminal=True)
    assert (code, "the answer was no" in text) == (5, True)
    code, text = run(*words, answer="\n", terminal=True)
    assert code == 5
    assert snapshot(site.folder) == before
    code, text = run(*words, answer="y\n", terminal=True)
    assert code == 0, text
    assert "Does Dr Weber accept this study for the site 'alpha'? [y/N]" in text
    code, text = run("studies", site.folder)
    assert code == 0
    (found,) = accepted(site)
    for part in (
        f"{name}  accepted",
        "by Dr Weber, coordinator 'lab'",
        found.sha256,
        found.bundle_sha256,
        "answered 0",
    ):
        assert part in text
    code, text = run("withdraw", name, "--site", site.folder)
    assert (code, f"{name}: left" in text) == (0, True)
    code, text = run("studies", site.folder)
    assert f"{name}  withdrawn 20" in text
    code, text = run(*words, "--yes")
    assert code == 0, text
    (found.folder / "page.md").write_text("something else")
    code, text = run("studies", site.folder)
    assert code == 5
    assert "page.md: is not as it was" in text
    events = [line.entry.event for line in AuditLog(site.audit_path).verify()]
    assert events == ["accepted", "left", "accepted"]


@pytest.mark.parametrize("who", ["a\nb", "x" * 101, "\x1b[2J"])
def test_a_name_that_can_not_be_put_on_record(small: Small, tmp_path: Path, who: str) -> None:
    site = fresh_site(tmp_path / "site", small.models)
    code, text = run("accept", tmp_path / "study.zip", "--site", site.folder, "--yes", "--who", who)
    assert code == 2
    assert "100 printable characters" in text
