"""A rehearsal's record as a page of plain text, for the terminal and for the file."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.messages import ITEMS
from simulations.rehearse.record import MessageRecord, Rehearsal


def summary(record: Rehearsal) -> str:
    """The page; it names items, sizes, codes and costs, and no patient."""
    parts = (_head(record), _items(record), _cost(record), _refusals(record), _notes(record))
    return "\n\n".join(text for part in parts if (text := "\n".join(part))) + "\n"


def _head(record: Rehearsal) -> Iterator[str]:
    yield f"study '{record.study}' rehearsed at '{record.site}' on {record.when}"
    yield f"{len(record.messages)} messages to the site as it is"
    if len(record.pretend) > 1:
        yield f"the other hospitals' part was played by {len(record.pretend) - 1} pretend site(s) of its own patients"


def _items(record: Rehearsal) -> Iterator[str]:
    yield "What would leave:"
    yield f"  {'message':<20}{'item':<24}{'times':>6}{'bytes each':>14}{'bytes':>14}  purpose"
    found: dict[tuple[str, str], list[int]] = {}
    for each in record.outgoing:
        found.setdefault((each.message, each.item), []).append(each.bytes)
    for (message, name), sizes in found.items():
        size = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,}-{max(sizes):,}"
        yield f"  {message:<20}{name:<24}{len(sizes):>6}{size:>14}{sum(sizes):>14,}  {ITEMS[name].purpose}"
    yield f"  {len(record.outgoing)} items, {record.bytes:,} bytes in all, if no question is asked twice"
    low, high = record.planned_bytes
    if low < high:
        yield f"  where the hospitals together choose other positions for the bridge: {low:,} to {high:,} bytes"
    yield "  each of them lies in outgoing/, as it would leave"


def _cost(record: Rehearsal) -> Iterator[str]:
    longest = _time(record.longest_seconds)
    yield "What a real run costs this machine:"
    yield f"  time    one core busy for {_time(record.seconds)} in all; the longest message takes {longest}"
    for number, (what, seconds) in enumerate(_parts(record)):
        yield f"          {'most of it: ' if not number else 'then: '}{what}, {_time(seconds)}"
    message, services = record.peak_bytes, record.services_bytes
    yield f"  memory  {_size(message + services)} at most: {_size(message)} while a message is computed,"
    yield f"          {_size(services)} for SuperNode and executor all the time"
    yield f"  disk    {_size(record.disk_bytes)} for features, ledger and audit log"


def _parts(record: Rehearsal) -> list[tuple[str, float]]:
    """What the time goes into, the largest part first."""
    rest = record.seconds - record.starting_seconds - record.features_seconds
    parts = [
        ("starting a process for each message", record.starting_seconds),
        ("reading recordings and computing features, once", record.features_seconds),
        ("the messages themselves", rest),
    ]
    return sorted(parts, key=lambda part: -part[1])


def _refusals(record: Rehearsal) -> Iterator[str]:
    if not record.refused:
        return
    yield "What this site would refuse (the coordinator learns the code alone):"
    for message in record.refused:
        yield f"  {_place(message)}: {message.outcome}"
        yield from (f"    {line}" for line in message.why.splitlines())


def _notes(record: Rehearsal) -> Iterator[str]:
    late = [message for message in record.messages if message.seconds > record.timeout_seconds]
    if late:
        yield f"Note: {len(late)} message(s) take longer than the coordinator waits ({_time(record.timeout_seconds)}),"
        yield f"{_place(late[0])} first. The site would lose that turn: tell the coordinator."
    if record.mechanism == "none":
        yield "Note: the mechanism is 'none', nothing is noised: what lies in outgoing/ depends on single patients."
    yield "Nothing was sent; the site's budget, audit log, cache and acceptances are as they were."


def _place(message: MessageRecord) -> str:
    round_ = f", round {message.round}" if message.round is not None else ""
    split = f", {message.split} patients" if message.split else ""
    return f"message {message.number}, {message.message}{round_}{split}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= 10 * unit:
            return f"{count / unit:,.0f} {name}"
    return f"{count / 1000:,.0f} kB"
