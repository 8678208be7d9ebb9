"""Hospitals at the wire: a Grid whose sites answer the real ServerApp with messages made by hand, good ones and bad.

Nothing here uses the client package or the server's own code. Every message is deflated and inflated as Flower would.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from server.app import app

SERVER = 1
Arrays = dict[str, np.ndarray]
Reply = RecordDict | Error | None
Behaviour = Callable[["Site", Message, RecordDict], Reply | list[Reply]]

POSITIONS_NEW, POSITIONS_OLD, CLASSES = 3, 4, 3
WIDTH_NEW, WIDTH_OLD, TOKENS_OLD = 16, 8, 6


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def site_update(name: str, round_: int, broadcast: Arrays) -> Arrays:
    """What an honest site learns: a pull towards a place of its own, and a little of each round."""
    update = {}
    for key, array in broadcast.items():
        place = rng(name, key).normal(size=array.shape)
        noise = rng(name, key, round_).normal(size=array.shape)
        update[key] = (0.3 * (place - array) + 0.05 * noise).astype(np.float32)
    return update


def site_confusions(name: str, broadcast: Arrays, split: str) -> Arrays:
    """Confusion tables that depend on the bridge, so that rounds differ."""
    counts = rng(name, split, float(broadcast["A"].sum())).integers(0, 50, size=(3, CLASSES, CLASSES))
    counts += 40 * np.eye(CLASSES, dtype=np.int64)
    return {f"confusion.{kind}": counts[i] for i, kind in enumerate(("bridge", "teacher", "agreement"))}


@dataclass
class Site:
    """One site; `wrong[message]` or `wrong[message + " " + round]` replaces or spoils its honest reply."""

    name: str
    can_take_part: bool = True
    reason: int = 0
    probe: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.5])
    similarity: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.7, 0.3])
    moments: tuple[np.ndarray, Callable[[int], np.ndarray]] | None = None
    closed_form: Callable[[Arrays], Arrays] | None = None
    weight: float = 1.0
    loss: bool = True
    confusions: bool = True
    wrong: dict[str, Behaviour] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def answer(self, message: Message) -> list[Reply]:
        kind = message.metadata.message_type
        config = dict(message.content.config_records["config"])
        self.seen.append((kind, config))
        honest = self._honest(kind, config, message)
        wrong = self.wrong.get(f"{kind} {config.get('round')}", self.wrong.get(kind))
        reply = honest if wrong is None else wrong(self, message, honest)
        return reply if isinstance(reply, list) else [reply]

    def _honest(self, kind: str, config: dict[str, Any], message: Message) -> RecordDict:
        if kind == "query.describe":
            values = {"site": self.name, "can_take_part": self.can_take_part}
            return RecordDict({"config": ConfigRecord(values), "metrics": MetricRecord({"reason": self.reason})})
        if kind == "query.probe":
            if self.moments is not None:
                return arrays_of({"probe_moments": self.moments[0]})
            return arrays_of({"probe_scores": np.array(self.probe)})
        if kind == "query.similarity":
            if self.moments is not None:
                return arrays_of({"similarity_moments": self.moments[1](config["input-position"])})
            return arrays_of({"similarity_scores": np.array(self.similarity)})
        broadcast = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        assert all(array.dtype == np.float32 for array in broadcast.values())
        if kind == "train":
            update = site_update(self.name, config["round"], broadcast)
            metrics = {"weight": self.weight} | ({"train_loss": self.train_loss(config["round"])} if self.loss else {})
            reply = arrays_of({f"update.{name}": array for name, array in update.items()})
            reply["metrics"] = MetricRecord(metrics)
            return reply
        if kind == "query.closed_form":
            assert self.closed_form is not None
            return arrays_of(self.closed_form(broadcast))
        assert kind == "evaluate"
        return arrays_of(site_confusions(self.name, broadcast, config["split"])) if self.confusions else RecordDict()

    def train_loss(self, round_: int) -> float:
        return float(rng(self.name, "loss", round_).uniform(0.1, 1.0))


def arrays_of(arrays: Arrays) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})})


class WireGrid(Grid):
    """Sites by node id. Replies arrive in an order drawn from `shuffle`; `stop_at` ends the process's run at that
    message as a crash would."""

    def __init__(self, sites: Iterable[Site], shuffle: int = 0, online_after: dict[int, int] | None = None) -> None:
        self.sites = {1000 + i: site for i, site in enumerate(sites)}
        self.random = random.Random(shuffle)
        self.online_after = online_after or {}
        self.polls = 0
        self.stop_at: str | None = None
        self.offline: set[int] = set()
        self.enrolled: dict[int, str] = {}
        self.timeouts: list[float | None] = []
        self.bytes_down = self.bytes_up = 0
        self._run = Run.create_empty(7)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SERVER

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated in Flower")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError("not needed here")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise AssertionError("not needed here")

    def get_node_ids(self) -> Iterable[int]:
        self.polls += 1
        nodes = [n for n in self.sites if self.polls > self.online_after.get(n, 0) and n not in self.offline]
        self.random.shuffle(nodes)
        return nodes

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.enrolled.get(node, "")) for node in self.get_node_ids()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.timeouts.append(timeout)
        replies: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._stop_where_asked(message)
            replies += self._replies(message)
        self.random.shuffle(replies)
        return replies

    def _stop_where_asked(self, message: Message) -> None:
        config = message.content.config_records["config"]
        kind = message.metadata.message_type
        if self.stop_at in (kind, f"{kind} {config.get('round')}", f"{kind} {config.get('split')}"):
            raise Crash(self.stop_at)

    def _replies(self, message: Message) -> list[Message]:
        arrived = over_the_wire(message)
        self.bytes_down += array_bytes(arrived)
        sent = []
        for content in self.sites[message.metadata.dst_node_id].answer(arrived):
            if content is not None:
                reply = over_the_wire(Message(content, reply_to=arrived))
                self.bytes_up += array_bytes(reply)
                sent.append(reply)
        return sent


class Crash(BaseException):
    """Ends a run in the middle, as nothing in the server expects."""


def over_the_wire(message: Message) -> Message:
    with_id = message.metadata.message_id
    objects = {object_id: each.deflate() for object_id, each in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message.object_id, objects)
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = with_id
    return copy


def array_bytes(message: Message) -> int:
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def job_text(digests: dict[str, str], **changes: Any) -> str:
    """A small job; `changes` are merged into its sections."""
    job: dict[str, Any] = {
        "name": "wire",
        "seed": 3,
        "models": digests,
        "selection": {"mode": "scores"},
        "bridge": {"rank": 2, "prototypes": 4},
        "train": {"rounds": 3},
        "sites": {"minimum": 2, "wait_seconds": 0.3, "timeout_seconds": 5, "retries": 1},
    }
    for key, value in changes.items():
        job[key] = {**job.get(key, {}), **value} if isinstance(value, dict) else value
    names = job["sites"].pop("expected", None)
    if names:
        job["sites"]["expected"] = list(names)
    return yaml.safe_dump(job)


def run_server(grid: WireGrid, folder: Path, models: Path, job: str, resume: bool = False) -> None:
    """Call the real ServerApp as Flower does."""
    run_config = {
        "job": job,
        "run-folder": str(folder),
        "models-folder": str(models),
        "simulation-folder": "",
        "engine": "local",
        "resume": resume,
    }
    app(grid, Context(7, SERVER, {}, RecordDict(), run_config))
