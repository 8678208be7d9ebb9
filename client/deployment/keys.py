"""A site's two secrets: its node's key, by which the coordinator knows it, and what SuperNode and executor share.

Both lie in the site's `keys` folder (mode 700), each readable by its owner alone (mode 600); the key is ECDSA on P-384
in OpenSSH's format, as Flower asks for. A secret that others may read is refused, not repaired: it may be known.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import EnrolmentError
from bridge.files import cause, sync_to_disk, write_whole
from client.site import Site

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

NODE_KEY, NODE_PUBLIC, EXECUTOR_SECRET = "node.key", "node.pub", "executor.secret"
SECRET_BYTES = 32


def new_node_key(folder: Path) -> None:
    """Write a new `node.key`. Raises `OSError`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _write_secret(folder / NODE_KEY, content)


def new_executor_secret(folder: Path) -> None:
    """Write a new `executor.secret`: 32 bytes of the operating system's generator, as hex. Raises `OSError`."""
    _write_secret(folder / EXECUTOR_SECRET, secrets.token_hex(SECRET_BYTES).encode())


def write_public(folder: Path, key: EllipticCurvePrivateKey) -> None:
    """Write `node.pub`, which follows from `node.key`. Raises `OSError`."""
    write_whole(folder / NODE_PUBLIC, public_line(key) + "\n")


def public_line(key: EllipticCurvePrivateKey) -> str:
    """The key's public half as one OpenSSH line, without a comment."""
    from cryptography.hazmat.primitives import serialization

    public = key.public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def node_key(site: Site) -> EllipticCurvePrivateKey:
    """The site's node key. Raises `EnrolmentError` where it is absent, readable by others, or no such key."""
    return read_node_key(site.keys_folder)


def read_node_key(folder: Path) -> EllipticCurvePrivateKey:
    """As `node_key`, of a folder."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    path = folder / NODE_KEY
    content = _read_secret(path)
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "it can't be read as an OpenSSH key without a passphrase") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _no_key(path, "it is a key of another kind")
    return key


def executor_secret(site: Site) -> Path:
    """The file of the executor's secret. Raises `EnrolmentError` where it is absent, readable by others, or short."""
    path = site.keys_folder / EXECUTOR_SECRET
    if len(_read_secret(path).strip()) < 2 * SECRET_BYTES:
        raise EnrolmentError(
            f"{path}: is not an executor's secret",
            why="it is shorter than was written",
            fix="remove it and let `fedbridge-site init` write a new one",
        )
    return path


def _write_secret(path: Path, content: bytes) -> None:
    """As `write_whole`, but never readable by others, also not while it is written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def _read_secret(path: Path) -> bytes:
    try:
        mode, folder = path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise EnrolmentError(
            f"{path}: can't be read",
            why=cause(error),
            fix="run `fedbridge-site init` for this folder, and everything else as the user who owns it",
        ) from error
    if mode & 0o077:
        raise EnrolmentError(
            f"{path}: others may read or change it (mode {mode:o})",
            why="whoever has it can speak for this site; it may be known by now",
            fix="make new keys with `fedbridge-site init --new-keys` and send a new request; "
            f"or `chmod 600 {path.name}` where nobody else was on this machine",
        )
    if folder & 0o022:
        raise EnrolmentError(
            f"{path.parent}: others may replace the keys in it (mode {folder:o})",
            why="whoever can write the folder can put other keys there",
            fix=f"chmod 700 {path.parent}, and look whether the keys are still yours",
        )
    return content


def _no_key(path: Path, why: str) -> EnrolmentError:
    return EnrolmentError(
        f"{path}: is not a node's key", why=why, fix="make a new one: `fedbridge-site init --new-keys`"
    )
