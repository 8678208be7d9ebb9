"""Real processes: a SuperLink with TLS and node authentication, and a site's SuperNode and pinned executor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.messages import SENTENCES, ReasonCode
from client.site import Site
from tests.client.deployment.coordinator import BIN, Coordinator, bundle_sha256, process, tiny_app, wait_for
from tests.client.deployment.deployed import accept_code, plain_site
from tests.waiting import free_port

pytestmark = pytest.mark.slow


@dataclass
class Running:
    coordinator: Coordinator
    site: Site
    folder: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator and one site, whose services start in a folder with a `client` package that leaves a mark."""
    folder = tmp_path_factory.mktemp("pinned run")
    coordinator = Coordinator(folder / "coordinator")
    site = plain_site(folder / "a site's folder", free_port())
    coordinator.write_file(site.coordinator_path)
    site.state_folder.mkdir()
    for place in (folder / "elsewhere", site.state_folder):
        in_the_way = place / "client"
        in_the_way.mkdir(parents=True)
        (in_the_way / "__init__.py").write_text(f"open({str(folder / 'in-the-way')!r}, 'w').close()\n")
    with coordinator.superlink():
        coordinator.register(site.keys_folder / "node.pub", "north")
        command = BIN / "fedbridge-site"
        cwd = folder / "elsewhere"
        with (
            process(command, "supernode", site.folder, log=folder / "supernode.out", cwd=cwd),
            process(command, "executor", site.folder, log=folder / "executor.out", cwd=cwd),
        ):
            wait_for(lambda: coordinator.statuses() == ["online"])
            yield Running(coordinator, site, folder)


def unpacked(running: Running) -> list[Path]:
    """Everything below the `apps` folders of the site's Flower."""
    return [path for apps in running.site.folder.rglob("apps") for path in apps.rglob("*")]


def refusals(site: Site) -> list[str]:
    lines = site.audit_path.read_text().splitlines() if site.audit_path.exists() else []
    return [entry["purpose"] for line in lines if (entry := json.loads(line))["event"] == "refused"]


def test_an_accepted_bundle_runs_the_installed_app(running: Running) -> None:
    mark = running.folder / "accepted-ran"
    app = tiny_app(running.folder / "accepted", mark)
    accept_code(running.site, running.coordinator.secret, bundle_sha256(app))
    told = running.coordinator.run(app, "query.describe query.nothing")
    kind, code, content = told[0]
    assert (kind, code) == ("query.describe", 0)
    assert content["config"] == {"site": "north", "can_take_part": False}
    assert content["metrics"]["reason"] == ReasonCode.JOB_INVALID
    assert told[1] == ["query.nothing", ReasonCode.INTERNAL, SENTENCES[ReasonCode.INTERNAL]]
    assert not mark.exists()
    assert unpacked(running) == []
    assert not (running.folder / "in-the-way").exists()
    efforts = [json.loads(line) for line in (running.site.state_folder / "messages.jsonl").read_text().splitlines()]
    assert [(each["message"], each["outcome"]) for each in efforts] == [
        ("query.describe", "JOB_INVALID"),
        ("query.nothing", "INTERNAL"),
    ]
    assert all(0.1 < each["seconds"] < 60 and 2e7 < each["peak_bytes"] < 2e9 for each in efforts)


def test_one_changed_line_is_refused_and_never_unpacked(running: Running) -> None:
    mark = running.folder / "changed-ran"
    app = tiny_app(running.folder / "sound", mark)
    accept_code(running.site, running.coordinator.secret, bundle_sha256(app), name="another")
    changed = tiny_app(running.folder / "changed", mark, extra="# one more line\n")
    before = len(refusals(running.site))
    told = running.coordinator.run(changed, "query.describe train query.nothing")
    refused = [ReasonCode.CODE_NOT_ACCEPTED, SENTENCES[ReasonCode.CODE_NOT_ACCEPTED]]
    assert told == [["query.describe", *refused], ["train", *refused], ["query.nothing", *refused]]
    assert not mark.exists()
    assert unpacked(running) == []
    assert refusals(running.site)[before:] == ["answered by CODE_NOT_ACCEPTED alone"] * 3
    assert "was not accepted" in running.site.log_path.read_text()


def test_flowers_own_node_would_have_run_it(running: Running) -> None:
    """The control: the same bundle on a SuperNode that is not ours leaves the mark and is unpacked."""
    mark = running.folder / "control-ran"
    app = tiny_app(running.folder / "control", mark)
    other = plain_site(running.folder / "stock", free_port(), site="stock")
    running.coordinator.register(other.keys_folder / "node.pub", "stock")
    command = [BIN / "flower-supernode", "--superlink", f"127.0.0.1:{running.coordinator.port}"]
    command += ["--root-certificates", running.coordinator.authority.ca]
    command += ["--auth-supernode-private-key", other.keys_folder / "node.key"]
    command += ["--port", str(other.file.deployment.port)]
    environment = {"FLWR_HOME": str(running.folder / "stock-home"), "PATH": str(BIN)}
    with process(*command, log=running.folder / "stock.out", cwd=running.folder, environment=environment):
        wait_for(lambda: running.coordinator.statuses() == ["online", "online"])
        told = running.coordinator.run(app, "query.describe")
    assert sorted(code for _, code, _ in told) == [0, ReasonCode.CODE_NOT_ACCEPTED]
    assert [content["config"] for _, code, content in told if code == 0] == [{"site": "the bundle's own code"}]
    assert mark.exists()
    assert list((running.folder / "stock-home" / "apps").iterdir()) != []
    assert unpacked(running) == []
