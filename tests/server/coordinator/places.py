"""Coordinators' folders, and sites' keys and enrolment requests, which ssh-keygen and openssl make."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from server.coordinator.folder import CoordinatorFolder, ServerFile
from server.coordinator.initialise import initialise
from tests.end_to_end.commands import command
from tests.waiting import free_port


def made(path: Path, **settings: Any) -> CoordinatorFolder:
    """A coordinator's folder on free ports, reached as localhost."""
    values = {"name": "heart", "host": "localhost", "port": free_port(), "superlink_port": free_port()} | settings
    return initialise(path, ServerFile(**values)).folder


@dataclass(frozen=True)
class Keys:
    """A node's key pair as ssh-keygen makes it."""

    secret: Path
    public: str

    def sign(self, content: bytes) -> bytes:
        """By openssl, which reads another format of the same key."""
        pem = self.secret.with_suffix(".pem")
        if not pem.exists():
            shutil.copy(self.secret, pem)
            pem.chmod(0o600)
            done = ["ssh-keygen", "-q", "-p", "-m", "PEM", "-N", "", "-P", "", "-f", str(pem)]
            subprocess.run(done, check=True, capture_output=True)
        signed = ["openssl", "dgst", "-sha384", "-sign", str(pem)]
        return subprocess.run(signed, input=content, check=True, capture_output=True).stdout


def new_keys(path: Path, *, kind: str = "ecdsa", bits: int = 384) -> Keys:
    make = ["ssh-keygen", "-q", "-t", kind, "-b", str(bits), "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(make, check=True, capture_output=True)
    return Keys(path, " ".join(path.with_name(path.name + ".pub").read_text().split()[:2]))


def write_request(path: Path, named: str, keys: Keys, **changes: str) -> Path:
    """An enrolment request; `changes` come after the signature."""
    content = json.dumps(["fedbridge.request/1", named, keys.public], separators=(",", ":")).encode()
    request = {
        "schema": "fedbridge.request/1",
        "site": named,
        "public_key": keys.public,
        "signature": base64.b64encode(keys.sign(content)).decode(),
    }
    path.write_text(yaml.safe_dump(request | changes), encoding="utf-8")
    return path


def spoken(folder: CoordinatorFolder, sent: bytes) -> bytes:
    """What the sites' port answers to these bytes over TLS, until it closes or falls silent."""
    context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    with (
        socket.create_connection(("127.0.0.1", folder.settings.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(sent)
        return heard(secure)


def heard(connection: socket.socket) -> bytes:
    connection.settimeout(1.5)
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except (TimeoutError, ConnectionError, ssl.SSLError):
        pass
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


class SuperNode:
    """A real flower-supernode with a key of its own, without an executor: it connects, and asks for messages."""

    def __init__(self, place: Path, folder: CoordinatorFolder, keys: Keys, mark: dict[str, str]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.log = place / f"supernode-{time.monotonic_ns()}.log"
        options: list[str | Path] = ["--superlink", f"localhost:{folder.settings.port}"]
        options += ["--root-certificates", folder.ca_certificate, "--auth-supernode-private-key", keys.secret]
        options += ["--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port())]
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(place / "home")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [command("flower-supernode"), *map(str, options)],
                env={**os.environ, **quiet, **mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def connected(self) -> bool:
        return "SuperNode ID:" in self.said

    def ended(self, seconds: float = 60) -> str:
        """What it said, once it has ended by itself."""
        self.process.wait(timeout=seconds)
        return self.said

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
