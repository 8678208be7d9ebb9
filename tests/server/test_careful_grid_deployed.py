"""The careful grid on Flower's own: a real SuperLink, two SuperNodes, and replies that one of them garbles."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.flower_command import FlowerCommand
from tests.client.deployment.coordinator import BIN, Coordinator, process, wait_for
from tests.waiting import free_port

pytestmark = pytest.mark.slow

HONEST, KINDS = "honest", ("body", "large", "honest")

SERVER = """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from server import careful_grid
from server.careful_grid import CarefulGrid
from server.replies import error_code

app = ServerApp()

@app.main()
def main(grid, context):
    careful_grid.LARGEST_REPLY = 1_000_000
    if context.run_config["careful"]:
        grid = CarefulGrid(grid)
    deadline = time.monotonic() + 60
    while len(list(grid.get_nodes())) < 2 and time.monotonic() < deadline:
        time.sleep(0.3)
    names = {node.node_id: node.name for node in grid.get_nodes()}
    told = []
    for how in context.run_config["kinds"].split():
        content = RecordDict({"config": ConfigRecord({"how": how})})
        sent = [Message(content, node, "query.ask") for node in names]
        replies = list(grid.send_and_receive(sent, timeout=90))
        by_id = {message.metadata.message_id: names[message.metadata.dst_node_id] for message in sent}
        told.append([how, {
            by_id[r.metadata.reply_to_message_id]: error_code(r) if r.has_error() else r.content["metrics"]["x"]
            for r in replies
        }])
    with open(context.run_config["out"], "w") as file:
        json.dump(told, file)
"""

CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

def garble():
    honest = MetricRecord.deflate
    def deflate(self):
        head, _, body = honest(self).partition(b"\\x00")
        return head + b"\\x00" + b"\\xff" * len(body)
    MetricRecord.deflate = deflate

@app.query("ask")
def ask(message, context):
    how = message.content["config"]["how"]
    more = {}
    if context.node_config["site"] == "b":
        if how == "large":
            more = {"more": [0.5] * 300_000}
        elif how == "body":
            garble()
    return Message(RecordDict({"metrics": MetricRecord({"x": 1.5, **more})}), reply_to=message)
"""

PYPROJECT = """
[project]
name = "garbled"
version = "0.1.0"
description = "a tiny app"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "garbledapp.serving:app"
clientapp = "garbledapp.asking:app"
[tool.flwr.app.config]
out = ""
kinds = ""
careful = true
"""


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerCommand]:
    place = tmp_path_factory.mktemp("garbled")
    coordinator = Coordinator(place)
    package = place / "app" / "garbledapp"
    package.mkdir(parents=True)
    (place / "app" / "pyproject.toml").write_text(PYPROJECT)
    for name, text in (("__init__", ""), ("serving", SERVER), ("asking", CLIENT)):
        (package / f"{name}.py").write_text(text)
    with ExitStack() as stack:
        stack.enter_context(coordinator.superlink())
        for name in ("a", "b"):
            home = place / name
            home.mkdir()
            key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(home / "node.key")]
            subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
            coordinator.register(home / "node.key.pub", name)
            command: list[str | Path] = [BIN / "flower-supernode", "--superlink", f"127.0.0.1:{coordinator.port}"]
            command += ["--root-certificates", coordinator.authority.ca, "--auth-supernode-private-key"]
            command += [home / "node.key", "--node-config", f'site="{name}"', "--port", str(free_port())]
            environment = {"FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
            stack.enter_context(process(*command, log=home / "log", cwd=home, environment=environment))
        yield FlowerCommand(place / "home", {})


def run(flower: FlowerCommand, place: Path, app: Path, kinds: tuple[str, ...], careful: bool) -> tuple[str, Path]:
    out = place / "told.json"
    config = f"out='{out}' kinds='{' '.join(kinds)}' careful={str(careful).lower()}"
    answer = flower.ask("run", str(app), "test", "--run-config", config)
    assert answer["success"], answer
    run_id = str(answer["run-id"])

    def status() -> str:
        return str(flower.ask("list", "test", "--run-id", run_id)["runs"][0]["status"])

    wait_for(lambda: status().startswith("finished"), 500)
    return status(), out


@pytest.fixture(scope="module")
def app(flower: FlowerCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(tmp_path_factory.getbasetemp().glob("garbled*/app"))


def test_each_garbled_reply_costs_its_sender_that_turn_alone(flower: FlowerCommand, app: Path, tmp_path: Path) -> None:
    status, out = run(flower, tmp_path, app, KINDS, careful=True)
    assert status == "finished:completed"
    told = dict(json.loads(out.read_text()))
    assert list(told) == list(KINDS)
    for how, answers in told.items():
        assert answers == {"a": 1.5, "b": 1.5 if how == HONEST else "BAD_REPLY"}, how


def test_the_same_replies_end_a_run_on_flowers_own_grid(flower: FlowerCommand, app: Path, tmp_path: Path) -> None:
    """Otherwise the careful grid would be careful about nothing."""
    assert run(flower, tmp_path, app, KINDS[:1], careful=False)[0] == "finished:failed"
