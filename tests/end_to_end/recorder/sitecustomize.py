"""A recorder at Flower's grid that uses nothing of fedbridge.

With this folder on PYTHONPATH and `GRID_RECORD` naming a file, every Python process wraps Flower's simulation grid and
appends what it hands to the ServerApp (and takes from it) as JSON lines: direction, message type, error, and for each
value its record, name, kind, dtype, shape, number of bytes and sha256. A test in the same process calls `wrap` itself.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

_LOCK = threading.Lock()
_TARGET = "flwr.superlink.grid.inmemory_grid"


def describe(direction: str, message: Any) -> dict[str, Any]:
    line: dict[str, Any] = {
        "direction": direction,
        "type": message.metadata.message_type,
        "source": message.metadata.src_node_id,
        "destination": message.metadata.dst_node_id,
        "id": message.metadata.message_id,
        "reply_to": message.metadata.reply_to_message_id,
        "error": None,
        "values": [],
    }
    if message.has_error():
        line["error"] = [message.error.code, message.error.reason]
        return line
    for record, content in message.content.items():
        for name, value in content.items():
            line["values"].append({"record": record, "kind": type(content).__name__, "name": name, **_value(value)})
    return line


def _value(value: Any) -> dict[str, Any]:
    if hasattr(value, "numpy"):
        array = value.numpy()
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        finite = bool((abs(array) < float("inf")).all())
        return {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "bytes": array.nbytes,
            "sha256": digest,
            "finite": finite,
        }
    return {"value": value, "python": type(value).__name__}


def wrap(grid: type, path: str) -> None:
    push, pull = grid.push_messages, grid.pull_messages

    def push_messages(self: Any, messages: Iterable[Any]) -> Any:
        kept = list(messages)
        ids = push(self, kept)
        _write(path, [describe("to_site", message) for message in kept])
        return ids

    def pull_messages(self: Any, message_ids: Iterable[str]) -> Any:
        messages = list(pull(self, message_ids))
        _write(path, [describe("from_site", message) for message in messages])
        return messages

    grid.push_messages, grid.pull_messages = push_messages, pull_messages


def _write(path: str, lines: list[dict[str, Any]]) -> None:
    with _LOCK, open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(json.dumps(line) + "\n" for line in lines)


class _WrapOnImport(importlib.abc.MetaPathFinder):
    """Wraps the simulation grid when Flower imports it, whichever process that is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            wrap(module.InMemoryGrid, os.environ["GRID_RECORD"])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("GRID_RECORD"):
    import importlib.util

    sys.meta_path.insert(0, _WrapOnImport())
