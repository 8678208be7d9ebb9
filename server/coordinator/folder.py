"""The coordinator's folder: where each thing lies, and the settings in `server.yaml` that the rest is written from.

server.yaml            name, host and ports
coordinator.yaml       for the sites: where to connect, whom to trust
keys/                  secret keys and certificates; its owner alone may read them
nginx/                 configuration and logs of the door that sites come through
systemd/               units, to be copied
flower/                FLWR_HOME of the `flwr` command, with the connection `fedbridge`
superlink.sqlite       what Flower's SuperLink knows
enrolled.json          which sites are let in
studies/, runs/        what runs, and what came of it
state/                 process ids and what the services print
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from bridge.config import Settings, load_model
from bridge.enrolment import COORDINATOR_FILE, CoordinatorFile
from bridge.errors import ConfigError, EnrolmentError
from bridge.files import cause

SERVER_FILE = "server.yaml"
CONNECTION = "fedbridge"
"""Name of the SuperLink's connection in `flower/config.toml`."""
_HOST_NAME = re.compile(r"^(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\Z")
_PLAIN_PATH = re.compile(r"^/[\w/.@+,=-]*\Z")
_SECRET_BITS = 0o077


class ServerFile(Settings):
    """`server.yaml`: the coordinator's settings. What is written from them follows with `init --force`."""

    schema_: Literal["fedbridge.server/1"] = Field(default="fedbridge.server/1", alias="schema")
    name: str = Field(min_length=1, max_length=64)
    """As in every job's `coordinator`."""
    host: str
    """What sites connect to: a name in the DNS, or an address."""
    port: int = Field(default=8443, ge=1, le=65535)
    """The one port that is open to the sites."""
    listen: tuple[str, ...] = Field(default=("0.0.0.0",), min_length=1)
    """Addresses of this machine on which that port is opened."""
    superlink_port: int = Field(default=8000, ge=1, le=65535)
    """Port of Flower's SuperLink on 127.0.0.1. Never open it to anybody."""
    body_megabytes: int = Field(default=16, ge=6, le=1024)
    """Largest request that is let through. Flower sends arrays in pieces of 5 MiB."""

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, value: str) -> str:
        if not _HOST_NAME.match(value) and _address(value) is None:
            raise ValueError("must be a host name or an IP address, without a scheme and without a port")
        return value

    @field_validator("listen")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if _address(each) is None:
                raise ValueError(f"{each!r} is no IP address")
        return value

    @model_validator(mode="after")
    def _has_two_ports(self) -> ServerFile:
        if self.port == self.superlink_port:
            raise ValueError("port and superlink_port must differ")
        return self

    @property
    def address(self) -> str:
        """host:port, as sites are told it."""
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def local_address(self) -> str:
        """An address of this machine on which the sites' port answers, without the port."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.listen[0], self.listen[0])


@dataclass(frozen=True)
class CoordinatorFolder:
    """The folder and its settings."""

    path: Path
    settings: ServerFile

    @classmethod
    def open(cls, path: Path) -> CoordinatorFolder:
        """The folder that `init` made. Raises `ConfigError` where it is none, or its settings can't be used."""
        if not (path / SERVER_FILE).exists():
            raise ConfigError(
                f"{path}: is not a coordinator's folder",
                why=f"there is no {SERVER_FILE}",
                fix="name the folder, or make it with `fedbridge-server init`",
            )
        return cls(plain_path(path), load_model(path / SERVER_FILE, ServerFile))

    @property
    def coordinator_path(self) -> Path:
        """What is handed to the sites."""
        return self.path / COORDINATOR_FILE

    @property
    def keys(self) -> Path:
        """Secret keys and certificates."""
        return self.path / "keys"

    @property
    def signing_key(self) -> Path:
        """Signs studies: 32 bytes as base64."""
        return self.keys / "signing.key"

    @property
    def ca_key(self) -> Path:
        """Signs certificates. Needed by `init` and `renew` alone, so it may be kept elsewhere in between."""
        return self.keys / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """What sites trust."""
        return self.keys / "ca.pem"

    @property
    def server_key(self) -> Path:
        """The door's secret key."""
        return self.keys / "server.key"

    @property
    def server_certificate(self) -> Path:
        """What sites see: valid for a year, renewed with `renew`."""
        return self.keys / "server.pem"

    @property
    def executor_secret(self) -> Path:
        """What the coordinator's executor proves to the SuperLink that it holds."""
        return self.keys / "executor.secret"

    @property
    def inner_key(self) -> Path:
        """The SuperLink's secret key."""
        return self.keys / "superlink.key"

    @property
    def inner_certificate(self) -> Path:
        """What is seen on this machine alone, between door, SuperLink and `flwr`; valid as long as the authority, so
        that no run has to be interrupted to renew it."""
        return self.keys / "superlink.pem"

    @property
    def nginx(self) -> Path:
        """Configuration, logs and process id of nginx."""
        return self.path / "nginx"

    @property
    def nginx_configuration(self) -> Path:
        """Written by `init`."""
        return self.nginx / "nginx.conf"

    @property
    def systemd(self) -> Path:
        """Units."""
        return self.path / "systemd"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of SuperLink and `flwr`."""
        return self.path / "flower"

    @property
    def database(self) -> Path:
        """The SuperLink's."""
        return self.path / "superlink.sqlite"

    @property
    def enrolled(self) -> Path:
        """Who is let in."""
        return self.path / "enrolled.json"

    @property
    def studies(self) -> Path:
        """Models of the studies that ran."""
        return self.path / "studies"

    @property
    def runs(self) -> Path:
        """Run folders."""
        return self.path / "runs"

    @property
    def state(self) -> Path:
        """Process ids and logs of the services."""
        return self.path / "state"

    @property
    def superlink_address(self) -> str:
        """host:port of the SuperLink, on this machine alone."""
        return f"127.0.0.1:{self.settings.superlink_port}"

    def coordinator(self) -> CoordinatorFile:
        """What the sites were given. Raises `ConfigError` where it can't be read."""
        return load_model(self.coordinator_path, CoordinatorFile)

    def signing_secret(self) -> bytes:
        """The 32 secret bytes that sign studies.

        Raises `EnrolmentError` where others may read the key, it is damaged, or it is not the one whose public half
        the sites were given.
        """
        from bridge.study.signing import public_of

        secret = read_secret(self.signing_key)
        if public_of(secret) != self.coordinator().verify_key:
            raise EnrolmentError(
                f"{self.signing_key}: is not the key that the sites know",
                why=f"{COORDINATOR_FILE} names another public key",
                fix="bring back the key that belongs to it, or give all sites the new file",
            )
        return secret


def read_secret(path: Path) -> bytes:
    """32 secret bytes from a file of base64 text. Raises `EnrolmentError` where it is damaged or others may read it."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = cause(error) if isinstance(error, OSError) else "it is no base64 text"
        raise EnrolmentError(f"{path}: can't be read", why=why, fix="bring it back from the backup") from error
    if mode & _SECRET_BITS:
        raise EnrolmentError(
            f"{path}: others may read this secret key", why=f"its mode is {mode & 0o777:o}", fix=f"chmod 600 {path}"
        )
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise EnrolmentError(
            f"{path}: is damaged", why="it does not hold 32 bytes as base64", fix="bring it back from the backup"
        )
    return secret


def plain_path(path: Path) -> Path:
    """The absolute path. Raises `ConfigError` for characters that nginx or systemd would read as something else."""
    absolute = path.resolve()
    if not _PLAIN_PATH.match(str(absolute)):
        raise ConfigError(
            f"{absolute}: the folder's path can't be used",
            why="it goes into nginx's and systemd's configuration: letters, digits and / . _ - @ + , = only",
            fix="choose another folder",
        )
    return absolute


def bracketed(host: str) -> str:
    """An IPv6 address in brackets, anything else as it is."""
    return f"[{host}]" if ":" in host else host


def _address(value: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(value)
    except ValueError:
        return None
