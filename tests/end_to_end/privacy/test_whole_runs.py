"""Whole runs by the real server, noise on: what passes between server and sites looks the same with one patient less,
down to a site without any."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from bridge.job import Job, job_text
from simulations.local_grid import run_local
from tests.end_to_end.privacy.neighbours import Asked as Seen
from tests.end_to_end.privacy.neighbours import Cohorts, Mechanism, Pool, Reply, build_world, private_job, read_reply

Line = tuple[str, str, int, int, tuple[Any, ...], int]
"""Direction, type, site, code, what each value is (numbers, texts and flags in full), and bytes."""


def run(pool: Pool, world: Path, job: Job, sites: int, out: Path) -> tuple[list[Line], list[str]]:
    """All messages of a run in the order in which the server sent and got them, and the keys of its record."""
    from client.app import app as client_app
    from server.app import app as server_app

    lines: list[Line] = []

    def watched(grid: Grid) -> Grid:
        push, pull = grid.push_messages, grid.pull_messages

        def push_messages(messages: Iterable[Message]) -> Iterable[str]:
            kept = list(messages)
            lines.extend(_line("asked", message, message.metadata.dst_node_id) for message in kept)
            return push(kept)

        def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(pull(message_ids))
            lines.extend(_line("answered", message, message.metadata.src_node_id) for message in found)
            return found

        grid.push_messages, grid.pull_messages = push_messages, pull_messages  # type: ignore[method-assign]
        return grid

    values: dict[str, str | int | float | bool] = {
        "job": job_text(job),
        "run-folder": str(out),
        "models-folder": str(pool.models),
        "simulation-folder": str(world),
        "run-key": secrets.token_hex(16),
        "engine": "local",
        "resume": False,
    }
    run_local(server_app, client_app, values, sites, wrap=watched)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    return lines, sorted(_keys(record))


def _line(direction: str, message: Message, node: int) -> Line:
    reply = read_reply(message, Reply(0, Seen(direction)))
    plain = tuple(sorted((name, value) for name, value in reply.values.items() if name not in reply.arrays))
    # Which positions are chosen comes from noised sums.
    plain = tuple(each for each in plain if direction == "answered" or "position" not in each[0])
    return direction, message.metadata.message_type, node, reply.code, (*map(tuple, reply.form), *plain), reply.size


def _keys(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in _keys(each, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for index, each in enumerate(value) for found in _keys(each, f"{path}.{index}")]
    return [f"{path}: {type(value).__name__}"]


@pytest.mark.parametrize("mechanism", ["central", pytest.param("local", marks=pytest.mark.slow)])
def test_runs_of_neighbours_look_the_same(pool: Pool, tmp_path: Path, mechanism: Mechanism) -> None:
    names = pool.patients
    job = private_job(pool, mechanism, strategy={"name": "FedAdam"}, train={"keep": "best"}, seed=2)
    beside = Cohorts(names[1:5], names[5:7], names[7:9])
    runs = []
    for number, here in enumerate((Cohorts(names[:1]), Cohorts())):
        world = build_world(pool, tmp_path / f"world-{number}", [here, beside])
        runs.append(run(pool, world, job, 2, tmp_path / f"run-{number}"))
    (lines, record), (other_lines, other_record) = runs
    assert lines == other_lines
    assert record == other_record
    # Two sites, each asked and answering: describe, probe, similarity, two rounds, validation, test.
    assert len(lines) == 2 * 2 * (3 + 2 + 1 + 1)
    assert {line[3] for line in lines} == {0}
