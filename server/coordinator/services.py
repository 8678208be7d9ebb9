"""The coordinator's services, SuperLink, executor and nginx: in the foreground for systemd, or supervised here."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing

from bridge import processes
from bridge import services as supervised
from bridge.errors import ServiceError
from bridge.installation import check_installation
from bridge.services import Service
from server.coordinator import nginx, registry, superlink, units
from server.coordinator.folder import CoordinatorFolder

SUPERLINK, EXECUTOR, PROXY = "superlink", "executor", "nginx"
_READY_SECONDS = 60.0
_ANSWER_SECONDS = 3.0
_POLL_SECONDS = 0.5
_RESTART_SECONDS = 3.0
_TAIL_CHARACTERS = 1500
_PRIVATE = 0o077


def run_superlink(folder: CoordinatorFolder) -> None:
    """Become Flower's SuperLink, on 127.0.0.1 and on the folder's database. Does not return.

    Raises `CodeError` where the installed code is not what it must be.
    """
    check_installation()
    os.umask(_PRIVATE)
    superlink.become(folder)


def run_executor(folder: CoordinatorFolder) -> None:
    """Be the coordinator's executor until ended."""
    from server.coordinator import executor

    os.umask(_PRIVATE)
    executor.run_executor(folder)


def run_proxy(folder: CoordinatorFolder) -> None:
    """Become nginx, once the SuperLink is there and lets in whom the registry names. Does not return.

    Raises `ServiceError` where the SuperLink does not answer within a minute: then the door stays shut.
    """
    os.umask(_PRIVATE)
    nginx.check_configuration(folder)
    if not superlink.wait(folder, _READY_SECONDS):
        raise ServiceError(
            "the SuperLink does not answer",
            why=f"nothing healthy on {folder.superlink_address}",
            fix=f"see {folder.state / SUPERLINK}.log",
        )
    registry.sync(folder)
    # Workers of an nginx that was killed hold the port.
    processes.end(nginx.processes(folder))
    nginx.become(folder)


def serve(folder: CoordinatorFolder) -> None:
    """Keep the services running until SIGTERM or SIGINT, in the foreground."""
    os.umask(_PRIVATE)
    program = str(units.own_command())
    environment = superlink.environment(folder)
    supervised.supervise(
        folder.state,
        [
            Service(
                name,
                (program, verb, str(folder.path)),
                environment,
                folder.state / f"{name}.log",
                restart_seconds=_RESTART_SECONDS,
            )
            for name, verb in ((SUPERLINK, "superlink"), (EXECUTOR, "executor"), (PROXY, "proxy"))
        ],
    )


def start(folder: CoordinatorFolder) -> None:
    """Start the services, detached; returns when sites can connect.

    Raises `ServiceError` where they run already, a port is taken, nginx refuses its configuration, or one of them does
    not come up: then none is left running. `CodeError` where the installed code is not what it must be.
    """
    check_installation()
    _refuse_second_start(folder)
    nginx.check_configuration(folder)
    _require_free(("127.0.0.1",), folder.settings.superlink_port)
    _require_free(folder.settings.listen, folder.settings.port)
    supervised.start(folder.state, (str(units.own_command()), "serve", str(folder.path)))
    deadline = time.monotonic() + 2 * _READY_SECONDS
    while not (door_answers(folder) and superlink.answers(folder)):
        restarts = sum(each.restarts for each in supervised.running(folder.state))
        if restarts > 2 or time.monotonic() > deadline:
            words = _last_words(folder)
            stop(folder)
            raise ServiceError("the coordinator's services did not come up", why=words, fix=f"see {folder.state}")
        time.sleep(_POLL_SECONDS)


def stop(folder: CoordinatorFolder) -> list[str]:
    """End what `start` started; the names of what was ended. Sites get no answer from then on."""
    ended = supervised.stop(folder.state)
    left = nginx.processes(folder)
    processes.end(left)
    return ended or ([PROXY] if left else [])


def door_answers(folder: CoordinatorFolder) -> bool:
    """Whether nginx answers on the sites' port, with a certificate that a site would take."""
    return not door_fault(folder)


def door_fault(folder: CoordinatorFolder) -> str:
    """What a site on this machine would meet at the door: nothing (empty), or why it can't connect."""
    settings = folder.settings
    try:
        context = ssl.create_default_context(cafile=str(folder.ca_certificate))
        with closing(_Named(settings.local_address, settings.port, settings.host, context)) as connection:
            connection.request("GET", "/")
            answer = connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is refused: {error.verify_message}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return "" if answer.status == 404 else f"it answers {answer.status} where nginx would answer 404"


def door_is_open(folder: CoordinatorFolder) -> bool:
    """Whether anything takes connections on the sites' port, with whatever certificate."""
    settings = folder.settings
    try:
        socket.create_connection((settings.local_address, settings.port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


class _Named(http.client.HTTPSConnection):
    """HTTPS to one address, in the name of another host."""

    def __init__(self, address: str, port: int, host: str, context: ssl.SSLContext) -> None:
        super().__init__(address, port, timeout=_ANSWER_SECONDS)
        self._expected, self._trusted = host, context

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), timeout=_ANSWER_SECONDS)
        self.sock = self._trusted.wrap_socket(plain, server_hostname=self._expected)


def _refuse_second_start(folder: CoordinatorFolder) -> None:
    if any(each.process for each in supervised.running(folder.state)):
        raise ServiceError(
            f"{folder.path}: its services are running already", fix="stop them first, or ask for their status"
        )
    # What a supervisor that was killed may have left.
    processes.end(nginx.processes(folder))


def _require_free(addresses: Sequence[str], port: int) -> None:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                raise ServiceError(
                    f"port {port} on {address} can't be used",
                    why=error.strerror or str(error),
                    fix="end the program that holds it, or choose another port with `init --force`",
                ) from error


def _last_words(folder: CoordinatorFolder) -> str:
    found = []
    for name in (SUPERLINK, PROXY):
        path = folder.state / f"{name}.log"
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        found.append(f"{name}: {text[-_TAIL_CHARACTERS:] or 'said nothing'}")
    return "\n".join(found)
