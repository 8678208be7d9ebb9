"""A message or a reply as one file, so that another process can take it up: a zip of its objects in wire form."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from simulations.wire import deflate, inflate

_HEADER = "header.json"


def write_question(path: Path, message: Message, context: Context) -> None:
    """Write a message and what its node knows. The context's state is left out: a site keeps nothing there."""
    header = {
        "run": context.run_id,
        "node": context.node_id,
        "node_config": dict(context.node_config),
        "run_config": dict(context.run_config),
    }
    _write(path, message, header)


def read_question(path: Path) -> tuple[Message, Context]:
    """What `write_question` wrote."""
    message, header = _read(path)
    context = Context(header["run"], header["node"], header["node_config"], RecordDict(), header["run_config"])
    return message, context


def write_reply(path: Path, reply: Message) -> None:
    """Write a reply."""
    _write(path, reply, {})


def read_reply(path: Path) -> Message:
    """What `write_reply` wrote."""
    return _read(path)[0]


def _write(path: Path, message: Message, header: dict[str, Any]) -> None:
    object_id, objects = deflate(message)
    header |= {"object": object_id, "message": message.metadata.message_id}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_HEADER, json.dumps(header))
        for name, content in objects.items():
            archive.writestr(name, content)


def _read(path: Path) -> tuple[Message, dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read(_HEADER))
        objects = {name: archive.read(name) for name in archive.namelist() if name != _HEADER}
    message = inflate((header["object"], objects))
    # The id is no part of the wire form; a reply names the message that it answers by it.
    message.metadata.__dict__["_message_id"] = header["message"]
    return message, header
