"""`fedbridge-site status`: what runs, whether the coordinator can be reached, what was accepted, what was answered."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bridge import services
from bridge.errors import EnrolmentError, FedbridgeError
from client.deployment.clientapp import MESSAGES_LOG
from client.deployment.connection import Connection, look, supernode_says
from client.deployment.places import read_coordinator
from client.deployment.services import EXECUTOR, SUPERNODE
from client.deployment.supernode import SUPERNODE_LOG
from client.deployment.units import unit_name
from client.effort import Effort, read_efforts
from client.site import Site

MESSAGES_SHOWN = 10
_SYSTEMCTL_SECONDS = 10


@dataclass(frozen=True)
class ServiceLine:
    """One service as it is now; `pid` is None where it does not run."""

    name: str
    pid: int | None
    restarts: int
    since: str
    by: str
    """`start` or `systemd`; empty where nobody keeps it running."""


@dataclass(frozen=True)
class StudyLine:
    """One study that was accepted here."""

    id: str
    state: str
    who: str
    when: str


@dataclass(frozen=True)
class SiteStatus:
    """All that `status` tells."""

    site: str
    services: tuple[ServiceLine, ...]
    connection: Connection
    supernode: str
    """What the SuperNode's log tells last of its connection."""
    studies: tuple[StudyLine, ...]
    studies_problem: str
    messages: tuple[Effort, ...]
    """The newest last."""

    @property
    def well(self) -> bool:
        """Whether both services run, and a message can pass."""
        return all(each.pid for each in self.services) and not self.connection.fails and not self.studies_problem

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"well": self.well, "warnings": self.connection.warnings, **asdict(self)}


def site_status(site: Site) -> SiteStatus:
    """Look at everything once; connects to the coordinator's port as the SuperNode would, and asks nothing of it."""
    studies, problem = _studies(site)
    return SiteStatus(
        site=site.name,
        services=_services(site),
        connection=_connection(site),
        supernode=supernode_says(site.state_folder / SUPERNODE_LOG),
        studies=studies,
        studies_problem=problem,
        messages=tuple(read_efforts(site.state_folder / MESSAGES_LOG)[-MESSAGES_SHOWN:]),
    )


def status_lines(status: SiteStatus) -> list[str]:
    """The same for people."""
    lines = [f"site '{status.site}'"]
    for each in status.services:
        state = f"runs (process {each.pid}, by {each.by})" if each.pid else "does not run"
        more = f", since {each.since}, {each.restarts} restart(s)" if each.by else ""
        lines.append(f"  {each.name:<12}{state}{more}")
    lines += _connection_lines(status)
    lines.append("studies" if status.studies else "no study was accepted yet")
    lines += [f"  {each.id}: {each.state} (accepted by {each.who}, {each.when})" for each in status.studies]
    if status.studies_problem:
        lines.append(f"  PROBLEM {status.studies_problem}")
    lines.append(f"last {len(status.messages)} message(s)" if status.messages else "no message was answered yet")
    lines += [_message_line(each) for each in status.messages]
    return lines


def parse_systemctl(text: str, names: Sequence[str]) -> list[ServiceLine]:
    """The services of `systemctl show`, in the order of `names`; what systemd does not run is left out."""
    found = []
    for name, block in zip(names, text.strip().split("\n\n"), strict=False):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        pid = int(values.get("MainPID") or 0)
        if values.get("ActiveState") not in (None, "inactive"):
            since = values.get("ActiveEnterTimestamp", "")
            found.append(ServiceLine(name, pid or None, int(values.get("NRestarts") or 0), since, "systemd"))
    return found


def _services(site: Site) -> tuple[ServiceLine, ...]:
    own = [
        ServiceLine(each.name, each.process.pid if each.process else None, each.restarts, each.since, "start")
        for each in services.running(site.state_folder)
    ]
    found = {each.name: each for each in own or _systemd(site)}
    return tuple(found.get(name, ServiceLine(name, None, 0, "", "")) for name in (SUPERNODE, EXECUTOR))


def _systemd(site: Site) -> list[ServiceLine]:
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return []
    units = [unit_name(name, site.name) for name in (SUPERNODE, EXECUTOR)]
    properties = "--property=ActiveState,MainPID,NRestarts,ActiveEnterTimestamp"
    try:
        done = subprocess.run(
            [systemctl, "show", properties, *units], capture_output=True, text=True, timeout=_SYSTEMCTL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_systemctl(done.stdout, (SUPERNODE, EXECUTOR)) if done.returncode == 0 else []


def _connection(site: Site) -> Connection:
    try:
        return look(read_coordinator(site.coordinator_path))
    except EnrolmentError as error:
        return Connection("", problem=f"{error.what} ({error.why})")


def _studies(site: Site) -> tuple[tuple[StudyLine, ...], str]:
    from client.study.acceptance import accepted

    try:
        found = accepted(site)
    except FedbridgeError as error:
        return (), f"{error.what} ({error.why})"
    return (
        tuple(StudyLine(each.id, each.acceptance.state, each.acceptance.who, each.acceptance.when) for each in found),
        "",
    )


def _connection_lines(status: SiteStatus) -> list[str]:
    seen = status.connection
    lines = [f"coordinator {seen.address}".rstrip()]
    if seen.problem:
        lines.append(f"  PROBLEM {seen.problem}")
    else:
        clock = "" if seen.clock_seconds is None else f"; clocks differ by {seen.clock_seconds:+.0f} s"
        lines.append(f"  reachable, its certificate is valid until {seen.certificate_until}{clock}")
    lines += [f"  WARNING {each}" for each in seen.warnings]
    running = any(each.name == SUPERNODE and each.pid for each in status.services)
    if status.supernode:
        lines.append(f"  the SuperNode's log{'' if running else ', before it ended'}: {status.supernode}")
    return lines


def _message_line(effort: Effort) -> str:
    where = "" if effort.round is None else f" round {effort.round}"
    cost = f"{effort.seconds:.1f} s, {effort.peak_bytes / 1e6:.0f} MB"
    return f"  {effort.when}  {effort.message + where:<24}{effort.outcome:<20}{cost}"
