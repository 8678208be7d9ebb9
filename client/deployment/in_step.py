"""A SuperNode that stays in step: the reply to a message goes out before the next message is fetched.

Flower's loop means to do so, yet takes ANY reply for that of the message it just fetched. A reply too many puts the
node one message behind for good: one that is left of a run which ended while its message was fetched, or the second one
of a process that was killed after it had answered. From then on each answer waits for the next question, and the
coordinator sees nothing but timeouts. And the loop waits for ever where the process of a task ended before it took its
message. So here it waits for the reply to that very message, and where none can come, answers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bridge.flower_names import flower_module, replace_names

if TYPE_CHECKING:
    from flwr.app import Message

LOOP = "flwr.supernode.start_client_internal"
_NAMES = ("_pull_and_store_message", "_push_messages", "_insert_message", "RunNotRunningException")


def keep_in_step() -> None:
    """Hold the SuperNode's loop of this process to it. Raises `CodeError` where this Flower is another."""
    module = flower_module(LOOP, ("start_client_internal", *_NAMES))
    found = InStep(module)
    replace_names(
        module, "start_client_internal", {"_pull_and_store_message": found.pull, "_push_messages": found.push}
    )


class InStep:
    """The two halves of the loop: fetch a message, and send its reply."""

    def __init__(self, module: ModuleType) -> None:
        self._pull, self._push = module._pull_and_store_message, module._push_messages
        self._insert, self._not_running = module._insert_message, module.RunNotRunningException
        self._awaited: Message | None = None

    def pull(
        self,
        *,
        receive: Callable[[], tuple[Message, Any] | None],
        pull_object: Callable[[int, str], bytes],
        confirm_message_received: Callable[[int, str], None],
        **others: Any,
    ) -> int | None:
        """Fetch a message, and remember it; of one whose run ends meanwhile, nothing is left."""

        def remembered() -> tuple[Message, Any] | None:
            found = receive()
            self._awaited = found[0] if found is not None else None
            return found

        run: int | None = self._pull(
            receive=remembered,
            pull_object=self._failing(pull_object),
            confirm_message_received=self._failing(confirm_message_received),
            **others,
        )
        return run

    def push(self, *, state: Any, object_store: Any, **others: Any) -> None:
        """Send replies until that of the message fetched last is among them."""
        assert self._awaited is not None
        replies = _Replies(state, self._awaited)
        while not replies.complete:
            try:
                self._push(state=replies, object_store=object_store, **others)
            except _NeverAnsweredError:
                self._answer(self._awaited, state, object_store)

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of a run that has ended, an error like any other: Flower then removes the message and ends its task."""

        def failing(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except self._not_running as error:
                raise RuntimeError("its run has ended") from error

        return failing

    def _answer(self, message: Message, state: Any, object_store: Any) -> None:
        """Say what Flower says for a process that was killed later."""
        from flwr.app import Error, Message
        from flwr.common.constant import ErrorCode

        error = Error(ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding.")
        self._insert(Message(error, reply_to=message), state, object_store)


class _NeverAnsweredError(Exception):
    """No task is left that would answer."""


class _Replies:
    """The node's state as the loop's second half sees it; it looks at what is taken from it."""

    def __init__(self, state: Any, awaited: Message) -> None:
        self._state, self._awaited = state, awaited
        self.complete = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, **filters: Any) -> Sequence[Message]:
        """The replies that are there. Raises `_NeverAnsweredError` where there is none and no task to make one."""
        from flwr.common.constant import Status

        # Before the replies: a task is over only after its reply is there.
        unfinished = self._state.get_tasks(
            run_ids=[self._awaited.metadata.run_id], statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]
        )
        found: Sequence[Message] = self._state.get_messages_legacy(**filters)
        wanted = self._awaited.metadata.message_id
        self.complete = self.complete or any(each.metadata.reply_to_message_id == wanted for each in found)
        if not found and not unfinished:
            raise _NeverAnsweredError
        return found
