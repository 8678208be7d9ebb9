"""A rehearsal's record as a page of plain text, for the terminal and for the file."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.messages import ITEMS
from simulations.rehearse.record import MessageRecord, Rehearsal, Totals


def summary(record: Rehearsal) -> str:
    """The page; it names items, sizes, codes and costs, and no patient."""
    return "\n".join(
        (*_head(record), "", *_items(record), "", *_cost(record), *_refusals(record), "", *_notes(record), "")
    )


def _head(record: Rehearsal) -> Iterator[str]:
    yield f"study '{record.study}' rehearsed at '{record.site}' on {record.when}"
    yield f"{record.totals.messages} messages to the site as it is"
    if len(record.pretend) > 1:
        yield f"the other hospitals' part was played by {len(record.pretend) - 1} pretend site(s) of its own patients"


def _items(record: Rehearsal) -> Iterator[str]:
    yield "What would leave:"
    yield f"  {'message':<20}{'item':<24}{'times':>6}{'bytes each':>14}{'bytes':>14}  purpose"
    found: dict[tuple[str, str], list[int]] = {}
    for message in record.messages:
        for item in message.items:
            found.setdefault((message.message, item.item), []).append(item.bytes)
    for (message_type, name), sizes in found.items():
        each = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,}-{max(sizes):,}"
        yield f"  {message_type:<20}{name:<24}{len(sizes):>6}{each:>14}{sum(sizes):>14,}  {ITEMS[name].purpose}"
    yield f"  {record.totals.items} items, {record.totals.bytes:,} bytes in all, if no question is asked twice"
    yield "  each of them lies in outgoing/, as it would leave"


def _cost(record: Rehearsal) -> Iterator[str]:
    totals = record.totals
    together = totals.message_peak_bytes + totals.services_bytes
    yield "What a real run costs this machine:"
    longest = _time(totals.longest_seconds)
    yield f"  time    one core busy for {_time(totals.seconds)} in all; the longest message takes {longest}"
    yield f"          most of it: {_dominating(totals)}"
    yield (
        f"  memory  {_mega(together)}: {_mega(totals.message_peak_bytes)} while a message is computed, "
        f"{_mega(totals.services_bytes)} for SuperNode and executor all the time"
    )
    yield f"  disk    {_mega(totals.disk_bytes)} for features, ledger and audit log"


def _dominating(totals: Totals) -> str:
    parts = {
        "starting a process for each message": totals.starting_seconds,
        "reading recordings and computing features, once": totals.features_seconds,
        "the messages themselves": totals.seconds - totals.starting_seconds - totals.features_seconds,
    }
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return "; ".join(f"{name} ({_time(seconds)})" for name, seconds in ranked)


def _refusals(record: Rehearsal) -> Iterator[str]:
    if not record.refused:
        return
    yield ""
    yield "What this site would refuse (its own reasons stay here):"
    for message in record.refused:
        yield f"  {_place(message)}: {message.outcome}"
        yield from (f"    {line}" for line in message.why.splitlines())


def _notes(record: Rehearsal) -> Iterator[str]:
    late = [message for message in record.messages if message.seconds > record.timeout_seconds]
    if late:
        yield f"Note: {len(late)} message(s) take longer than the coordinator waits ({_time(record.timeout_seconds)}):"
        yield f"{_place(late[0])} first. The site would lose that turn: tell the coordinator."
    if record.mechanism == "none":
        yield "Note: under the mechanism 'none' nothing is noised; what lies in outgoing/ depends on single patients."
    yield "Nothing was sent; the site's budget, audit log, cache and acceptances are as they were."


def _place(message: MessageRecord) -> str:
    round_ = f", round {message.round}" if message.round is not None else ""
    split = f", {message.split} patients" if message.split else ""
    return f"message {message.number}, {message.message}{round_}{split}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _mega(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.1f} GB"
