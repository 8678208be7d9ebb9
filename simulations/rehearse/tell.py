"""From the replies of the site as it is to the record of a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from bridge.study.archive import Study
from bridge.study.traffic import planned_messages, total
from client.audit import AuditLog, Entry
from client.policy import Policy
from client.site import Site
from server.book import versions
from simulations.errors import EngineError
from simulations.rehearse.house import House, Reply, folder_bytes
from simulations.rehearse.record import MessageRecord, Outgoing, Rehearsal

SERVICES_BYTES = 280_000_000
"""Measured at rest (VmHWM; Flower 1.41, Python 3.11, Linux x86-64): SuperNode 139 MB, executor 129 MB; rounded up for
the messages that pass through."""

_NAME_BYTES = (1, 63)
"""What the plan counts for the site's name, which it does not know."""


def record_of(study: Study, sites: Sequence[Site], policy: Policy, house: House) -> Rehearsal:
    """The record of a run that has ended. Raises `EngineError` where what was answered is not what the audit log says:
    a defect."""
    own = sites[0]
    outgoing = _outgoing(house.replies, _sent(own, house.run))
    return Rehearsal(
        study=study.id,
        study_sha256=study.sha256,
        site=own.name,
        pretend=tuple(site.name for site in sites),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        mechanism=study.job.privacy.mechanism,
        timeout_seconds=study.job.sites.timeout_seconds,
        bytes=sum(each.bytes for each in outgoing),
        planned_bytes=_planned(study, policy, own.name),
        **_cost(house.replies),
        services_bytes=SERVICES_BYTES,
        disk_bytes=house.disk_bytes() + folder_bytes(own.cache_folder),
        messages=tuple(_message(reply) for reply in house.replies),
        outgoing=outgoing,
    )


def _sent(own: Site, run: str) -> Iterator[Entry]:
    """What the audit log says has left in this run: a rehearsal's log begins as a copy of the site's."""
    entries = (line.entry for line in AuditLog(own.audit_path).verify())
    return iter([entry for entry in entries if entry.event == "sent" and entry.run == run])


def _outgoing(replies: Sequence[Reply], sent: Iterator[Entry]) -> tuple[Outgoing, ...]:
    found: list[Outgoing] = []
    for reply in replies:
        entries = {entry.item: entry for entry in (next(sent, None) for _ in reply.files) if entry is not None}
        places = {(entry.message, entry.round) for entry in entries.values()}
        if entries.keys() != reply.files.keys() or places - {(reply.message, reply.round)}:
            raise _differs(f"message {reply.number}, '{reply.message}'")
        found += [_item(reply, entry) for entry in entries.values()]
    if next(sent, None) is not None:
        raise _differs("it knows more items")
    return tuple(found)


def _item(reply: Reply, entry: Entry) -> Outgoing:
    return Outgoing(
        number=reply.number,
        message=reply.message,
        round=reply.round,
        split=reply.split,
        item=entry.item,
        shape=entry.shape,
        bytes=entry.bytes,
        sha256=entry.sha256,
        file=reply.files[entry.item].as_posix(),
    )


def _message(reply: Reply) -> MessageRecord:
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
    )


def _cost(replies: Sequence[Reply]) -> dict[str, Any]:
    costs = [reply.cost for reply in replies]
    computing = [reply.cost.seconds - reply.cost.ready for reply in replies if reply.cached_bytes > 0]
    return {
        "seconds": round(sum(cost.seconds for cost in costs), 3),
        "starting_seconds": round(sum(cost.ready for cost in costs), 3),
        "features_seconds": round(sum(computing), 3),
        "longest_seconds": round(max((cost.seconds for cost in costs), default=0.0), 3),
        "peak_bytes": max((cost.peak_bytes for cost in costs), default=0),
    }


def _planned(study: Study, policy: Policy, site: str) -> tuple[int, int]:
    low, high = total(planned_messages(study.job, *study.cards(), policy.items))
    name = len(site.encode())
    return low - _NAME_BYTES[0] + name, high - _NAME_BYTES[1] + name


def _differs(what: str) -> EngineError:
    return EngineError(
        f"the audit log does not say what was answered: {what}",
        why="the two are written by one process, item by item",
        fix="this is a defect of fedbridge: report it",
    )
