"""What a coordinator's folder is at: its services, its certificate, its sites, its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bridge import services as supervised
from bridge.errors import ServiceError
from server.coordinator import certificates, registry, superlink
from server.coordinator.folder import CoordinatorFolder
from server.coordinator.services import door_fault
from server.coordinator.superlink import Node
from server.submission.runs import RunState, list_runs

UNKNOWN, ABSENT = "unknown", "absent"


@dataclass(frozen=True)
class ServiceStatus:
    """One service, where `start` started it; systemd knows about its own."""

    name: str
    pid: int | None
    since: str
    restarts: int


@dataclass(frozen=True)
class SiteStatus:
    """A site and its node."""

    name: str
    state: str
    """enrolled or revoked."""
    online: bool
    node: str
    """online, offline, registered (it never came), unregistered (shut out), absent (the SuperLink
    was not told of it yet), unknown (the SuperLink does not answer)."""
    last_seen: str
    """UTC, ISO 8601; empty where it never came or nobody knows."""
    enrolled: str
    """UTC, ISO 8601."""
    fingerprint: str
    """As it was read over the telephone."""


@dataclass(frozen=True)
class Status:
    """All of it."""

    name: str
    address: str
    services: tuple[ServiceStatus, ...]
    superlink: bool
    """Whether it answers."""
    door: str
    """Empty where sites can connect, else why not."""
    certificate_ends: str
    """UTC, ISO 8601."""
    certificate_days: float
    """Days until then; negative afterwards."""
    sites: tuple[SiteStatus, ...]
    runs: tuple[RunState, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`: as the fields are named."""
        return asdict(self)


def find_status(folder: CoordinatorFolder) -> Status:
    """Look at everything now. Raises what reading the folder raises; a service that does not answer is a finding."""
    services = [
        ServiceStatus(each.name, each.process.pid if each.process else None, each.since, each.restarts)
        for each in supervised.running(folder.state)
    ]
    ends = certificates.read_certificate(folder.server_certificate).not_valid_after_utc
    there = superlink.answers(folder)
    return Status(
        name=folder.settings.name,
        address=folder.settings.address,
        services=tuple(services),
        superlink=there,
        door=door_fault(folder),
        certificate_ends=ends.isoformat(timespec="seconds"),
        certificate_days=round((ends - datetime.now(UTC)) / timedelta(days=1), 2),
        sites=tuple(find_sites(folder)),
        runs=tuple(list_runs(folder.runs)),
    )


def find_sites(folder: CoordinatorFolder) -> list[SiteStatus]:
    """Everybody who was ever enrolled, and whether the SuperLink sees them."""
    nodes = _nodes(folder)
    by_key = None if nodes is None else {each.public_key: each for each in nodes}
    return [_site(entry, by_key) for entry in registry.read_registry(folder).sites]


def _site(entry: registry.Entry, nodes: Mapping[str, Node] | None) -> SiteStatus:
    node = None if nodes is None else nodes.get(entry.pem)
    seen = "" if node is None else node.last_seen
    status = node.status if node is not None else UNKNOWN if nodes is None else ABSENT
    return SiteStatus(entry.site, entry.state, status == "online", status, seen, entry.enrolled, entry.fingerprint)


def _nodes(folder: CoordinatorFolder) -> Sequence[Node] | None:
    if not superlink.answers(folder):
        return None
    try:
        with superlink.control(folder) as control:
            return control.nodes()
    except ServiceError:
        return None
