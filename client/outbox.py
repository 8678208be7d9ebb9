"""The one door out of a site. Nothing else in this package builds the content of a reply.

An outbox serves one message. Each item is checked against the schema (`bridge.messages`) and the site's policy when
it is added, and the audit log is on disk before the content is handed over. It is all or nothing: once an item was
refused, nothing of the message leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from bridge.errors import ItemError
from bridge.hashing import sha256_array, sha256_json
from bridge.messages import ARRAYS, CONFIG, METRICS, Dimensions, Item, check_item, declared
from client.audit import AuditLog, Entry
from client.errors import OutboxError
from client.policy import Policy


class Outbox:
    """The items of one reply to one `message` of one `run`; `round_` is None outside rounds."""

    def __init__(
        self, message: str, dimensions: Dimensions, policy: Policy, audit: AuditLog, run: str, round_: int | None = None
    ) -> None:
        self._message, self._dimensions, self._policy = message, dimensions, policy
        self._audit, self._run, self._round = audit, run, round_
        self._items: dict[str, tuple[Item, Any]] = {}
        self._closed = ""

    def add(self, name: str, value: Any) -> None:
        """Take one item: an array, a number, a text or a flag.

        Raises `OutboxError` where it is undeclared for this message, given twice, or not as declared (kind, dtype,
        shape, finite, within its bound), and `PolicyError` where the policy does not permit it. After that the outbox
        is shut.
        """
        self._demand_open()
        self._closed = f"the item '{name}' was refused"
        # A plain copy: what is checked is what leaves, whatever the caller's array hides or becomes later.
        value = _plain(value)
        try:
            item = declared(name, self._message)
            self._policy.demand(name)
            check_item(item, value, self._dimensions)
        except ItemError as error:
            raise OutboxError(error.what, why=error.why, fix=error.fix) from error
        if name in self._items:
            raise OutboxError(f"item '{name}' was given twice", why="a name stands for one item", fix="give it once")
        self._items[name] = (item, value)
        self._closed = ""

    def reply_content(self) -> RecordDict:
        """The reply's records, after their audit entries are on disk. Closes the outbox.

        Raises `OutboxError` where an item was refused, nothing was added or the content was taken before, and
        `AuditError` where the log can't be written; then nothing leaves.
        """
        self._demand_open()
        if not self._items:
            raise OutboxError(f"the reply to '{self._message}' is empty", why="no item was added", fix="add one")
        content = self._records()
        self._closed = "its content was handed over"
        self._audit.append([self._entry(item, value) for item, value in self._items.values()])
        return content

    def _demand_open(self) -> None:
        if self._closed:
            raise OutboxError(
                f"the outbox of '{self._message}' is shut", why=self._closed, fix="nothing more of this message leaves"
            )

    def _records(self) -> RecordDict:
        chosen: dict[str, dict[str, Any]] = {ARRAYS: {}, METRICS: {}, CONFIG: {}}
        places = {"array": ARRAYS, "number": METRICS, "text": CONFIG, "flag": CONFIG}
        for name, (item, value) in self._items.items():
            chosen[places[item.kind]][name] = Array(value) if item.kind == "array" else value
        content = RecordDict()
        if chosen[ARRAYS]:
            content[ARRAYS] = ArrayRecord(chosen[ARRAYS])
        if chosen[METRICS]:
            content[METRICS] = MetricRecord(chosen[METRICS])
        if chosen[CONFIG]:
            content[CONFIG] = ConfigRecord(chosen[CONFIG])
        return content

    def _entry(self, item: Item, value: Any) -> Entry:
        array = isinstance(value, np.ndarray)
        return Entry(
            run=self._run,
            round=self._round,
            message=self._message,
            item=item.name,
            shape=value.shape if array else (),
            bytes=_size(value),
            sha256=sha256_array(value) if array else sha256_json(value),
            purpose=item.purpose,
        )


def _plain(value: Any) -> Any:
    """Arrays without subclass (a mask would hide numbers from the checks), in C order; numpy's numbers as Python's."""
    if isinstance(value, np.ndarray):
        return np.array(value, order="C", copy=True, subok=False)
    return value.item() if isinstance(value, np.generic) else value


def _size(value: Any) -> int:
    """Bytes of the bare value: an array's buffer, 8 for a number, 1 for a flag, a text's UTF-8."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, bool):
        return 1
    return len(value.encode()) if isinstance(value, str) else 8
