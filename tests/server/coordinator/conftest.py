"""A coordinator whose services really run, and ends with the tests whatever happens."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.coordinator import nginx
from server.coordinator.folder import CoordinatorFolder
from simulations.flower_engine import MARK, end_processes
from tests.end_to_end.commands import command, environment
from tests.server.coordinator.places import Keys, SuperNode, made, new_keys, write_request


@dataclass
class Running:
    """A coordinator's folder, driven by the commands; every process carries its mark."""

    folder: CoordinatorFolder
    place: Path
    mark: dict[str, str] = field(default_factory=lambda: {MARK: secrets.token_hex(16)})
    nodes: list[SuperNode] = field(default_factory=list)

    def attempt(self, *arguments: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            [command("fedbridge-server"), *map(str, arguments)],
            env=environment(self.mark),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        return done.returncode, done.stdout

    def call(self, *arguments: str | Path) -> str:
        code, output = self.attempt(*arguments)
        assert code == 0, output
        return output

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("status", self.folder.path, "--json"))
        return found

    def site(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.status()["sites"] if each["name"] == name)
        return found

    def pid(self, name: str) -> int:
        return int(next(each["pid"] for each in self.status()["services"] if each["name"] == name))

    def keys(self, name: str) -> Keys:
        return new_keys(self.place / f"{name}-{secrets.token_hex(4)}.key")

    def enrol(self, name: str) -> Keys:
        keys = self.keys(name)
        request = write_request(self.place / f"{name}.request", name, keys)
        self.call("enrol", request, "--dir", self.folder.path, "--yes")
        return keys

    def node(self, keys: Keys) -> SuperNode:
        node = SuperNode(self.place / "nodes", self.folder, keys, self.mark)
        self.nodes.append(node)
        return node

    def heard(self) -> str:
        """What the SuperLink logged: one line for each request that reached it."""
        return (self.folder.state / "superlink.log").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        for node in self.nodes:
            node.process.kill()
            node.process.wait()
        try:
            self.call("stop", self.folder.path)
        finally:
            end_processes(self.mark[MARK])


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[[], Running]]:
    """Makes a coordinator whose services are not started yet."""
    if nginx.program() is None:
        pytest.skip("nginx is not installed")
    made_here: list[Running] = []

    def make() -> Running:
        running = Running(made(tmp_path / "c"), tmp_path)
        made_here.append(running)
        return running

    yield make
    for each in made_here:
        each.close()
