"""Flower's own loop and node state, with a coordinator of two functions and a ClientApp that the test plays: which
replies are sent before the next message is fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flwr.supernode.start_client_internal as flower
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory

from client.deployment.in_step import InStep

ENDED, RUN = 6, 7


class Node:
    """The state of a node that knows two runs, and what its loop sent to whom."""

    def __init__(self) -> None:
        self.stores = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=self.stores).state()
        self.state.set_node_id(5)
        for run in (ENDED, RUN):
            self.state.store_run(Run.create_empty(run))
        self.sent: list[tuple[str, int]] = []

    def pull(self, function: Callable[..., int | None], message: Message, ends: str = "") -> int | None:
        """Fetch this message; with `ends`, its run ends while its parts are fetched or when that is confirmed."""
        parts = get_all_nested_objects(message)

        def pull_object(run: int, name: str) -> bytes:
            if ends == "fetching":
                raise RunNotRunningException
            return bytes(parts[name].deflate())

        def confirm(run: int, name: str) -> None:
            if ends == "confirming":
                raise RunNotRunningException

        return function(
            state=self.state,
            object_store=self.stores.store(),
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=None,
            get_fab=None,
            pull_object=pull_object,
            confirm_message_received=confirm,
            trusted_entities=None,
        )

    def push(self, function: Callable[..., None]) -> None:
        def send(message: Message, *_: Any) -> tuple[set[str], str]:
            self.sent.append((message.metadata.reply_to_message_id, message.error.code if message.has_error() else 0))
            return set(), "session"

        function(state=self.state, object_store=self.stores.store(), send=send, push_object=None)

    def answer(self, message: Message, code: int = 0) -> None:
        """As the process of a task does: the reply, then the end of the task."""
        reply = Message(Error(code), reply_to=message) if code else Message(RecordDict(), reply_to=message)
        flower._insert_message(reply, self.state, self.stores.store())
        self.end(message)

    def end(self, message: Message) -> None:
        for task in self.state.get_tasks(run_ids=[message.metadata.run_id]):
            self.state.finish_task(task.task_id, SubStatus.FAILED, "")


def question(text: str, run: int = RUN) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, 1
    message = Message(RecordDict({"config": ConfigRecord({"text": text})}), dst_node_id=5, message_type="query")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def name(message: Message) -> str:
    return str(message.metadata.message_id)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def loop() -> InStep:
    return InStep(flower)


def test_flowers_loop_takes_any_reply_for_the_awaited_one(node: Node) -> None:
    """Why there is `in_step`: where this fails, Flower has mended it."""
    old, first = question("old", ENDED), question("first")
    node.pull(flower._pull_and_store_message, old)
    node.answer(old)
    assert node.pull(flower._pull_and_store_message, first) == RUN
    node.push(flower._push_messages)
    assert node.sent == [(name(old), 0)]


def test_a_reply_that_was_left_does_not_stand_for_the_awaited_one(node: Node, loop: InStep) -> None:
    old, first = question("old", ENDED), question("first")
    node.pull(loop.pull, old)
    node.answer(old)
    assert node.pull(loop.pull, first) == RUN
    threading.Timer(1.0, node.answer, [first]).start()
    node.push(loop.push)
    assert node.sent == [(name(old), 0), (name(first), 0)]


def test_a_second_reply_to_the_message_before_does_neither(node: Node, loop: InStep) -> None:
    first, second = question("first"), question("second")
    node.pull(loop.pull, first)
    node.answer(first)
    node.push(loop.push)
    node.answer(first, ErrorCode.CLIENT_APP_CRASHED)
    node.pull(loop.pull, second)
    threading.Timer(1.0, node.answer, [second]).start()
    node.push(loop.push)
    assert node.sent == [(name(first), 0), (name(first), ErrorCode.CLIENT_APP_CRASHED), (name(second), 0)]


@pytest.mark.parametrize("ends", ["fetching", "confirming"])
def test_of_a_run_that_ends_while_its_message_is_fetched_nothing_is_left(node: Node, loop: InStep, ends: str) -> None:
    old = question("old", ENDED)
    assert node.pull(loop.pull, old, ends) is None
    assert not node.state.get_messages_legacy()
    assert [task.status.status for task in node.state.get_tasks()] == ["finished"]


@pytest.mark.parametrize("ends", ["fetching", "confirming"])
def test_flower_leaves_its_message_and_its_task(node: Node, ends: str) -> None:
    """Why there is `in_step`: where this fails, Flower has mended it."""
    assert node.pull(flower._pull_and_store_message, question("old", ENDED), ends) is None
    assert len(node.state.get_messages_legacy()) == 1
    assert [task.status.status for task in node.state.get_tasks()] == ["pending"]


def test_a_message_whose_task_ended_without_a_reply_is_answered(node: Node, loop: InStep) -> None:
    """Its process was killed before it took the message: Flower would wait for ever."""
    first = question("first")
    node.pull(loop.pull, first)
    threading.Timer(1.0, node.end, [first]).start()
    node.push(loop.push)
    assert node.sent == [(name(first), ErrorCode.CLIENT_APP_CRASHED)]
    assert not node.state.get_messages_legacy()


def test_a_reply_that_comes_with_the_end_of_its_task_is_the_one_that_is_sent(node: Node, loop: InStep) -> None:
    first = question("first")
    node.pull(loop.pull, first)
    node.answer(first)
    node.push(loop.push)
    assert node.sent == [(name(first), 0)]


def test_a_task_that_no_executor_took_yet_is_waited_for(node: Node, loop: InStep) -> None:
    first = question("first")
    node.pull(loop.pull, first)
    assert [task.type for task in node.state.get_tasks()] == [TaskType.CLIENT_APP]
    waiting = threading.Thread(target=node.push, args=[loop.push], daemon=True)
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    assert node.sent == []
    node.answer(first)
    waiting.join(10)
    assert node.sent == [(name(first), 0)]
