"""Who is let in: `enrolled.json`, and the SuperLink's registrations, which follow it.

The file is the truth. A site is written there first; the SuperLink is told at once where it runs, and before the door
opens when it starts. What a kill leaves between the two is mended then.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from bridge.config import Settings, load_model
from bridge.enrolment import EnrolmentRequest, fingerprint, signed_bytes
from bridge.errors import ConfigError, EnrolmentError, ServiceError
from bridge.files import cause, write_whole
from server.coordinator.folder import CoordinatorFolder
from server.coordinator.superlink import Control, control

_LOCK_SECONDS = 30.0
_MAX_REQUEST_BYTES = 10_000


class Entry(Settings):
    """A site that was enrolled once."""

    site: str
    """Its agreed name."""
    public_key: str
    """Its node's key, one OpenSSH line without a comment."""
    state: Literal["enrolled", "revoked"]
    """Whether it is let in now."""
    enrolled: str
    """UTC, ISO 8601."""
    revoked: str = ""
    """UTC, ISO 8601; empty where it was not."""

    @property
    def fingerprint(self) -> str:
        """As it was read over the telephone."""
        return fingerprint(signed_bytes(self.site, self.public_key))

    @property
    def pem(self) -> str:
        """The key as Flower keeps it."""
        return (
            _load_key(self.public_key)
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )


class Registry(Settings):
    """`enrolled.json`, in order of enrolment."""

    schema_: Literal["fedbridge.enrolled/1"] = Field(default="fedbridge.enrolled/1", alias="schema")
    sites: tuple[Entry, ...] = ()

    def enrolled(self) -> list[Entry]:
        """Those that are let in now."""
        return [each for each in self.sites if each.state == "enrolled"]


@dataclass(frozen=True)
class Synced:
    """What was changed at the SuperLink: names of sites, or of nodes without one."""

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]
    refused: tuple[str, ...]
    """Enrolled, but the SuperLink shut that key out for good: the site needs a new one."""


def read_request(path: Path) -> EnrolmentRequest:
    """An enrolment request whose signature is its own key's. Raises `EnrolmentError` where it can't be used."""
    again = "ask the site for a new one: `fedbridge-site request`"
    try:
        if path.stat().st_size > _MAX_REQUEST_BYTES:
            raise EnrolmentError(f"{path}: is no enrolment request", why="it is far too long", fix=again)
        request = load_model(path, EnrolmentRequest)
    except OSError as error:
        raise EnrolmentError(f"{path}: can't be read", why=cause(error), fix="name the request's file") from error
    except ConfigError as error:
        raise EnrolmentError(f"{path}: is no enrolment request", why=error.what, fix=again) from error
    key = _load_key(request.public_key)
    try:
        signature = base64.b64decode(request.signature, validate=True)
        key.verify(signature, signed_bytes(request.site, request.public_key), ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise EnrolmentError(
            f"{path}: the request is forged or damaged",
            why="its signature is not that of its key over this name and key",
            fix=again,
        ) from error
    return request


def read_registry(folder: CoordinatorFolder) -> Registry:
    """Who was enrolled. Raises `EnrolmentError` where the file is damaged."""
    try:
        return Registry.model_validate_json(folder.enrolled.read_bytes())
    except FileNotFoundError:
        return Registry()
    except OSError as error:
        raise EnrolmentError(f"{folder.enrolled}: can't be read", why=cause(error)) from error
    except ValidationError as error:
        raise EnrolmentError(
            f"{folder.enrolled}: is damaged",
            why=f"{error.error_count()} problem(s), the first at '{'.'.join(map(str, error.errors()[0]['loc']))}'",
            fix="bring it back from the backup: it alone says who is let in",
        ) from error


def enrol(folder: CoordinatorFolder, request: EnrolmentRequest) -> Entry:
    """Write a site down as let in. Raises `EnrolmentError` for a name or key that is there, or was revoked."""
    with _held(folder):
        registry = read_registry(folder)
        check_new(registry, request)
        entry = Entry(site=request.site, public_key=request.public_key, state="enrolled", enrolled=_now())
        _write(folder, (*registry.sites, entry))
    return entry


def check_new(registry: Registry, request: EnrolmentRequest) -> None:
    """Raises `EnrolmentError` where this request can't be added."""
    for each in registry.sites:
        if each.public_key == request.public_key and each.state == "revoked":
            raise EnrolmentError(
                f"the key of '{request.site}' was revoked",
                why=f"it was '{each.site}' until {each.revoked}; a revoked key is never let in again",
                fix="the site makes new keys and sends a new request",
            )
        if each.public_key == request.public_key:
            raise EnrolmentError(
                f"the key of '{request.site}' is enrolled already",
                why=f"as '{each.site}'",
                fix="nothing is left to do for that site; every other one needs a key of its own",
            )
        if each.state == "enrolled" and each.site.casefold() == request.site.casefold():
            raise EnrolmentError(
                f"a site '{each.site}' is enrolled already",
                why="with another key",
                fix=f"agree on another name; for new keys of that site, first `fedbridge-server revoke {each.site}`",
            )


def check_key_is_open(folder: CoordinatorFolder, request: EnrolmentRequest) -> None:
    """Raises `EnrolmentError` where the running SuperLink shut that key out before, which is for good."""
    key = Entry(site=request.site, public_key=request.public_key, state="enrolled", enrolled="").pem
    with control(folder) as superlink:
        if any(each.public_key == key and each.status == "unregistered" for each in superlink.nodes()):
            raise EnrolmentError(
                f"the key of '{request.site}' was revoked",
                why="the SuperLink shut it out, and lets no such key in again",
                fix="the site makes new keys and sends a new request",
            )


def revoke(folder: CoordinatorFolder, site: str) -> Entry:
    """Write a site down as shut out, for good with that key. Raises `EnrolmentError` where it is not enrolled."""
    with _held(folder):
        registry = read_registry(folder)
        entry = next((each for each in registry.enrolled() if each.site == site), None)
        if entry is None:
            names = ", ".join(each.site for each in registry.enrolled()) or "nobody"
            raise EnrolmentError(f"no site '{site}' is enrolled", why=f"enrolled: {names}", fix="check the name")
        changed = entry.model_copy(update={"state": "revoked", "revoked": _now()})
        _write(folder, [changed if each is entry else each for each in registry.sites])
    return changed


def sync(folder: CoordinatorFolder) -> Synced:
    """Make the running SuperLink let in whom the file names, and nobody else. Raises `ServiceError` where it can't."""
    with _held(folder), control(folder) as superlink:
        return _sync(read_registry(folder).enrolled(), superlink)


def _sync(enrolled: Sequence[Entry], superlink: Control) -> Synced:
    wanted = {each.pem: each.site for each in enrolled}
    known = {each.public_key: each for each in superlink.nodes()}
    registered, unregistered, refused = [], [], []
    for key, node in known.items():
        if node.status != "unregistered" and wanted.get(key) != node.name:
            superlink.unregister(node.id)
            unregistered.append(node.name or str(node.id))
    for key, site in wanted.items():
        node_there = known.get(key)
        if node_there is None:
            superlink.register(site, key)
            registered.append(site)
        elif node_there.status == "unregistered" or node_there.name != site:
            refused.append(site)
    return Synced(tuple(registered), tuple(unregistered), tuple(refused))


@contextmanager
def _held(folder: CoordinatorFolder) -> Iterator[None]:
    lock = FileLock(folder.path / ".enrolled.lock")
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise ServiceError(
            f"{folder.enrolled}: another command is at work on it", why="its lock is held", fix="try again"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _write(folder: CoordinatorFolder, sites: Sequence[Entry]) -> None:
    content = Registry(sites=tuple(sites)).model_dump(mode="json", by_alias=True)
    try:
        write_whole(folder.enrolled, json.dumps(content, indent=1) + "\n", sync=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: CoordinatorFolder, error: OSError) -> EnrolmentError:
    return EnrolmentError(
        f"{folder.enrolled}: can't be written", why=cause(error), fix="correct the permissions or free space"
    )


def _load_key(line: str) -> ec.EllipticCurvePublicKey:
    """A node's key from its OpenSSH line. Raises `EnrolmentError` for every other kind, curve or spelling."""
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _other_key("it can't be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _other_key("it is of another kind")
    if key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) != line.encode():
        # One key, one spelling: else it could be enrolled twice.
        raise _other_key("it is not spelt as one line without a comment")
    return key


def _other_key(why: str) -> EnrolmentError:
    return EnrolmentError(
        "the request's key can't be used",
        why=f"{why}; an ECDSA P-384 key is expected",
        fix="let `fedbridge-site init` make the key, and `fedbridge-site request` the request",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
