"""What a run of a job sends from a site, from the job and the models' cards alone: each message with its items' bytes.

Bytes are those that a site's audit log writes: an array's buffer, 8 for a number, 1 for a flag, a text's UTF-8. They
are of one answer to each question; a run that is interrupted may ask again, as often as the study says.

What can't be known beforehand makes it less, never more: a message that is refused, and tables of confusion of a group
that is smaller than the site's own minimum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from bridge.encoders.cards import EncoderCard, HeadCard
from bridge.job import Job
from bridge.messages import (
    CLOSED_FORM,
    CONFUSION_ITEMS,
    DEFAULT_ITEMS,
    DESCRIBE,
    EVALUATE,
    ITEMS,
    PROBE,
    SIMILARITY,
    TRAIN,
    UPDATE_ITEMS,
    Dimensions,
    Item,
)

Bytes = tuple[int, int]
"""The smallest and the largest size; equal where it can't vary."""

_NAME_BYTES = (1, 63)
_FIXED_BYTES = {"number": (8, 8), "flag": (1, 1), "text": _NAME_BYTES}


@dataclass(frozen=True)
class Planned:
    """One question that a run asks of a site, and what a full answer to it holds.

    `round` is None outside rounds, and where the run decides it (which bridge is kept, with `train.keep: best`).
    """

    message: str
    round: int | None
    split: str | None
    items: Mapping[str, Bytes]

    @property
    def bytes(self) -> Bytes:
        """Of all items together."""
        return total([self])


def planned_messages(
    job: Job,
    old_card: EncoderCard,
    new_card: EncoderCard,
    head_card: HeadCard,
    items: Collection[str] | None = None,
) -> list[Planned]:
    """The questions of a whole run that a site answers, in the order in which they are asked.

    `items` are those that a policy permits; None: the defaults and what the job can't do without. A question of which
    a needed item is not permitted is left out, since the site refuses it. Raises `PositionError` where the job fixes a
    position that an encoder does not have.
    """
    permitted = set(needed_items(job)).union(DEFAULT_ITEMS) if items is None else set(items)
    sizes = _sizes(job, old_card, new_card, head_card)
    found = []
    for message, round_, split, required, optional in _questions(job):
        chosen = [*required, *(name for name in optional if name in permitted)]
        if chosen and permitted.issuperset(required):
            found.append(Planned(message, round_, split, {name: sizes[name] for name in chosen}))
    return found


def required_items(job: Job) -> tuple[str, ...]:
    """The items that every site's answers must hold."""
    return tuple(dict.fromkeys(name for _, _, _, required, _ in _questions(job) for name in required))


def needed_items(job: Job) -> tuple[str, ...]:
    """The items without which the job can't be done: the required ones, and for `train.keep: best` the one that its
    criterion is computed from, which one site at least has to send."""
    if job.train.keep != "best" or job.privacy.private:
        return required_items(job)
    criteria = {"agreement": "confusion.agreement", "balanced_accuracy": "confusion.bridge"}
    return (*required_items(job), criteria.get(job.train.criterion, job.train.criterion))


def possible_items(job: Job) -> tuple[str, ...]:
    """Every item that a run of the job may hold, where policies permit it, in the order of `ITEMS`."""
    named = {name for _, _, _, required, optional in _questions(job) for name in (*required, *optional)}
    return tuple(name for name in ITEMS if name in named)


def total(planned: Iterable[Planned]) -> Bytes:
    """Bytes of all messages together: at least, and at most."""
    sizes = [size for message in planned for size in message.items.values()]
    return sum(low for low, _ in sizes), sum(high for _, high in sizes)


_Question = tuple[str, int | None, str | None, tuple[str, ...], tuple[str, ...]]
"""Message, round, split, items that its answer must hold, items that it holds where the policy permits them."""


def _questions(job: Job) -> Iterator[_Question]:
    private, mode = job.privacy.private, job.selection.mode
    yield DESCRIBE, None, None, ("site", "can_take_part", "reason"), ()
    if mode != "fixed":
        kind = "sums" if private else mode
        yield PROBE, None, None, (f"probe_{kind}",), ()
        yield SIMILARITY, None, None, (f"similarity_{kind}",), ()
    if job.train.solves:
        yield CLOSED_FORM, None, None, ("statistics" if private else "closed_form_moments",), ()
    updates = UPDATE_ITEMS[:2] if job.bridge.frozen_prototypes else UPDATE_ITEMS
    optional = () if private else ("train_loss",)
    tables: tuple[tuple[str, ...], tuple[str, ...]] = (("confusion_sums",), ()) if private else ((), CONFUSION_ITEMS)
    for round_ in range(1, job.rounds + 1):
        yield TRAIN, round_, None, (*updates, "weight"), optional
        if job.evaluates("validation", round_):
            yield EVALUATE, round_, "validation", *tables
    if job.evaluate.final:
        yield EVALUATE, None if job.train.keep == "best" else job.rounds, "test", *tables


def _sizes(job: Job, old: EncoderCard, new: EncoderCard, head: HeadCard) -> dict[str, Bytes]:
    """Bytes of each declared item over the positions that the selection may choose."""
    dimensions = [Dimensions.of(job, old, new, head, positions) for positions in _positions(job, old, new)]
    return {name: _item_bytes(item, dimensions) for name, item in ITEMS.items()}


def _item_bytes(item: Item, dimensions: list[Dimensions]) -> Bytes:
    if item.kind != "array":
        return _FIXED_BYTES[item.kind]
    width = np.dtype(item.dtype).itemsize
    sizes = [prod(item.resolved_shape(each)) * width for each in dimensions]
    return min(sizes), max(sizes)


def _positions(job: Job, old: EncoderCard, new: EncoderCard) -> list[tuple[int, int]]:
    m, l = job.selection.input_position, job.selection.output_position  # noqa: E741
    if m is not None and l is not None:
        return [(m, l)]
    return list(product(range(new.positions), range(old.positions)))
