"""Is a reply what was asked for? Read from Flower's records, checked against the schema, or refused with `ReplyError`.

Nothing of a reply is trusted: not its names, not the sizes that an array claims, not its numbers. What a refusal says
is made of our own words and the schema's: a text that a site made up is never repeated into a log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from bridge.errors import ItemError
from bridge.messages import ARRAYS, CONFIG, ITEMS, METRICS, Dimensions, Item, ReasonCode, check_item
from server.errors import ReplyError

_KIND_OF: dict[str, type] = {ARRAYS: ArrayRecord, METRICS: MetricRecord, CONFIG: ConfigRecord}
_RECORD_OF = {"array": ARRAYS, "number": METRICS, "text": CONFIG, "flag": CONFIG}

NO_REPLY, OFFLINE, BAD_REPLY = "NO_REPLY", "OFFLINE", "BAD_REPLY"
"""Codes of a lost turn beside the names of `ReasonCode` and `FLOWER_<code>`."""

UNREADABLE = 99
"""Error code of what the server itself puts in the place of a reply that can't be read; a turn lost to BAD_REPLY."""


@dataclass(frozen=True)
class Expected:
    """What a reply to one message must hold (`required`), may hold (`optional`), and in which sizes."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    dimensions: Dimensions = field(default_factory=lambda: Dimensions(0, 0, 0))


@dataclass(frozen=True)
class Answer:
    """A good reply: the value of each item by name, and its bytes, counted as the site's audit log counts them."""

    values: dict[str, Any]
    sizes: dict[str, int]


def read_reply(message: Message, expected: Expected) -> Answer:
    """The items of a reply that carries content.

    Raises `ReplyError` unless its records are exactly those that `bridge.messages` describes, holding exactly the
    declared items, each of the declared kind, dtype and shape, finite and within its bound.
    """
    content = message.content
    values: dict[str, Any] = {}
    for name, record in _records(content).items():
        if not record:
            raise ReplyError(f"the record '{name}' of the reply is empty", why="a record without items is left out")
        for key, value in record.items():
            item = _item(key, name, expected)
            values[item.name] = _decode(value, item, expected.dimensions) if item.kind == "array" else value
    missing = [name for name in expected.required if name not in values]
    if missing:
        raise ReplyError(f"the reply lacks {', '.join(missing)}", why="these items were asked for")
    for name, value in values.items():
        try:
            check_item(ITEMS[name], value, expected.dimensions)
        except ItemError as error:
            raise ReplyError(error.what, why=error.why) from error
    return Answer(values, {name: _bytes(value) for name, value in values.items()})


def check_weight(answer: Answer, weight: float) -> None:
    """Raise `ReplyError` unless a train reply carries exactly the site's public weight: it decides the mean."""
    if answer.values["weight"] != weight:
        raise ReplyError("the reply's weight is not the site's public one", why=f"{weight:g} is agreed")


def error_code(message: Message) -> str:
    """The name by which an error reply is recorded; its text, which the other side wrote, is never read."""
    code = message.error.code
    if code == UNREADABLE:
        return BAD_REPLY
    try:
        return ReasonCode(code).name if code >= 100 else f"FLOWER_{int(code)}"
    except ValueError:
        return "UNKNOWN_CODE"


def content_bytes(message: Message) -> int:
    """Bytes of a reply's arrays (as they are on the wire), numbers and texts, whatever they are; 0 for an error."""
    if not message.has_content():
        return 0
    return sum(_bytes(value) for record in message.content.values() for value in record.values())


def _records(content: RecordDict) -> dict[str, Mapping[str, Any]]:
    """The records by name, each of the kind that its name stands for."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, record in content.items():
        if name not in _KIND_OF or not isinstance(record, _KIND_OF[name]):
            raise ReplyError(
                "the reply has a record that is not declared",
                why=f"ArrayRecord '{ARRAYS}', MetricRecord '{METRICS}' and ConfigRecord '{CONFIG}' are",
            )
        found[name] = record
    return found


def _item(key: str, record: str, expected: Expected) -> Item:
    item = ITEMS.get(key) if key in (*expected.required, *expected.optional) else None
    if item is None or _RECORD_OF[item.kind] != record:
        raise ReplyError(
            f"the record '{record}' of the reply holds an item that was not asked for",
            why=f"asked for: {', '.join((*expected.required, *expected.optional)) or 'nothing'}",
        )
    return item


def _decode(array: Array, item: Item, dimensions: Dimensions) -> NDArray[Any]:
    """The array, after its header was held against the schema: numpy would believe whatever size it claims."""
    data, shape, dtype = bytes(array.data), item.resolved_shape(dimensions), np.dtype(item.dtype)
    plain = _plain_header(shape, dtype.str)
    if array.stype == "numpy.ndarray" and data.startswith(plain):
        start, kind, fortran = len(plain), dtype, False
    else:
        start, kind, fortran = _read_header(array, item, shape, dtype)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ReplyError(f"item '{item.name}' is cut short or too long", why=f"{shape} of {item.dtype} is declared")
    flat = np.frombuffer(data, kind, offset=start).astype(dtype, copy=False)
    return flat.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=64)
def _plain_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """How numpy begins a file of that shape and dtype: what all but unusual replies begin with."""
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _read_header(
    array: Array, item: Item, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[int, np.dtype[Any], bool]:
    """Where the numbers begin, their byte order, and whether columns come first; the shape must be `shape`."""
    stream = BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if array.stype != "numpy.ndarray" or version != (1, 0):
            raise ReplyError(f"item '{item.name}' is not a plain numpy array")
        found, fortran, kind = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, OSError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ReplyError(f"item '{item.name}' can't be read as an array") from error
    if found != shape:
        raise ReplyError(f"item '{item.name}' has shape {_short(found)}", why=f"{shape} is declared")
    if kind.hasobject or kind.newbyteorder("=") != dtype:
        raise ReplyError(f"item '{item.name}' has another dtype", why=f"{item.dtype} is declared")
    return stream.tell(), kind, fortran


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 4 else f"of {len(shape)} axes"


def _bytes(value: object) -> int:
    """An array's buffer, or its wire form where it is still in it; 8 for a number, 1 for a flag, a text's UTF-8."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, list):
        return sum(_bytes(each) for each in value)
    if isinstance(value, bool):
        return 1
    if isinstance(value, str | bytes):
        return len(value.encode() if isinstance(value, str) else value)
    return 8
