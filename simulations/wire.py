"""Messages in Flower's wire form: every record and array an object of its own, deflated, under its hash."""

from __future__ import annotations

from typing import cast

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

Wire = tuple[str, dict[str, bytes]]
"""The message's object id, and all its objects by theirs."""


def deflate(message: Message) -> Wire:
    """A message in wire form. Its message id is no part of that."""
    with no_object_id_recompute():
        return message.object_id, contents(message)


def contents(item: InflatableObject) -> dict[str, bytes]:
    """An object and all that it holds, deflated, by object id."""
    return {key: each.deflate() for key, each in get_all_nested_objects(item).items()}


def inflate(wire: Wire) -> Message:
    """The message of a wire form; it shares nothing with the one that was deflated."""
    object_id, objects = wire
    return cast(Message, inflate_object_from_contents(object_id, dict(objects)))
