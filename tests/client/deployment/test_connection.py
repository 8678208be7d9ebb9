"""Real TLS on loopback: what `status` tells of a coordinator whose certificate, address or clock is wrong."""

from __future__ import annotations

import base64
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bridge.enrolment import CoordinatorFile
from client.deployment.connection import Connection, look, supernode_says
from tests.client.deployment.coordinator import Authority
from tests.waiting import free_port


@contextmanager
def door(certificate: tuple[Path, Path] | None, ahead: float | None = 0.0) -> Iterator[int]:
    """A server on loopback whose clock is `ahead` seconds ahead of ours (None: it tells no time); yields its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)
            if ahead is not None:
                self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def file(authority: Authority, port: int, host: str = "127.0.0.1") -> CoordinatorFile:
    return CoordinatorFile(
        name="fedbridge",
        address=f"{host}:{port}",
        signing_key=base64.b64encode(bytes(32)).decode(),
        ca_certificate=authority.ca.read_text(),
    )


def test_a_sound_door(authority: Authority) -> None:
    with door(authority.server("long", days=200)) as port:
        for host in ("127.0.0.1", "localhost"):
            seen = look(file(authority, port, host))
            assert (seen.problem, seen.warnings, seen.fails) == ("", [], False)
            assert seen.certificate_days == pytest.approx(200, abs=0.1)
            assert seen.clock_seconds == pytest.approx(0, abs=3)
    assert seen.certificate_until.endswith("+00:00")


@pytest.mark.parametrize(("ahead", "warned", "fails"), [(-90, True, False), (30, False, False), (3600, True, True)])
def test_clocks_that_differ(authority: Authority, ahead: float, warned: bool, fails: bool) -> None:
    with door(authority.server("long", days=200), ahead) as port:
        seen = look(file(authority, port))
    assert seen.clock_seconds == pytest.approx(-ahead, abs=3)
    assert [warning.startswith("the clocks differ by ") for warning in seen.warnings] == [True] * warned
    assert seen.fails == fails
    assert all(("signatures are refused;" in each) == fails for each in seen.warnings)


def test_a_door_that_tells_no_time(authority: Authority) -> None:
    with door(authority.server("long", days=200), None) as port:
        seen = look(file(authority, port))
    assert (seen.problem, seen.clock_seconds, seen.fails) == ("", None, False)


def test_a_certificate_that_will_expire_soon(authority: Authority) -> None:
    with door(authority.server("short", days=5)) as port:
        seen = look(file(authority, port))
    assert seen.warnings == ["the coordinator's certificate expires in 5 days: tell them"]
    assert not seen.fails


@pytest.mark.parametrize(
    ("certificate", "problem"),
    [
        (lambda mine, other: mine.server("expired", days=-1), "its certificate has expired"),
        (lambda mine, other: mine.server("elsewhere", hosts=("example.org",)), "for another host name"),
        (lambda mine, other: other.server(), "not of the pinned authority"),
        (lambda mine, other: None, "does not speak TLS"),
    ],
)
def test_a_door_that_is_not_the_coordinators(
    authority: Authority,
    tmp_path: Path,
    certificate: Callable[[Authority, Authority], tuple[Path, Path] | None],
    problem: str,
) -> None:
    with door(certificate(authority, Authority(tmp_path))) as port:
        seen = look(file(authority, port))
    assert problem in seen.problem
    assert seen.fails
    assert (seen.certificate_until, seen.clock_seconds) == ("", None)


def test_nobody_there(authority: Authority) -> None:
    assert "the connection is refused" in look(file(authority, free_port())).problem
    assert "can't be resolved" in look(file(authority, 8443, "no-such-host.invalid")).problem
    broken = file(authority, 8443).model_copy(update={"ca_certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n"})
    assert "no usable certificate authority" in look(broken).problem


LOG = """2025-01-01 10:00:00,000 INFO Starting Flower SuperNode
2025-01-01 10:00:01,000 INFO SuperNode ID: 5678914678248188588
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", "connected: the coordinator knows this site's key (2025-01-01 10:00:01)"),
        ("2025-01-01 10:00:02,000 WARNING Connection attempt failed, retrying in 0.06 seconds\n", "not connected"),
        (
            "2025-01-01 10:00:02,000 WARNING Connection attempt failed, retrying in 0.06 seconds\n"
            "2025-01-01 10:00:03,000 INFO Connection successful after 1.00 seconds and 2 tries.\n",
            "connected again",
        ),
        ("2025-01-01 10:00:02,000 ERROR Exit Code: 305\n[code: 2004] Failed to activate SuperNode.\n", "refused by"),
        ("2025-01-01 10:00:02,000 INFO SuperNode terminated gracefully.\n", "signed off"),
    ],
)
def test_what_the_supernodes_log_tells(tmp_path: Path, more: str, said: str) -> None:
    log = tmp_path / "supernode.log"
    assert supernode_says(log) == ""
    log.write_text("x" * 100_000 + "\n" + LOG + more)
    assert supernode_says(log).startswith(said)


def test_nothing_known_is_nothing_wrong() -> None:
    assert Connection("a:1").warnings == []
    assert not Connection("a:1").fails
