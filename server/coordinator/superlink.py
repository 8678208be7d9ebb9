"""Flower's SuperLink of a coordinator's folder: its command, and what it is asked over its control interface.

`flwr supernode list` names neither a node's key nor the site, so the interface behind that command is used.
"""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import ServiceError
from bridge.services import flower_environment
from server.coordinator.folder import CoordinatorFolder

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.control import ControlHttpClient

_HEALTH_SECONDS = 3.0
_POLL_SECONDS = 0.5
_SAME_SECONDS = 0.01
_MISSED_HEARTBEATS = 2
"""Flower takes a node for online until this many intervals have passed."""


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it."""

    id: int
    name: str
    public_key: str
    """PEM."""
    status: str
    """registered (never came), online, offline, unregistered (for good)."""
    last_seen: str
    """UTC, ISO 8601; empty where it never came."""


def command(folder: CoordinatorFolder) -> tuple[str, ...]:
    """flower-superlink in the foreground. Raises `ServiceError` where it is not installed."""
    binaries = Path(sys.executable).parent
    found = shutil.which("flower-superlink", path=str(binaries)) or shutil.which("flower-superlink")
    if found is None:
        raise ServiceError("the command flower-superlink is not installed", fix="pip install fedbridge again")
    return (
        found,
        "--host",
        "127.0.0.1",
        "--port",
        str(folder.settings.superlink_port),
        "--ssl-ca-certfile",
        str(folder.ca_certificate),
        "--ssl-certfile",
        str(folder.inner_certificate),
        "--ssl-keyfile",
        str(folder.inner_key),
        "--enable-supernode-auth",
        # Otherwise it starts an executor by itself, not again when that dies, and hands a run's token to whoever asks.
        "--isolation",
        "process",
        "--superexec-auth-secret-file",
        str(folder.executor_secret),
        "--disable-runtime-dependency-installation",
        "--database",
        str(folder.database),
    )


def environment(folder: CoordinatorFolder) -> dict[str, str]:
    """Of the SuperLink and of what it starts, which it calls by bare names."""
    found = flower_environment(folder.flower_home)
    return {**found, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', os.defpath)}"}


def become(folder: CoordinatorFolder) -> None:
    """Replace this process by the SuperLink, in an empty folder."""
    enter_empty(folder)
    found = command(folder)
    os.execve(found[0], found, environment(folder))


def enter_empty(folder: CoordinatorFolder) -> None:
    """Go to an empty folder: Flower's processes import from where they were started."""
    empty = folder.flower_home / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    os.chdir(empty)


def answers(folder: CoordinatorFolder) -> bool:
    """Whether the SuperLink is there and healthy."""
    port = folder.settings.superlink_port
    try:
        context = ssl.create_default_context(cafile=str(folder.ca_certificate))
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=_HEALTH_SECONDS, context=context)
        with closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def wait(folder: CoordinatorFolder, seconds: float) -> bool:
    """Whether it is there within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (there := answers(folder)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return there


class Control:
    """The SuperLink's control interface. Every method raises `ServiceError` where it does not answer or refuses."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> list[Node]:
        """All nodes, those that were unregistered too."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with _explained("list its nodes"):
            answer = self._client.ListNodes(ListNodesRequest())
        return [
            Node(each.node_id, each.name, each.public_key.decode("ascii", "replace"), each.status, _last_seen(each))
            for each in answer.nodes_info
        ]

    def register(self, site: str, public_key: str) -> int:
        """Let a node in: its key as PEM, named as its site. Its id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with _explained(f"register '{site}'"):
            answer = self._client.RegisterNode(RegisterNodeRequest(public_key=public_key.encode(), name=site))
        if not answer.node_id:
            raise ServiceError(f"the SuperLink did not register '{site}'", why="it gives no reason", fix="try again")
        return int(answer.node_id)

    def unregister(self, node: int) -> None:
        """Shut a node out at once and for good: its key is refused from now on."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with _explained(f"unregister node {node}"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))


@contextmanager
def control(folder: CoordinatorFolder) -> Iterator[Control]:
    """The control interface of the folder's SuperLink."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        folder.superlink_address,
        insecure=False,
        root_certificates=folder.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    with client:
        yield Control(client)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ServiceError(f"the SuperLink refused to {what}", why=error.response.text.strip()[:500]) from error
    except (httpx.HTTPError, ValueError) as error:
        raise ServiceError(
            f"the SuperLink could not be asked to {what}",
            why=str(error) or type(error).__name__,
            fix="see `fedbridge-server status`",
        ) from error


def _last_seen(node: NodeInfo) -> str:
    if not node.last_activated_at:
        return ""
    beat = datetime.fromtimestamp(node.online_until - _MISSED_HEARTBEATS * node.heartbeat_interval, UTC)
    # Flower cuts `online_until` short where a node says goodbye or is shut out: then it was there until that moment.
    moments = [datetime.fromisoformat(each) for each in (node.last_deactivated_at, node.unregistered_at) if each]
    cut = [each for each in moments if abs(each.timestamp() - node.online_until) < _SAME_SECONDS]
    return max([beat, *cut]).astimezone(UTC).isoformat(timespec="seconds")
