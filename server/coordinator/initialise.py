"""`fedbridge-server init`: everything that a coordinator's folder needs, each file unless it is there already."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import yaml

from bridge.config import load_model, parse_model
from bridge.enrolment import CoordinatorFile
from bridge.errors import ConfigError, EnrolmentError
from bridge.files import cause, write_whole
from bridge.study.signing import new_key as new_signing_key
from bridge.study.signing import public_of
from server.coordinator import certificates, nginx, units
from server.coordinator.folder import CONNECTION, SERVER_FILE, CoordinatorFolder, ServerFile, plain_path, read_secret
from server.coordinator.templates import fill

PAGE = "OPEN-THIS-PORT.md"
_INNER_HOSTS = ("localhost", "127.0.0.1")


@dataclass
class Initialised:
    """What `initialise` did; paths are relative to the folder."""

    folder: CoordinatorFolder
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    """Kept, though what would be written now differs."""

    def put(self, path: Path, content: Callable[[], bytes], *, anew: bool, secret: bool = False) -> bool:
        """Write a file where there is none, or where `anew`; whether it was written."""
        name = str(path.relative_to(self.folder.path))
        if path.exists() and not anew:
            self.kept.append(name)
            return False
        if secret:
            write_secret(path, content())
        else:
            write_whole(path, content(), sync=True)
        self.written.append(name)
        return True


def initialise(path: Path, settings: ServerFile, *, force: bool = False, new_keys: bool = False) -> Initialised:
    """Make a coordinator's folder, or what is missing of it. An interrupted call is completed by the next one.

    `force` writes everything but the keys anew, `new_keys` the keys too: then no site trusts this coordinator until it
    got the new `coordinator.yaml`. Raises `ConfigError` where the folder has other settings and `force` is not given,
    or can't be written; `EnrolmentError` where keys that are there can't be used.
    """
    folder = CoordinatorFolder(plain_path(path), settings)
    _refuse_other_settings(folder, force)
    done = Initialised(folder)
    try:
        _make_folders(folder)
        _write_keys(done, new_keys)
        _write_coordinator_file(done, force or new_keys)
        _write_texts(done, force)
        # Last: a folder with this file is complete.
        done.put(folder.path / SERVER_FILE, lambda: _settings_text(settings), anew=_settings(path) != settings)
    except OSError as error:
        raise ConfigError(
            f"{folder.path}: the coordinator's folder can't be written",
            why=f"{cause(error)}: {error.filename}" if error.filename else cause(error),
            fix="correct the permissions or free space, then call init again",
        ) from error
    return done


def renew(folder: CoordinatorFolder) -> datetime:
    """A new server certificate of the same authority, for the key that is there; until when it is valid.

    Nothing changes for the sites. A running nginx takes it without a break (`nginx.reload`).
    """
    try:
        certificate = _server_certificate(folder)
        write_whole(folder.server_certificate, certificate, sync=True)
    except OSError as error:
        raise EnrolmentError(
            "the certificate can't be renewed",
            why=f"{cause(error)}: {error.filename}",
            fix=f"renewing needs {folder.ca_key} and {folder.ca_certificate}: bring them back for this command",
        ) from error
    return certificates.load_certificate(certificate).not_valid_after_utc


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may read, whole or not at all. Raises `OSError`."""
    before = os.umask(0o077)
    try:
        write_whole(path, content, sync=True)
    finally:
        os.umask(before)


def wanted_settings(path: Path, **options: str | int | None) -> ServerFile:
    """The settings that `server.yaml` in that folder has, changed by the options that are not None.

    Raises `ConfigError` where they can't be used, or a folder that has none yet is not given name and host.
    """
    there = _settings(path)
    given = {key: value for key, value in options.items() if value is not None}
    if there is None and not {"name", "host"} <= set(given):
        raise ConfigError(
            f"{path}: name and host are needed", why=f"there is no {SERVER_FILE} yet", fix="give --name and --host"
        )
    values = {} if there is None else there.model_dump(mode="json", by_alias=True)
    return parse_model(values | given, ServerFile, "the coordinator's settings")


def _settings(path: Path) -> ServerFile | None:
    file = path / SERVER_FILE
    return load_model(file, ServerFile) if file.exists() else None


def _settings_text(settings: ServerFile) -> bytes:
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in settings.model_dump(mode="json").items()}
    return fill("server.yaml.j2", **values).encode()


def _refuse_other_settings(folder: CoordinatorFolder, force: bool) -> None:
    path = folder.path / SERVER_FILE
    found = _settings(folder.path)
    if force or found is None:
        return
    there, asked = found.model_dump(), folder.settings.model_dump()
    if differ := [key for key in asked if asked[key] != there[key]]:
        raise ConfigError(
            f"{path}: has other settings: " + ", ".join(f"{key} {there[key]!r}" for key in differ),
            why="nothing is overwritten without --force",
            fix="give the same values, or --force to write everything but the keys anew",
        )


def _make_folders(folder: CoordinatorFolder) -> None:
    if not folder.path.exists():
        folder.path.mkdir(parents=True)
        folder.path.chmod(0o700)
    folder.keys.mkdir(exist_ok=True)
    folder.keys.chmod(0o700)
    for each in (folder.nginx, folder.nginx / "temporary", folder.systemd, folder.flower_home):
        each.mkdir(exist_ok=True)
    for each in (folder.studies, folder.runs, folder.state):
        each.mkdir(exist_ok=True)


def _write_keys(done: Initialised, anew: bool) -> None:
    folder = done.folder
    done.put(folder.signing_key, lambda: base64.b64encode(new_signing_key()) + b"\n", anew=anew, secret=True)
    done.put(folder.executor_secret, lambda: secrets.token_hex(32).encode(), anew=anew, secret=True)
    authority = folder.ca_certificate
    if anew or not authority.exists():
        # Otherwise the authority's key may well be kept elsewhere.
        done.put(folder.ca_key, certificates.new_key, anew=anew, secret=True)
    fresh = done.put(
        authority, lambda: certificates.new_authority(folder.ca_key.read_bytes(), folder.settings.name), anew=anew
    )
    for key in (folder.server_key, folder.inner_key):
        done.put(key, certificates.new_key, anew=anew, secret=True)
    other = _is_for_another_host(folder)
    done.put(folder.server_certificate, lambda: _server_certificate(folder), anew=fresh or other)
    done.put(folder.inner_certificate, lambda: _inner_certificate(folder), anew=fresh)


def _is_for_another_host(folder: CoordinatorFolder) -> bool:
    if not folder.server_certificate.exists():
        return False
    there = certificates.read_certificate(folder.server_certificate)
    return folder.settings.host not in certificates.hosts_of(there)


def _server_certificate(folder: CoordinatorFolder) -> bytes:
    return certificates.new_certificate(
        folder.server_key.read_bytes(),
        certificates.names((folder.settings.host, *_INNER_HOSTS)),
        folder.ca_key.read_bytes(),
        folder.ca_certificate.read_bytes(),
    )


def _inner_certificate(folder: CoordinatorFolder) -> bytes:
    return certificates.new_certificate(
        folder.inner_key.read_bytes(),
        _INNER_HOSTS,
        folder.ca_key.read_bytes(),
        folder.ca_certificate.read_bytes(),
        days=certificates.AUTHORITY_DAYS,
    )


def _write_coordinator_file(done: Initialised, anew: bool) -> None:
    folder = done.folder
    file = CoordinatorFile(
        name=folder.settings.name,
        address=folder.settings.address,
        signing_key=base64.b64encode(public_of(read_secret(folder.signing_key))).decode(),
        ca_certificate=folder.ca_certificate.read_text(encoding="ascii"),
    )
    text = yaml.safe_dump(file.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
    done.put(folder.coordinator_path, text.encode, anew=anew)


def _write_texts(done: Initialised, force: bool) -> None:
    folder = done.folder
    texts = {
        folder.nginx_configuration: nginx.configuration(folder),
        folder.flower_home / "config.toml": _flower_configuration(folder),
        folder.path / PAGE: _page(folder),
        **{folder.systemd / name: text for name, text in units.unit_texts(folder).items()},
    }
    for path, text in texts.items():
        if not done.put(path, text.encode, anew=force) and path.read_bytes() != text.encode():
            done.edited.append(str(path.relative_to(folder.path)))


def _flower_configuration(folder: CoordinatorFolder) -> str:
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{folder.superlink_address}"\nroot-certificates = "{folder.ca_certificate}"\n'
    )


def _page(folder: CoordinatorFolder) -> str:
    settings = folder.settings
    return fill(
        "open-this-port.md.j2",
        name=settings.name,
        address=settings.address,
        port=settings.port,
        superlink_port=settings.superlink_port,
        body_megabytes=settings.body_megabytes,
        calls=nginx.FLEET_CALLS,
        folder=folder.path,
        user=units.USER,
        units=(units.SUPERLINK_UNIT, units.EXECUTOR_UNIT, units.NGINX_UNIT),
    )
