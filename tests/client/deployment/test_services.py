"""Two sites of one machine, each started, seen, killed and stopped by its commands, against a real SuperLink."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.messages import ReasonCode
from bridge.processes import is_alive, process_id
from bridge.services import running as running_services
from client.deployment.init import initialise
from client.site import Site
from tests.client.deployment.coordinator import BIN, FLOWER, Coordinator, bundle_sha256, tiny_app, wait_for
from tests.client.deployment.deployed import accept_code
from tests.waiting import free_port

pytestmark = pytest.mark.slow


def call(*words: str | Path) -> tuple[int, str]:
    """Exit code and all that `fedbridge-site WORDS` prints."""
    done = subprocess.run(
        [str(BIN / "fedbridge-site"), *map(str, words)],
        env={**os.environ, **FLOWER},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def told(site: Site) -> dict[str, Any]:
    status = json.loads(call("status", site.folder, "--json")[1])
    assert isinstance(status, dict)
    return status


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[Coordinator, list[Site]]]:
    """A running coordinator and two enrolled sites that do not run yet; whatever was started is stopped."""
    coordinator = Coordinator(tmp_path / "coordinator")
    sent = coordinator.write_file(tmp_path / "sent.yaml")
    made = [initialise(tmp_path / name, coordinator=sent, port=free_port()).site for name in ("north", "south")]
    try:
        with coordinator.superlink():
            for site in made:
                coordinator.register(site.keys_folder / "node.pub", site.name)
            yield coordinator, made
    finally:
        for site in made:
            call("stop", site.folder)


def test_two_sites_from_start_to_stop(sites: tuple[Coordinator, list[Site]], tmp_path: Path) -> None:
    coordinator, (north, south) = sites
    app = tiny_app(tmp_path / "app", tmp_path / "ran")
    accept_code(north, coordinator.secret, bundle_sha256(app))
    for site in (north, south):
        assert call("start", site.folder)[0] == 0
    assert "running already" in call("start", north.folder)[1]
    wait_for(lambda: coordinator.statuses() == ["online", "online"])
    for site in (north, south):
        status = told(site)
        assert status["well"], status
        assert status["supernode"].startswith("connected: the coordinator knows this site's key")
        assert abs(status["connection"]["clock_seconds"] or 0) < 5
        assert [each["by"] for each in status["services"]] == ["start", "start"]

    answers = coordinator.run(app, "query.describe")
    assert sorted(code for _, code, _ in answers) == [0, ReasonCode.CODE_NOT_ACCEPTED]
    assert not (tmp_path / "ran").exists()
    assert [each["outcome"] for each in told(north)["messages"]] == ["JOB_INVALID"]
    assert [each["outcome"] for each in told(south)["messages"]] == ["CODE_NOT_ACCEPTED"]

    services = {each.name: each.process for each in running_services(north.state_folder)}
    executor = services["executor"]
    assert executor is not None
    os.kill(executor.pid, signal.SIGKILL)
    wait_for(lambda: not told(north)["well"])
    wait_for(lambda: told(north)["well"])
    restarts = {each["name"]: each["restarts"] for each in told(north)["services"]}
    assert restarts == {"supernode": 0, "executor": 1}
    answers = coordinator.run(app, "query.describe")
    assert sorted(code for _, code, _ in answers) == [0, ReasonCode.CODE_NOT_ACCEPTED]

    code, out = call("stop", north.folder)
    assert (code, sorted(out.removeprefix("ended: ").strip().split(", "))) == (0, ["executor", "supernode"])
    wait_for(lambda: coordinator.statuses() == ["offline", "online"])
    code, out = call("status", north.folder)
    assert code == 1
    assert "the SuperNode's log, before it ended: signed off" in out
    supernode = services["supernode"]
    assert supernode is not None
    assert not is_alive(supernode)
    assert told(south)["well"]


def test_a_site_that_was_not_enrolled_is_told_so(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "coordinator")
    sent = coordinator.write_file(tmp_path / "sent.yaml")
    site = initialise(tmp_path / "north", coordinator=sent, port=free_port()).site
    with coordinator.superlink():
        try:
            assert call("start", site.folder)[0] == 0
            wait_for(lambda: told(site)["supernode"].startswith("refused by the coordinator: the key is not enrolled"))
            assert not told(site)["well"]
        finally:
            call("stop", site.folder)


def test_the_supervisor_was_killed(sites: tuple[Coordinator, list[Site]]) -> None:
    _, (north, _) = sites
    assert call("start", north.folder)[0] == 0
    record = json.loads((north.state_folder / "services.json").read_text())
    services = [each.process for each in running_services(north.state_folder)]
    os.kill(record["supervisor"]["pid"], signal.SIGKILL)
    wait_for(lambda: process_id(record["supervisor"]["pid"]) is None)
    assert call("stop", north.folder)[0] == 0
    assert not any(is_alive(each) for each in services if each is not None)
    assert call("start", north.folder)[0] == 0
    assert call("stop", north.folder)[0] == 0
