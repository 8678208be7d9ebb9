"""From the replies of the site as it is to the record of a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from bridge.study.archive import Study
from client.audit import AuditLog, Entry
from client.site import Site
from server.book import versions
from simulations.errors import EngineError
from simulations.rehearse.house import House, Reply, folder_bytes
from simulations.rehearse.record import ItemRecord, MessageRecord, Rehearsal, Totals

SERVICES_BYTES = 220_000_000
"""What SuperNode (120 MB) and executor (90 MB) of Flower 1.41 were seen to hold on Linux x86-64 with Python 3.11."""


def record_of(study: Study, sites: Sequence[Site], house: House) -> Rehearsal:
    """The record of a run that has ended. Raises `EngineError` where what was answered is not what the audit log says:
    a defect."""
    own = sites[0]
    sent = _sent(own, house.run)
    messages = tuple(_message(reply, sent) for reply in house.replies)
    if next(sent, None) is not None:
        raise _differs("the run's last message")
    return Rehearsal(
        study=study.id,
        study_sha256=study.sha256,
        site=own.name,
        pretend=tuple(site.name for site in sites),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        mechanism=study.job.privacy.mechanism,
        timeout_seconds=study.job.sites.timeout_seconds,
        messages=messages,
        totals=_totals(messages, house.disk_bytes() + folder_bytes(own.cache_folder)),
    )


def _message(reply: Reply, sent: Iterator[Entry]) -> MessageRecord:
    entries = {entry.item: entry for entry in (next(sent, None) for _ in reply.files) if entry is not None}
    if entries.keys() != reply.files.keys() or any(
        (entry.message, entry.round) != (reply.message, reply.round) for entry in entries.values()
    ):
        raise _differs(f"message {reply.number}, '{reply.message}'")
    return MessageRecord(
        number=reply.number,
        message=reply.message,
        round=reply.round,
        split=reply.split,
        outcome=reply.outcome,
        why=reply.why,
        ready_seconds=round(reply.cost.ready, 3),
        seconds=round(reply.cost.seconds, 3),
        peak_bytes=reply.cost.peak_bytes,
        cached_bytes=reply.cached_bytes,
        items=tuple(
            ItemRecord(
                item=name,
                shape=entries[name].shape,
                bytes=entries[name].bytes,
                sha256=entries[name].sha256,
                file=file.as_posix(),
            )
            for name, file in reply.files.items()
        ),
    )


def _sent(own: Site, run: str) -> Iterator[Entry]:
    """What the audit log says has left in this run: a rehearsal's log begins as a copy of the site's."""
    entries = (line.entry for line in AuditLog(own.audit_path).verify())
    return iter([entry for entry in entries if entry.event == "sent" and entry.run == run])


def _totals(messages: Sequence[MessageRecord], disk_bytes: int) -> Totals:
    items = [item for message in messages for item in message.items]
    seconds = [message.seconds for message in messages]
    computing = [message.seconds - message.ready_seconds for message in messages if message.cached_bytes > 0]
    return Totals(
        messages=len(messages),
        items=len(items),
        bytes=sum(item.bytes for item in items),
        seconds=round(sum(seconds), 3),
        starting_seconds=round(sum(message.ready_seconds for message in messages), 3),
        features_seconds=round(sum(computing), 3),
        longest_seconds=max(seconds, default=0.0),
        message_peak_bytes=max((message.peak_bytes for message in messages), default=0),
        services_bytes=SERVICES_BYTES,
        disk_bytes=disk_bytes,
    )


def _differs(what: str) -> EngineError:
    return EngineError(
        f"the audit log does not say what was answered: {what}",
        why="the two are written by one process, item by item",
        fix="this is a defect of fedbridge: report it",
    )
