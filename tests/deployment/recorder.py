"""A recorder at HTTP between a hospital and the coordinator's proxy, which uses nothing of fedbridge.

It ends TLS with a certificate of the test's, writes down every request whole, and passes it on over TLS. What it knows
of the content is Flower's own protobuf.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

REQUESTS: Mapping[str, Any] = {
    "/v1/fleet/register-node": fleet_pb2.RegisterNodeFleetRequest,
    "/v1/fleet/activate-node": fleet_pb2.ActivateNodeRequest,
    "/v1/fleet/deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "/v1/fleet/send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "/v1/fleet/pull-messages": fleet_pb2.PullMessagesRequest,
    "/v1/fleet/push-messages": fleet_pb2.PushMessagesRequest,
    "/v1/fleet/get-run": run_pb2.GetRunRequest,
    "/v1/fleet/get-fab": fab_pb2.GetFabRequest,
    "/v1/fleet/push-object": message_pb2.PushObjectRequest,
    "/v1/fleet/pull-object": message_pb2.PullObjectRequest,
    "/v1/fleet/confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}


@dataclass
class Sent:
    """One request of a hospital."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    status: int = 0


@dataclass
class Recording:
    """Everything a hospital sent, in order."""

    requests: list[Sent] = field(default_factory=list)

    def decoded(self) -> list[tuple[str, Any]]:
        """Path and protobuf of every request."""
        found = []
        for sent in [each for each in self.requests if each.method == "POST"]:
            message = REQUESTS[sent.path]()
            message.ParseFromString(sent.body)
            found.append((sent.path, message))
        return found

    def replies(self) -> list[tuple[Any, Message | None]]:
        """Each message that was pushed: its protobuf, and its content inflated from the objects (None: an error)."""
        decoded = self.decoded()
        objects = {m.object_id: m.object_content for path, m in decoded if path.endswith("push-object")}
        found = []
        for path, message in decoded:
            if not path.endswith("push-messages"):
                continue
            for proto, tree in zip(message.messages_list, message.message_object_trees, strict=True):
                if proto.HasField("error"):
                    found.append((proto, None))
                else:
                    found.append(
                        (proto, inflate_object_from_contents(tree.object_id, objects, keep_object_contents=True))
                    )
        return found


@contextmanager
def recording(port: int, target: int, certificate: Path, key: Path, authority: Path) -> Iterator[Recording]:
    """Listen with TLS on `port` and pass on to `target`, both on 127.0.0.1."""
    record, lock = Recording(), threading.Lock()
    upstream = ssl.create_default_context(cafile=str(authority))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            assert "chunked" not in self.headers.get("Transfer-Encoding", "")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            sent = Sent(self.command, self.path, list(self.headers.items()), body)
            with lock:
                record.requests.append(sent)
            try:
                connection = http.client.HTTPSConnection("127.0.0.1", target, context=upstream, timeout=120)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
            except OSError:
                self.send_error(502)
                return
            sent.status = answer.status
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
