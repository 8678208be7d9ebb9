"""What can be told from here of the connection to the coordinator: TLS, certificate, clocks, the SuperNode's log."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from bridge.enrolment import CoordinatorFile

TIMEOUT_SECONDS = 10.0
CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 60.0, 240.0
"""Flower refuses a node's signature that is older than 300 s by the server's clock."""
CERTIFICATE_WARNING_DAYS = 30

_LOG_TAIL_BYTES = 65_536
# OpenSSL's verification errors (x509_vfy.h).
_EXPIRED, _NOT_YET_VALID, _OTHER_HOST, _OTHER_ADDRESS = 10, 9, 62, 64
_ANOTHER = "its certificate is for another host name or address: compare the address with the coordinator"
_MEANINGS = {
    _EXPIRED: "its certificate has expired (or this machine's clock is wrong): the coordinator must renew it",
    _NOT_YET_VALID: "its certificate is not yet valid: this machine's clock, or the coordinator's, is wrong",
    _OTHER_HOST: _ANOTHER,
    _OTHER_ADDRESS: _ANOTHER,
}


@dataclass(frozen=True)
class Connection:
    """What a look at the coordinator's door gave. `problem` is empty where TLS with the pinned authority stands."""

    address: str
    problem: str = ""
    certificate_until: str = ""
    """UTC, ISO 8601."""
    certificate_days: float | None = None
    clock_seconds: float | None = None
    """How far this machine's clock is ahead of the coordinator's, to about a second; None where it did not say."""

    @property
    def warnings(self) -> list[str]:
        """What will break, or has."""
        found = []
        if self.clock_seconds is not None and abs(self.clock_seconds) > CLOCK_WARNING_SECONDS:
            broken = abs(self.clock_seconds) > CLOCK_ERROR_SECONDS
            effect = "signatures are refused" if broken else "signatures are refused beyond 300 s"
            found.append(f"the clocks differ by {self.clock_seconds:+.0f} s: {effect}; set this machine's clock by NTP")
        if self.certificate_days is not None and self.certificate_days < CERTIFICATE_WARNING_DAYS:
            found.append(f"the coordinator's certificate expires in {self.certificate_days:.0f} days: tell them")
        return found

    @property
    def fails(self) -> bool:
        """Whether no message can pass as things are."""
        clock = self.clock_seconds
        return bool(self.problem) or (clock is not None and abs(clock) > CLOCK_ERROR_SECONDS)


def look(coordinator: CoordinatorFile) -> Connection:
    """Connect as the SuperNode would, and ask nothing of it. Never raises for what the other side does."""
    address = coordinator.address
    host, _, port = address.rpartition(":")
    try:
        trust = ssl.create_default_context(cadata=coordinator.ca_certificate)
    except (ssl.SSLError, ValueError) as error:
        return Connection(address, f"coordinator.yaml holds no usable certificate authority ({error})")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=TIMEOUT_SECONDS, context=trust)
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        until = ssl.cert_time_to_seconds(str((connection.sock.getpeercert() or {})["notAfter"]))
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        return Connection(address, _problem(error))
    finally:
        connection.close()
    now = datetime.now(UTC)
    ends = datetime.fromtimestamp(until, UTC)
    return Connection(
        address,
        certificate_until=ends.isoformat(timespec="seconds"),
        certificate_days=(ends - now).total_seconds() / 86_400,
        clock_seconds=_ahead(now, date),
    )


def supernode_says(log: Path) -> str:
    """In words, what the SuperNode's log tells last of its connection; empty where it tells nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        for sign, meaning in _SIGNS:
            if sign in line:
                return f"{meaning} ({line[:19]})"
    return ""


_SIGNS = (
    ("SuperNode ID:", "connected: the coordinator knows this site's key"),
    ("Sent successfully", "connected: a reply was sent"),
    ("Receiving:", "connected: a message came"),
    ("Connection successful", "connected again"),
    ("Connection attempt failed", "not connected: it tries again and again"),
    (
        "Failed to activate SuperNode",
        "refused by the coordinator: the key is not enrolled or was revoked, this machine's clock is wrong, or its "
        "predecessor was killed less than a minute ago (then the next tries help)",
    ),
    ("Exit Code:", "ended with an error: see the log"),
    ("SuperNode terminated gracefully", "signed off: it was stopped, or the coordinator revoked the key"),
    ("Starting Flower SuperNode", "starting"),
)


def _ahead(now: datetime, date: str | None) -> float | None:
    try:
        return None if date is None else (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return None


def _problem(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _MEANINGS.get(
            error.verify_code, f"its certificate is not of the pinned authority ({error.verify_message})"
        )
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS as expected ({error.reason or error})"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS:.0f} s: the address is wrong, or a firewall drops the connection"
    if isinstance(error, socket.gaierror):
        return f"its host name can't be resolved ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return "the connection is refused: nothing listens there, or a firewall rejects it"
    return f"the connection breaks ({error or type(error).__name__})"
