"""The task's command from inside: what is chosen for a bundle, and what surrounds every answer."""

from __future__ import annotations

import hashlib
import importlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from bridge.messages import SENTENCES, ReasonCode
from bridge.study.signing import new_key
from client.app import app as installed_app
from client.deployment.clientapp import answering, app_for, outcome_of, pinned_clientapp
from client.site import Site
from client.study import running
from tests.client.deployment.coordinator import Coordinator
from tests.client.deployment.deployed import accept_code, plain_site

BUNDLE = b"some bundle"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site that accepted `BUNDLE`."""
    site = plain_site(tmp_path / "north", 9094)
    site.state_folder.mkdir()
    coordinator = Coordinator(tmp_path / "there")
    coordinator.secret = new_key()
    coordinator.write_file(site.coordinator_path)
    accept_code(site, coordinator.secret, hashlib.sha256(BUNDLE).hexdigest())
    yield site
    running.set_running_bundle("")


def asked(kind: str = "query.describe", **config: Any) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    message = Message(RecordDict({"config": ConfigRecord(config)}), 12, kind)
    message.metadata.__dict__["_message_id"] = secrets.token_hex(8)
    return message


def context(site: Path, **run_config: Any) -> Context:
    return Context(7, 12, {"site": str(site)}, RecordDict(), {"job": "", **run_config})


def efforts(site: Site) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site.state_folder / "messages.jsonl").read_text().splitlines()]


def refused(app: Callable[[Message, Context], Message], site: Site, code: ReasonCode) -> None:
    for kind in ("query.describe", "train", "evaluate.other"):
        reply = answering(site, app)(asked(kind), context(site.path))
        assert (reply.error.code, reply.error.reason) == (code, SENTENCES[code])


def test_the_accepted_bundle_gets_the_installed_app(site: Site) -> None:
    assert app_for(site, BUNDLE) is installed_app
    assert running.running_bundle() == hashlib.sha256(BUNDLE).hexdigest()


def test_another_bundle_gets_its_code_and_nothing_else(site: Site) -> None:
    refused(app_for(site, BUNDLE + b"."), site, ReasonCode.CODE_NOT_ACCEPTED)
    assert running.running_bundle() == ""
    assert [each["outcome"] for each in efforts(site)] == ["CODE_NOT_ACCEPTED"] * 3
    assert [line["event"] for line in map(json.loads, site.audit_path.read_text().splitlines())][1:] == ["refused"] * 3


def test_a_tampered_record_is_named_so(site: Site) -> None:
    (folder,) = (each for each in site.studies_folder.iterdir() if each.is_dir())
    (folder / "study.sig").write_bytes(bytes(64))
    refused(app_for(site, BUNDLE), site, ReasonCode.STUDY_UNUSABLE)


def test_code_that_was_changed_under_a_running_executor_answers_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridge.errors import CodeError
    from client.deployment import clientapp

    def changed() -> None:
        raise CodeError("1 file(s) of fedbridge are not as they were installed")

    monkeypatch.setattr(clientapp, "check_installation", changed)
    refused(app_for(site, BUNDLE), site, ReasonCode.CODE_NOT_ACCEPTED)
    assert "not as they were installed" in site.log_path.read_text()


def test_whatever_gets_past_the_app_leaves_as_a_code(site: Site) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise ValueError("patient 17 has a secret")

    reply = answering(site, broken)(asked("train", round=3), context(site.path))
    assert (reply.error.code, reply.error.reason) == (ReasonCode.INTERNAL, SENTENCES[ReasonCode.INTERNAL])
    (effort,) = efforts(site)
    assert (effort["run"], effort["message"], effort["round"], effort["outcome"]) == ("7", "train", 3, "INTERNAL")
    assert effort["seconds"] > 0
    assert effort["peak_bytes"] > 1e7


def test_the_message_of_another_site_is_not_answered(site: Site, tmp_path: Path) -> None:
    other = plain_site(tmp_path / "south", 9094, site="south")
    reply = answering(site, app_for(site, BUNDLE))(asked(), context(other.path))
    assert reply.error.code == ReasonCode.SITE_MISCONFIGURED
    assert "different sites" in other.log_path.read_text()


def test_a_link_to_the_site_is_the_site(site: Site, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(site.folder)
    reply = answering(site, app_for(site, BUNDLE))(asked(), context(tmp_path / "link" / "site.yaml"))
    assert reply.content["config"]["site"] == "north"
    assert outcome_of(reply) == "JOB_INVALID"


def test_flowers_own_command_is_held_to_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replaced names are what `run_clientapp` calls, and nothing is installed at run time."""
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    for name in ("install_from_fab", "get_load_client_app_fn", "install_app_dependencies"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))
    pinned_clientapp(site)
    assert runtime.install_from_fab(BUNDLE + b".", skip_prompt=True) is None
    load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    reply = load("nobody/tiny", "0.1.0", "00")(message=asked(), context=context(site.path))
    assert reply.error.code == ReasonCode.CODE_NOT_ACCEPTED
    with pytest.raises(RuntimeError, match="installs nothing"):
        runtime.install_app_dependencies("somewhere")
    assert not list(site.folder.rglob("apps"))
