"""Flower's grid in a deployment, made careful: one unreadable reply costs one site its turn, never the run.

Flower pulls all replies in one call, so one that can't be pulled or inflated would raise for all of them, and it asks
a SuperLink that is gone for ever. Here each reply is pulled by itself and no further than `LARGEST_REPLY`, and what
goes on too long is an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run, RunNotRunningException

from server.errors import ReplyError, RunError
from server.replies import UNREADABLE

Result = TypeVar("Result")

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""How long a SuperLink that does not answer is asked again."""
LARGEST_REPLY = 1 << 30
"""Bytes of one reply, at most; the largest that a job can ask for, the moments of a wide encoder, has half of it."""


class CarefulGrid(Grid):
    """Wraps the grid that Flower hands to a ServerApp.

    Raises `RunError` where the SuperLink does not answer for `PATIENCE_SECONDS`, or says that the run is over.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._meter = _Meter()
        # Flower's own default is to ask for ever; its heartbeats share this and take a failure as it is.
        if (retries := getattr(grid, "_retry_invoker", None)) is not None:
            retries.max_time = PATIENCE_SECONDS
        if (client := getattr(grid, "_runtime_client", None)) is not None:
            client.PullObject = self._meter.around(client.PullObject)

    def set_run(self, run: Run) -> None:
        """Take another run's identity."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are online, each with the name under which it was enrolled."""
        return _answered(self._grid.get_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the SuperLink; returns their ids, empty for one that it did not take."""
        listed = list(messages)
        return _answered(partial(self._grid.push_messages, listed)) if listed else []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now; raises what Flower raises for one that can't be read."""
        return [reply for each in message_ids for reply in _answered(partial(self._grid.pull_messages, [each]))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, then collect what has come within `timeout` seconds; an unreadable reply is an error of `UNREADABLE`.

        The time is that of a clock which nobody sets.
        """
        requests = list(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        pushed = self.push_messages(requests)
        waiting = {each: request for each, request in zip(pushed, requests, strict=False) if each}
        replies: list[Message] = []
        while True:
            late = deadline is not None and time.monotonic() >= deadline
            for each, request in list(waiting.items()):
                if came := self._replies(each, request):
                    replies += came
                    del waiting[each]
            if late or not waiting:
                return replies
            time.sleep(POLL_SECONDS if deadline is None else max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))

    def _replies(self, message_id: str, request: Message) -> list[Message]:
        """The replies to one message; whatever else goes wrong with them is that site's."""
        self._meter.reset()
        try:
            return list(self.pull_messages([message_id]))
        except RunError:
            raise
        except Exception:
            return [Message(Error(code=UNREADABLE, reason=""), reply_to=request)]


class _Meter:
    """Counts what is pulled of one reply, in several threads, and breaks off where it is too much."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def reset(self) -> None:
        """Another reply begins."""
        self._bytes = 0

    def around(self, pull: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The call that pulls a piece, which raises `ReplyError` once the pieces are too many."""

        def metered(request: Any) -> Any:
            answer = pull(request)
            with self._lock:
                self._bytes += len(answer.object_content)
                too_much = self._bytes > LARGEST_REPLY
            if too_much:
                raise ReplyError("the reply is too large", why=f"more than {LARGEST_REPLY} bytes")
            return answer

        return metered


def _answered(call: Callable[[], Iterable[Result]]) -> list[Result]:
    try:
        return list(call())
    except httpx.TransportError as error:
        raise RunError(
            "the coordinator's SuperLink does not answer",
            why=f"{type(error).__name__} for {PATIENCE_SECONDS:.0f} s",
            fix="see to the SuperLink (fedbridge-server status), then resume the run",
        ) from error
    except RunNotRunningException as error:
        raise RunError(
            "the run was stopped", why="Flower says that it is no longer running", fix="resume it to go on"
        ) from error
