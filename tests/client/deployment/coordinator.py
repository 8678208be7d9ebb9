"""A real coordinator on loopback: an own CA, a SuperLink with TLS and node authentication, and tiny apps to run.

The tiny app's ServerApp asks every node and writes down what it was told; its ClientApp, like everything in its
`client` package, leaves a mark where it runs.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.enrolment import CoordinatorFile
from bridge.study.signing import new_key, public_of
from server.flower_command import FlowerCommand
from tests.waiting import free_port

BIN = Path(sys.executable).parent
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}

CLIENT_APP = """
from pathlib import Path
Path({mark!r}).touch()
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query("describe")
def describe(message, context):
    return Message(RecordDict({{"config": ConfigRecord({{"site": "the bundle's own code"}})}}), reply_to=message)
"""

SERVER_APP = """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    deadline = time.monotonic() + 60
    while not list(grid.get_node_ids()) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = []
    for kind in context.run_config["kinds"].split():
        messages = [Message(RecordDict({"config": ConfigRecord()}), n, kind) for n in grid.get_node_ids()]
        for reply in grid.send_and_receive(messages, timeout=90):
            if reply.has_error():
                told.append([kind, reply.error.code, reply.error.reason])
            else:
                told.append([kind, 0, {k: dict(v) for k, v in reply.content.items()}])
    with open(context.run_config["out"], "w") as file:
        json.dump(told, file)
"""

PYPROJECT = """
[project]
name = "tiny"
version = "0.1.0"
description = "a tiny app"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
out = ""
kinds = ""
job = ""
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.2)


@contextmanager
def process(
    *command: str | Path, log: Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own that is ended with all its children when the block ends."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            [str(each) for each in command],
            cwd=cwd,
            env={**os.environ, **FLOWER, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(started.pid, number)
                started.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


class Authority:
    """A certificate authority and server certificates of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self._name = name
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=9))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(
        self, name: str = "server", days: float = 5, hosts: tuple[str, ...] = ("localhost",)
    ) -> tuple[Path, Path]:
        """Certificate and key files, valid until `days` from now; 127.0.0.1 is always among its names."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.DNSName(each) for each in hosts]
        if "localhost" in hosts:
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=8))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        paths = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )
        return paths


class Coordinator:
    """A running SuperLink and what a site needs to know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.secret = new_key()
        self.authority = Authority(folder / "ca")
        self.log = folder / "superlink.log"
        self._flower = FlowerCommand(folder / "home", {})

    def file(self) -> CoordinatorFile:
        return CoordinatorFile(
            name="fedbridge",
            address=f"127.0.0.1:{self.port}",
            signing_key=base64.b64encode(public_of(self.secret)).decode(),
            ca_certificate=self.authority.ca.read_text(),
        )

    def write_file(self, path: Path) -> Path:
        path.write_text(yaml.safe_dump(self.file().model_dump(mode="json", by_alias=True)), encoding="utf-8")
        return path

    @contextmanager
    def superlink(self) -> Iterator[None]:
        certificate, key = self.authority.server()
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.authority.ca}"\n'
        )
        command: list[str | Path] = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ssl-ca-certfile", self.authority.ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
        command += ["--enable-supernode-auth", "--database", self.folder / "superlink.sqlite"]
        command += ["--disable-runtime-dependency-installation"]
        environment = {"FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        with process(*command, log=self.log, cwd=self.folder, environment=environment):
            wait_for(lambda: bool(self._flower.ask("list", "test").get("success")))
            yield

    def register(self, public_key: Path, name: str) -> None:
        answer = self._flower.ask("supernode", "register", str(public_key), "test", "--name", name)
        assert answer["success"], answer

    def statuses(self) -> list[str]:
        """Of the registered nodes, in order of registration."""
        answer = self._flower.ask("supernode", "list", "test")
        nodes = sorted(answer["nodes"], key=lambda each: str(each["created-at"]))
        return [str(each["status"]) for each in nodes]

    def run(self, app: Path, kinds: str, seconds: float = 150) -> list[Any]:
        """Submit, wait for the end, and return what the ServerApp was told: [kind, code, content or reason] each."""
        out = self.folder / f"told-{time.monotonic_ns()}.json"
        answer = self._flower.ask("run", str(app), "test", "--run-config", f"out='{out}' kinds='{kinds}'")
        assert answer["success"], answer
        run_id = str(answer["run-id"])
        wait_for(lambda: self._status(run_id).startswith("finished"), seconds)
        assert self._status(run_id) == "finished:completed", self.log.read_text()
        return list(json.loads(out.read_text()))

    def _status(self, run_id: str) -> str:
        return str(self._flower.ask("list", "test", "--run-id", run_id)["runs"][0]["status"])


def tiny_app(folder: Path, mark: Path, extra: str = "") -> Path:
    """The app's folder; `extra` is one more line of its client code."""
    for name, code in (("client", CLIENT_APP.format(mark=str(mark)) + extra), ("server", SERVER_APP)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "app.py").write_text(code)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


def bundle_sha256(app: Path) -> str:
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
