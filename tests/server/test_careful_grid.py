"""The careful grid: whatever one reply does to Flower's grid, the other replies arrive and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server import careful_grid
from server.careful_grid import PATIENCE_SECONDS, CarefulGrid
from server.errors import RunError
from server.replies import error_code


class Faulty(Grid):
    """A grid like Flower's: it takes all messages at once and raises out of the call that meets a bad reply."""

    def __init__(self, faults: dict[int, Callable[[], object]], after: dict[int, int] | None = None) -> None:
        self.faults, self.after = faults, after or {}
        self.pulled: list[list[str]] = []
        self.sent: dict[str, Message] = {}
        self._run = Run.create_empty(7)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise AssertionError("deprecated in Flower")

    def get_node_ids(self) -> Iterable[int]:
        raise AssertionError("the names would be lost")

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=5, name="a"), NodeInfo(node_id=6, name="b")]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
            refused = message.metadata.dst_node_id == 99
            ids.append("" if refused else message.metadata.message_id)
            self.sent[message.metadata.message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.pulled.append(ids)
        replies = []
        for each in ids:
            node = self.sent[each].metadata.dst_node_id
            if self.after.get(node, 0) >= self.pulled.count(ids):
                continue
            if node in self.faults:
                self.faults[node]()
                continue
            replies.append(Message(RecordDict({"c": ConfigRecord({"node": node})}), reply_to=self.sent[each]))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("it would pull all at once")


def raising(error: BaseException) -> Callable[[], object]:
    def fault() -> object:
        raise error

    return fault


def requests(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=node, message_type="query.describe") for node in nodes]


def status_error(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-messages")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(code, request=request))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(careful_grid, "POLL_SECONDS", 0.02)


BAD = {
    "a child is missing": KeyError("3f2a"),
    "no head": ValueError("Unexpected format"),
    "garbage": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "too deep": RecursionError(),
    "too large": MemoryError(),
    "the SuperLink stumbles over it": status_error(500),
    "the SuperLink refuses it": status_error(400),
}


@pytest.mark.parametrize("error", BAD.values(), ids=BAD.keys())
def test_one_unreadable_reply_costs_one_turn(error: Exception) -> None:
    grid = Faulty({2: raising(error)})
    sent = requests(1, 2, 3)
    replies = {reply.metadata.reply_to_message_id: reply for reply in CarefulGrid(grid).send_and_receive(sent)}
    assert sorted(replies) == ["m1", "m2", "m3"]
    assert [replies[each].content["c"]["node"] for each in ("m1", "m3")] == [1, 3]
    assert error_code(replies["m2"]) == "BAD_REPLY"
    assert replies["m2"].error.reason == ""
    assert grid.pulled == [["m1"], ["m2"], ["m3"]]


def test_late_replies_are_waited_for_and_the_missing_are_left_out() -> None:
    grid = Faulty({3: lambda: None}, after={2: 4})
    started = time.monotonic()
    replies = list(CarefulGrid(grid).send_and_receive(requests(1, 2, 3), timeout=0.5))
    assert sorted(reply.content["c"]["node"] for reply in replies) == [1, 2]
    assert 0.5 <= time.monotonic() - started < 2
    assert grid.pulled.count(["m1"]) == 1  # never asked for again once it came
    assert grid.pulled.count(["m2"]) == 5


def test_what_the_superlink_did_not_take_is_not_waited_for() -> None:
    grid = Faulty({})
    replies = list(CarefulGrid(grid).send_and_receive(requests(1, 99), timeout=60))
    assert [reply.content["c"]["node"] for reply in replies] == [1]
    assert list(CarefulGrid(grid).send_and_receive([], timeout=60)) == []


def test_a_superlink_that_is_gone_ends_the_run_with_a_reason() -> None:
    with pytest.raises(RunError, match="SuperLink does not answer") as caught:
        list(CarefulGrid(Faulty({1: raising(httpx.ConnectError("refused"))})).send_and_receive(requests(1)))
    assert caught.value.why == "ConnectError for 120 s"
    assert "resume" in caught.value.fix


def test_a_stopped_run_ends_with_a_reason() -> None:
    with pytest.raises(RunError, match="the run was stopped"):
        list(CarefulGrid(Faulty({1: raising(RunNotRunningException())})).send_and_receive(requests(1)))


def test_nodes_keep_their_names() -> None:
    grid = CarefulGrid(Faulty({}))
    assert [(node.node_id, node.name) for node in grid.get_nodes()] == [(5, "a"), (6, "b")]
    assert list(grid.get_node_ids()) == [5, 6]
    assert grid.run.run_id == 7


def test_flowers_own_grid_no_longer_asks_for_ever() -> None:
    """Flower's grid has what is set here; where another version has not, this test says so."""
    inner = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    assert inner._retry_invoker.max_time is None
    grid = CarefulGrid(inner)
    assert inner._retry_invoker.max_time == PATIENCE_SECONDS
    inner._retry_invoker.max_time = 0.1
    with pytest.raises(RunError, match="SuperLink does not answer"):
        grid.get_nodes()


def test_a_reply_without_end_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(careful_grid, "LARGEST_REPLY", 250)
    pulled = []

    class Client:
        def PullObject(self, request: int) -> PullObjectResponse:  # noqa: N802 - Flower's name
            pulled.append(request)
            return PullObjectResponse(object_content=b"x" * 100)

    grid = Faulty({2: lambda: [grid._runtime_client.PullObject(i) for i in range(1000)]})  # type: ignore[attr-defined]
    grid.faults[1] = lambda: [grid._runtime_client.PullObject(-i) for i in range(2)]  # type: ignore[attr-defined]
    grid._runtime_client = Client()  # type: ignore[attr-defined]
    replies = list(CarefulGrid(grid).send_and_receive(requests(1, 2, 3), timeout=0.1))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["m2", "m3"]
    assert error_code(replies[0]) == "BAD_REPLY"
    assert max(pulled) == 2  # the third piece was one too many, though two of another reply came before
