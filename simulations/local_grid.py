"""Many sites in one process: the very same ServerApp and ClientApp, joined by a Grid of our own instead of a network.

Every message travels through Flower's wire format both ways (deflated, then inflated), so nothing is shared between
server and sites by accident and what can't be serialised fails here as it would in deployment. What a ClientApp raises
comes back as an error reply of code 2, as Flower's own runtime answers.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.errors import EngineError
from simulations.wire import Wire, contents, deflate, inflate

RunConfig = Mapping[str, str | int | float | bool]
AnswerMessage = Callable[[Message, Context], Message]
"""A `ClientApp`, or what stands for one."""

_SERVER_NODE = 1
_FIRST_NODE = 1_000_000_007
"""Node ids say nothing about partitions in Flower; here they only keep their order."""
_RAISED = 2
_DAY = 86400.0


class LocalGrid(Grid):
    """A Grid whose sites live in this process; `workers` of them compute at the same time.

    A site works on one message at a time, and keeps one `Context` for the whole run. Replies come back in the order of
    the sites, whoever answered first. A reply that is later than the timeout of its exchange is dropped.
    """

    def __init__(self, client_app: AnswerMessage, run_config: RunConfig, sites: int, workers: int = 2) -> None:
        if sites < 1 or workers < 1:
            raise EngineError(f"{sites} sites and {workers} workers can't run", why="at least one of each is needed")
        self._client_app = client_app
        self._run = Run.create_empty(secrets.randbits(62) + 1)
        # Flower's Message asks the process who it is; in a simulation that is always the server.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, _SERVER_NODE
        self._contexts = {
            _FIRST_NODE + i: Context(
                self._run.run_id,
                _FIRST_NODE + i,
                {"partition-id": i, "num-partitions": sites},
                RecordDict(),
                dict(run_config),
            )
            for i in range(sites)
        }
        self._locks = {node: threading.Lock() for node in self._contexts}
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="site")
        self._pending: dict[str, Future[Message]] = {}

    def set_run(self, run: Run) -> None:
        """Take another run's identity."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All sites, in the order of their partitions: they are online from the start."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its site, which starts as soon as a worker is free; returns the message ids."""
        ids = []
        for message, wire in zip(*_deflate_all(messages), strict=True):
            message_id = secrets.token_hex(16)
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = self._pool.submit(self._answer, wire, message_id)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now, each of them once, in the order of the sites."""
        done = [each for each in message_ids if each in self._pending and self._pending[each].done()]
        replies = [self._pending.pop(each).result() for each in done]
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, wait for all replies or until `timeout` seconds are over, and give what has come."""
        ids = list(self.push_messages(messages))
        deadline = time.monotonic() + (_DAY if timeout is None else timeout)
        wait([self._pending[each] for each in ids], timeout=deadline - time.monotonic())
        replies = self.pull_messages(ids)
        for late in ids:
            if (future := self._pending.pop(late, None)) is not None:
                future.cancel()
        return replies

    def close(self) -> None:
        """Take no more messages; a site that is still computing ends by itself and nobody waits for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, wire: Wire, message_id: str) -> Message:
        """One site's turn: inflate, call the ClientApp, and send its reply (or its error) back through the wire."""
        message = inflate(wire)
        message.metadata.__dict__["_message_id"] = message_id
        node = message.metadata.dst_node_id
        with self._locks[node]:
            try:
                reply = inflate(deflate(self._client_app(message, self._contexts[node])))
            except Exception as error:
                failure = Error(code=_RAISED, reason=f"{type(error)}:<'{error}'>")
                reply = inflate(deflate(Message(failure, reply_to=message)))
        reply.metadata.__dict__["_message_id"] = secrets.token_hex(16)
        return reply


def run_local(
    server_app: ServerApp,
    client_app: AnswerMessage,
    run_config: RunConfig,
    sites: int,
    workers: int = 2,
    wrap: Callable[[Grid], Grid] = lambda grid: grid,
) -> None:
    """Run a ServerApp with `sites` simulated sites to its end; raises what the ServerApp raised.

    `run_config` holds the same flat keys as Flower's. `wrap` may put another Grid around (a recorder of all messages).
    """
    grid = LocalGrid(client_app, run_config, sites, workers)
    context = Context(grid.run.run_id, _SERVER_NODE, {}, RecordDict(), dict(run_config))
    try:
        server_app(wrap(grid), context)
    finally:
        grid.close()


def _deflate_all(messages: Iterable[Message]) -> tuple[list[Message], list[Wire]]:
    """Messages in wire form. A strategy puts the same content into all messages of a round: it is deflated once."""
    listed = list(messages)
    shared: dict[int, dict[str, bytes]] = {}
    wires = []
    with no_object_id_recompute():
        for message in listed:
            content = message.content
            if id(content) not in shared:
                shared[id(content)] = contents(content)
            wires.append((message.object_id, shared[id(content)] | {message.object_id: message.deflate()}))
    return listed, wires
