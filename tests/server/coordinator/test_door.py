"""The sites' port from outside, with nginx and SuperLink as `fedbridge-server start` starts them.

What is answered is one witness; the other is the SuperLink's own log, in which nothing but fleet calls may appear.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.coordinator import nginx
from tests.server.coordinator.conftest import Running
from tests.server.coordinator.places import heard, made, spoken, statuses

pytestmark = pytest.mark.slow

_METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")
_FLEET = "/v1/fleet/pull-messages"
_REQUEST = re.compile(r'"(\w+) (\S+) HTTP/[\d.]+" (\d+)')


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if nginx.program() is None:
        pytest.skip("nginx is not installed")
    place = tmp_path_factory.mktemp("door")
    found = Running(made(place / "c"), place)
    try:
        found.call("start", found.folder.path)
        yield found
    finally:
        found.close()


@pytest.fixture
def reached(running: Running) -> Iterator[list[tuple[str, str, str]]]:
    """Filled at the end of the test: the requests (method, path, status) that reached the SuperLink meanwhile.

    Whatever a test does, no path but the fleet's may be among them.
    """
    before = len(running.heard())
    found: list[tuple[str, str, str]] = []
    yield found
    found += _REQUEST.findall(running.heard()[before:])
    allowed = {f"/v1/fleet/{each}" for each in nginx.FLEET_CALLS}
    assert {path for _, path, _ in found} <= allowed
    assert {method for method, _, _ in found} <= {"POST"}


def request(line: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    content = [line, f"Host: {host}", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join(content).encode("latin-1") + b"\r\n\r\n" + body


def through(running: Running) -> int:
    return len(_REQUEST.findall(running.heard()))


@pytest.mark.usefixtures("reached")
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/v1",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-object",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages%20",
        "/v1/fleet/pull%2Dmessages",
        "/v1/fleet/PULL-MESSAGES",
        "/V1/fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/./v1/fleet/pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/%252e%252e/control/list-nodes",
        "/v1/fleet/..;/control/list-nodes",
        "/v1/fleet/..\\control\\list-nodes",
        "/v1/control/../fleet/pull-messages",
        "/x/../v1/fleet/pull-messages",
        "/v1/fleet/pull-messages;/../../control/list-nodes",
        "http://127.0.0.1/v1/control/list-nodes",
        "https://localhost/health",
    ],
)
def test_other_addresses_are_answered_404_whatever_the_method(running: Running, path: str) -> None:
    before = through(running)
    for method in _METHODS:
        assert statuses(spoken(running.folder, request(f"{method} {path} HTTP/1.1"))) == [404], method
        answer = spoken(running.folder, f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        assert statuses(answer) == [404], method
    assert through(running) == before


@pytest.mark.usefixtures("reached")
@pytest.mark.parametrize("call", nginx.FLEET_CALLS)
def test_a_fleet_call_gets_through_by_post_with_http_1_1_alone(running: Running, call: str) -> None:
    before = through(running)
    path = f"/v1/fleet/{call}"
    for method in _METHODS:
        if method != "POST":
            assert statuses(spoken(running.folder, request(f"{method} {path} HTTP/1.1"))) == [404], method
    assert statuses(spoken(running.folder, request(f"POST {path} HTTP/1.0"))) == [404]
    assert through(running) == before
    # Without a signature: it gets to the SuperLink, and no further.
    typed = request(f"POST {path} HTTP/1.1", "Content-Type: application/protobuf")
    assert statuses(spoken(running.folder, typed)) == [401]
    assert through(running) == before + 1


def test_the_host_header_and_others_decide_nothing(running: Running, reached: list[tuple[str, str, str]]) -> None:
    before = through(running)
    strange = ("X-Original-URL: /v1/control/list-nodes", "X-Rewrite-URL: /health", "X-Forwarded-Prefix: /v1/control")
    for host in ("127.0.0.1:8000", "superlink", "evil.example.org", f"localhost:{running.folder.settings.port}"):
        assert statuses(spoken(running.folder, request("GET /health HTTP/1.1", host=host))) == [404]
        sent = request(f"POST {_FLEET} HTTP/1.1", "Content-Type: application/protobuf", *strange, host=host)
        assert statuses(spoken(running.folder, sent)) == [401]
    # A scheme and a host in the request line name nothing either: the call that is made is the one in the list.
    whole = request(f"POST http://127.0.0.1:1{_FLEET} HTTP/1.1", "Content-Type: application/protobuf")
    assert statuses(spoken(running.folder, whole)) in ([401], [404])
    assert through(running) - before in (4, 5)


def test_pipelined_requests_are_judged_one_by_one(running: Running, reached: list[tuple[str, str, str]]) -> None:
    before = through(running)
    body = b"\x0a\x00"
    head = f"POST {_FLEET} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n".encode()
    call = head + b"Content-Length: 2\r\n\r\n" + body
    other = b"GET /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = request("POST /v1/control/list-nodes HTTP/1.1")
    assert statuses(spoken(running.folder, call + other + call + other + last)) == [401, 404, 401, 404, 404]
    assert through(running) == before + 2


_INNER = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
_CHUNKED = b"0\r\n\r\n" + _INNER


@pytest.mark.usefixtures("reached")
@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        # Both lengths, in both orders and spellings: refused, whichever a server behind would believe.
        ((f"Content-Length: {len(_CHUNKED)}", "Transfer-Encoding: chunked"), _CHUNKED, [400]),
        (("Transfer-Encoding: chunked", "Content-Length: 4"), _CHUNKED, [400]),
        (("Transfer-Encoding : chunked", f"Content-Length: {len(_CHUNKED)}"), _CHUNKED, [400]),
        (("Content-Length: 0", f"Content-Length: {len(_INNER)}"), _INNER, [400]),
        ((f"Content-Length: {len(_INNER)}, 0",), _INNER, [400]),
        (("Content-Length: -1",), _INNER, [400]),
        (("Content-Length: 0x10",), _INNER, [400]),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), _CHUNKED, [400]),
        (("Transfer-Encoding: identity, chunked",), _CHUNKED, [501]),
        (("Transfer-Encoding: xchunked",), _CHUNKED, [501]),
        # One length: what follows it is a request of its own, and is refused as one.
        (("Transfer-Encoding: chunked",), _CHUNKED, [401, 404]),
        (("Content-Length: 0",), _INNER, [401, 404]),
        # As long as the body says: the inner request is a body, and no message.
        ((f"Content-Length: {len(_INNER)}",), _INNER, [400]),
        # Broken chunks.
        (("Transfer-Encoding: chunked",), b"zz\r\n" + _INNER, [400]),
        (("Transfer-Encoding: chunked",), b"ffffffffffffffffff\r\n" + _INNER, [400]),
        # A header that goes on in the next line, or is spelt with underscores, is none.
        (("Content-Length: 0", "X: a\r\n b"), b"", [400]),
    ],
)
def test_no_request_hides_in_another(
    running: Running, headers: tuple[str, ...], body: bytes, expected: list[int]
) -> None:
    head = f"POST {_FLEET} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
    sent = (head + "".join(f"{each}\r\n" for each in headers) + "\r\n").encode() + body
    assert statuses(spoken(running.folder, sent)) == expected


@pytest.mark.usefixtures("reached")
@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health\r\n",
        b"POST /v1/fleet/pull-messages%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT 127.0.0.1:8000 HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n",
        b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/fleet/pull-messages\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/fleet/pull-messages /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/fleet/../../health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\n\r\n",
        b"\x00" * 500,
        b"\x16\x03\x01" * 100,
    ],
)
def test_what_is_no_request_is_refused(running: Running, sent: bytes) -> None:
    before = through(running)
    answer = spoken(running.folder, sent)
    assert all(400 <= each < 506 for each in statuses(answer))
    assert b"200 OK" not in answer
    assert through(running) == before


@pytest.mark.usefixtures("reached")
def test_a_body_over_the_limit_is_refused_before_it_is_read(running: Running) -> None:
    before = through(running)
    limit = running.folder.settings.body_megabytes * 1024 * 1024
    head = f"POST {_FLEET} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
    assert statuses(spoken(running.folder, f"{head}Content-Length: {limit + 1}\r\n\r\n".encode())) == [413]
    # In chunks nobody says how long it will be: refused when it is too long.
    piece = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    assert statuses(_in_pieces(running, head, piece, running.folder.settings.body_megabytes + 1)) == [413]
    assert through(running) == before
    # At the limit it gets through, and is no message.
    sent = f"{head}Content-Length: {limit}\r\nConnection: close\r\n\r\n".encode() + b"\xff" * limit
    assert statuses(spoken(running.folder, sent)) == [400]
    assert through(running) == before + 1
    # And nothing of it was put on the disk.
    assert [each for each in (running.folder.nginx / "temporary").rglob("*") if each.is_file()] == []


def _in_pieces(running: Running, head: str, piece: bytes, count: int) -> bytes:
    context = ssl.create_default_context(cafile=str(running.folder.ca_certificate))
    plain = socket.create_connection(("127.0.0.1", running.folder.settings.port), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
        try:
            secure.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(count):
                secure.sendall(piece)
        except (ConnectionError, ssl.SSLError):
            pass
        return heard(secure)


@pytest.mark.usefixtures("reached")
def test_plain_http_is_refused(running: Running) -> None:
    before = through(running)
    for path in (_FLEET, "/health"):
        with socket.create_connection(("127.0.0.1", running.folder.settings.port), timeout=5) as plain:
            plain.sendall(request(f"POST {path} HTTP/1.1"))
            assert statuses(heard(plain)) == [400]
    assert through(running) == before


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_tls_is_refused(running: Running, version: str) -> None:
    done = _openssl_client(running, version, "-cipher", "ALL:@SECLEVEL=0")
    assert "Cipher is (NONE)" in done


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_new_tls_is_taken_with_a_certificate_of_the_authority(running: Running, version: str) -> None:
    assert "Verify return code: 0 (ok)" in _openssl_client(running, version)
    assert "Verify return code: 0 (ok)" not in _openssl_client(running, version, trusted=False)


def _openssl_client(running: Running, *options: str, trusted: bool = True) -> str:
    ask = ["openssl", "s_client", "-connect", f"127.0.0.1:{running.folder.settings.port}", "-servername", "localhost"]
    ask += ["-verify_hostname", "localhost", *options]
    ask += ["-CAfile", str(running.folder.ca_certificate)] if trusted else ["-no-CAfile", "-no-CApath"]
    done = subprocess.run(ask, input=b"", capture_output=True, timeout=30, check=False)
    return (done.stdout + done.stderr).decode(errors="replace")


def test_the_superlink_listens_on_this_machine_alone(running: Running) -> None:
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == running.folder.settings.superlink_port:
                listening.add(address.rpartition(":")[0])
    assert listening == {"0100007F"}


def test_nginx_works_as_nobody_and_leaves_no_version(running: Running) -> None:
    answer = spoken(running.folder, request("GET / HTTP/1.1"))
    assert b"Server: nginx\r\n" in answer
    assert not re.search(rb"nginx/\d", answer)
    workers = [each.pid for each in nginx.processes(running.folder) if each.pid != running.pid("nginx")]
    assert len(workers) == 1
    users = Path(f"/proc/{workers[0]}/status").read_text()
    assert not re.search(r"^Uid:.*\b0\b", users, re.M)


def test_refused_requests_are_in_the_log(running: Running) -> None:
    spoken(running.folder, request("GET /v1/control/list-nodes?secret HTTP/1.1"))
    lines = (running.folder.nginx / "access.log").read_text().splitlines()
    assert re.search(r'^\S+ 127\.0\.0\.1 "GET /v1/control/list-nodes\?secret HTTP/1\.1" 404 ', lines[-1])
