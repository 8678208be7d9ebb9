"""What an accepted study opens the door to, and each refusal by its code: nothing is read and nothing leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from bridge.job import Job, job_text
from bridge.messages import SENTENCES, ReasonCode
from bridge.study.manifest import study_id
from bridge.study.signing import new_key, sign
from client.audit import AuditLog
from client.errors import AuditError, NotAcceptedError
from client.site import Site, open_site
from client.study.acceptance import accepted, admitted, differences, leaving, require_code
from client.study.record import FILES, Accepted
from client.study.running import running_bundle, set_running_bundle
from client.study.withdraw import withdraw
from tests.client import sites
from tests.client.agreements import BUNDLE, agree, write_coordinator
from tests.client.sites import PERMISSIVE, Small, build_job, build_site, send, start_arrays, train_config

OTHER = "0123" * 16


@pytest.fixture
def site(small: Small, tmp_path: Path) -> Iterator[Site]:
    """A site without any recording: whatever is refused was refused without one."""
    folder = build_site(tmp_path / "site", "beta", models=small.models, patients=4, policy=PERMISSIVE)
    shutil.rmtree(folder / "recordings")
    yield open_site(folder)
    set_running_bundle("")


@pytest.fixture
def job(small: Small) -> Job:
    return build_job(small.models)


def reason(call: Callable[[], object]) -> tuple[ReasonCode, str]:
    with pytest.raises(NotAcceptedError) as error:
        call()
    return error.value.reason, str(error.value)


def ask(site: Site, text: str, kind: str = "train", config: dict[str, Any] | None = None) -> Message:
    """A message to the site as it is: no study is accepted on the way."""
    wanted = train_config() if config is None else config
    return send({"site": str(site.path)}, text, kind, wanted, start_arrays() if kind == "train" else None)


def code_of(reply: Message) -> ReasonCode:
    """The code of the error with which the site answers; OK where it answers with content."""
    if not reply.has_error():
        return ReasonCode.OK
    code = ReasonCode(reply.error.code)
    assert reply.error.reason == SENTENCES[code]
    return code


# what is accepted


def test_a_study_that_holds_is_admitted_with_its_own_job_and_code_alone(site: Site, job: Job) -> None:
    study = agree(site, job, attempts=3)
    assert accepted(site) == [study]
    assert (study.holds, study.manifest.attempts, study.id) == (True, 3, study_id("small", study.sha256))
    require_code(site, BUNDLE)
    assert admitted(site, job_text(job), BUNDLE) == study


def test_of_two_studies_with_one_job_the_newer_is_taken(site: Site, job: Job) -> None:
    first = agree(site, job, attempts=1)
    content = json.loads((first.folder / "acceptance.json").read_bytes())
    second = agree(site, job, attempts=2)
    assert content["when"] <= second.acceptance.when
    with leaving(site, second):
        pass
    assert admitted(site, job_text(job), BUNDLE).manifest.attempts in (1, 2)
    withdraw(site, first.id, "me")
    assert admitted(site, job_text(job), BUNDLE) == second


# what is not


def test_a_site_that_accepted_nothing(site: Site, job: Job) -> None:
    for call in (lambda: require_code(site, BUNDLE), lambda: admitted(site, job_text(job), BUNDLE)):
        code, text = reason(call)
        assert code == ReasonCode.CODE_NOT_ACCEPTED
        assert "no study was accepted" in text
    assert accepted(site) == []
    assert not site.studies_folder.exists()


def test_other_code(site: Site, job: Job) -> None:
    study = agree(site, job)
    for call in (lambda: require_code(site, OTHER), lambda: admitted(site, job_text(job), OTHER)):
        code, text = reason(call)
        assert code == ReasonCode.CODE_NOT_ACCEPTED
        assert f"'{study.id}' with {BUNDLE[:16]}..." in text
        assert OTHER[:16] in text


def test_the_code_of_one_study_and_the_job_of_another(site: Site, job: Job, small: Small) -> None:
    agree(site, job)
    agree(site, build_job(small.models, name="second"), bundle=OTHER)
    code, text = reason(lambda: admitted(site, job_text(job), OTHER))
    assert code == ReasonCode.CODE_NOT_ACCEPTED
    assert "the study with this job was accepted with other code" in text


def test_no_executor_of_ours(site: Site, job: Job) -> None:
    agree(site, job)
    code, text = reason(lambda: admitted(site, job_text(job), ""))
    assert code == ReasonCode.CODE_NOT_ACCEPTED
    assert "did not come through the executor" in text
    set_running_bundle("")
    assert running_bundle() == ""
    assert code_of(ask(site, job_text(job))) == ReasonCode.CODE_NOT_ACCEPTED


def test_another_job_is_refused_by_the_keys_in_which_it_differs(site: Site, job: Job, small: Small) -> None:
    study = agree(site, job)
    agree(site, build_job(small.models, name="unlike", seed=7, train={"rounds": 99}))
    other = build_job(small.models, train={"rounds": 4, "learning_rate": 0.5}, sites={"expected": ("beta",)})
    code, text = reason(lambda: admitted(site, job_text(other), BUNDLE))
    assert code == ReasonCode.JOB_NOT_ACCEPTED
    assert f"accepted study '{study.id}' in sites.expected, train.learning_rate, train.rounds\n" in text
    assert "0.5" not in text
    more_rounds = job_text(job).replace("rounds: 3", "rounds: 30")
    assert "in train.rounds\n" in reason(lambda: admitted(site, more_rounds, BUNDLE))[1]
    assert "its wording alone" in reason(lambda: admitted(site, job_text(job) + "# more\n", BUNDLE))[1]


def test_differences_name_every_key(small: Small) -> None:
    ours = build_job(small.models)
    theirs = build_job(small.models, seed=1, sites={"weights": {"a": 0.5}}, privacy={"mechanism": "none"})
    assert differences(theirs, ours) == ["seed", "sites.weights", "sites.weights.a"]
    assert differences(ours, ours) == []


def test_a_site_answers_by_the_code_alone_and_reads_nothing(site: Site, job: Job, small: Small) -> None:
    """The recordings are not there: an answer that had needed them would be DATA_UNUSABLE or SITE_MISCONFIGURED."""
    study = agree(site, job)
    before = len(AuditLog(site.audit_path).verify())
    assert code_of(ask(site, job_text(job))) == ReasonCode.SITE_MISCONFIGURED  # this one looks for them
    other = job_text(build_job(small.models, train={"rounds": 4}))
    assert code_of(ask(site, other)) == ReasonCode.JOB_NOT_ACCEPTED
    assert "train.rounds" in site.log_path.read_text()
    set_running_bundle(OTHER)
    assert code_of(ask(site, job_text(job))) == ReasonCode.CODE_NOT_ACCEPTED
    set_running_bundle(BUNDLE)
    withdraw(site, study.id, "me")
    assert code_of(ask(site, job_text(job))) == ReasonCode.STUDY_WITHDRAWN
    described = ask(site, job_text(job), "query.describe", {})
    assert described.content["metrics"]["reason"] == ReasonCode.STUDY_WITHDRAWN
    assert described.content["config"]["can_take_part"] is False
    events = [line.entry.event for line in AuditLog(site.audit_path).verify()][before:]
    assert events == ["refused", "refused", "refused", "left", "refused", "sent", "sent", "sent"]
    assert not site.cache_folder.exists()


def test_swapped_weights_are_refused_though_the_job_was_accepted(site: Site, job: Job, small: Small) -> None:
    other = job.model_copy(update={"models": job.models.model_copy(update={"new_encoder": "0" * 64})})
    agree(site, other)
    assert code_of(ask(site, job_text(other))) == ReasonCode.WEIGHTS_DIFFER


def test_a_simulations_pretend_site_accepts_nothing(small: Small, job: Job, tmp_path: Path) -> None:
    set_running_bundle("")
    build_site(tmp_path / "site-0", "pretend", models=small.models)
    run = {"simulation-folder": str(tmp_path)}
    reply = sites.ask(tmp_path, job, "query.describe", node_config={"partition-id": 0}, run_config=run)
    assert reply.content["config"]["can_take_part"] is True
    assert not (tmp_path / "site-0" / "studies").exists()


# a withdrawn study


def test_a_withdrawn_study_opens_nothing_until_it_is_accepted_again(site: Site, job: Job) -> None:
    study = agree(site, job)
    withdraw(site, study.id, "me")
    (found,) = accepted(site)
    assert (found.holds, found.acceptance.who, found.sha256) == (False, "a test", study.sha256)
    for call in (lambda: require_code(site, BUNDLE), lambda: admitted(site, job_text(job), BUNDLE)):
        assert reason(call)[0] == ReasonCode.STUDY_WITHDRAWN
    agree(site, job)
    assert admitted(site, job_text(job), BUNDLE).holds


def test_a_withdrawn_study_beside_one_that_holds_with_the_same_code(site: Site, job: Job, small: Small) -> None:
    study = agree(site, job)
    other = agree(site, build_job(small.models, name="second"))
    withdraw(site, study.id, "me")
    require_code(site, BUNDLE)
    assert reason(lambda: admitted(site, job_text(job), BUNDLE))[0] == ReasonCode.STUDY_WITHDRAWN
    assert admitted(site, other.job_text, BUNDLE) == other


# a record that is not what was accepted


def _replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new))

    return change


def _signed_by_another(folder: Path) -> None:
    (folder / "study.sig").write_bytes(sign(new_key(), (folder / "study.json").read_bytes()))


def _rewritten(folder: Path) -> None:
    """Another study that is sound in itself and agrees with its record, but for the signature."""
    import hashlib

    content = (folder / "study.json").read_bytes().replace(b'"attempts":2,', b'"attempts":9,')
    (folder / "study.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    record = json.loads((folder / "acceptance.json").read_bytes())
    (folder / "acceptance.json").write_text(json.dumps({**record, "study_sha256": digest}))
    folder.rename(folder.with_name(study_id("small", digest)))


TAMPERED: dict[str, Callable[[Path], object]] = {
    "more attempts": _replaced("study.json", b'"attempts":2', b'"attempts":9'),
    "another signer": _signed_by_another,
    "a rewritten study": _rewritten,
    "a torn signature": lambda folder: (folder / "study.sig").write_bytes(b"short"),
    "another job": _replaced("job.yaml", b"rounds: 3", b"rounds: 9"),
    "another page": lambda folder: (folder / "page.md").write_text("Nothing leaves."),
    "a page of bytes": lambda folder: (folder / "page.md").write_bytes(b"\xff\xfe"),
    "other code": _replaced("acceptance.json", BUNDLE.encode(), OTHER.encode()),
    "another person": _replaced("acceptance.json", b"a test", b"nobody"),
    "another study": _replaced("acceptance.json", b'"study_sha256":"', b'"study_sha256":"0'),
    "an unknown state": _replaced("acceptance.json", b'"accepted"', b'"agreed"'),
    "an unknown key": _replaced("acceptance.json", b'"state"', b'"stage"'),
    "no acceptance": lambda folder: (folder / "acceptance.json").write_text("{}"),
    "no JSON": lambda folder: (folder / "study.json").write_text("{"),
    "another folder": lambda folder: folder.rename(folder.with_name("small-00000000")),
    **{f"no {name}": (lambda folder, name=name: (folder / name).unlink()) for name in FILES},  # type: ignore[misc]
}


@pytest.mark.parametrize("how", list(TAMPERED))
def test_a_changed_record_opens_nothing(site: Site, job: Job, how: str) -> None:
    study = agree(site, job, attempts=2)
    TAMPERED[how](study.folder)
    for call in (
        lambda: accepted(site),
        lambda: require_code(site, BUNDLE),
        lambda: admitted(site, job_text(job), BUNDLE),
    ):
        code, text = reason(call)
        assert code == ReasonCode.STUDY_UNUSABLE
        assert "accept the study again" in text
    assert code_of(ask(site, job_text(job))) == ReasonCode.STUDY_UNUSABLE


def test_a_withdrawn_record_made_to_hold_again_by_hand(site: Site, job: Job) -> None:
    study = agree(site, job)
    before = (study.folder / "acceptance.json").read_bytes()
    withdraw(site, study.id, "me")
    (study.folder / "acceptance.json").write_bytes(before)
    code, text = reason(lambda: require_code(site, BUNDLE))
    assert code == ReasonCode.STUDY_UNUSABLE
    assert "that the site has left it" in text


def test_an_acceptance_that_the_audit_log_does_not_know(site: Site, job: Job) -> None:
    agree(site, job)
    for path in site.folder.glob("audit*"):
        path.unlink()
    code, text = reason(lambda: require_code(site, BUNDLE))
    assert code == ReasonCode.STUDY_UNUSABLE
    assert "knows no acceptance of it" in text


def test_an_audit_log_without_its_lines_says_so_itself(site: Site, job: Job) -> None:
    agree(site, job)
    site.audit_path.write_text("")
    with pytest.raises(AuditError, match="lines are missing at the end"):
        require_code(site, BUNDLE)
    assert code_of(ask(site, job_text(job))) == ReasonCode.STORAGE


def test_the_coordinators_key_was_replaced(site: Site, job: Job) -> None:
    agree(site, job)
    write_coordinator(site, "simulation", new_key())
    assert reason(lambda: require_code(site, BUNDLE))[0] == ReasonCode.STUDY_UNUSABLE
    site.coordinator_path.unlink()
    code, text = reason(lambda: admitted(site, job_text(job), BUNDLE))
    assert code == ReasonCode.STUDY_UNUSABLE
    assert str(site.coordinator_path) in text


def test_a_damaged_record_does_not_stand_in_the_way_of_a_sound_one(site: Site, job: Job, small: Small) -> None:
    damaged: Accepted = agree(site, job)
    (damaged.folder / "page.md").unlink()
    other = agree(site, build_job(small.models, name="second"))
    assert admitted(site, other.job_text, BUNDLE) == other
    assert reason(lambda: admitted(site, job_text(job), BUNDLE))[0] == ReasonCode.STUDY_UNUSABLE
    assert reason(lambda: accepted(site))[0] == ReasonCode.STUDY_UNUSABLE
