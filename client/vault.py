"""A site's secret key: it turns patients into keyed hashes and seals what must not lie readable on the disk.

The key file holds 32 bytes of the operating system's generator as hex, readable by its owner alone (mode 0600). Whoever
has it and a list of patient ids can tell which of them took part in what; without it the hashes say nothing. Losing it
makes the ledger unusable on purpose: a new key would give every patient a new name, and with it a fresh budget.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from bridge.files import sync_to_disk
from client.errors import LedgerError

KEY_BYTES = 32
NONCE_BYTES = 12
_ONLY_OWNER = 0o600


class Vault:
    """What the key of a site does; each use has a key of its own, derived from it (HMAC-SHA256 of the use's name)."""

    def __init__(self, key: bytes) -> None:
        self._patients = _derived(key, "patients")
        self._sealing = _derived(key, "sealing")
        self.check = _derived(key, "check").hex()
        """Tells one key from another and reveals neither: the ledger's first row holds it."""

    def patient(self, patient: str) -> str:
        """The keyed hash of a patient id: HMAC-SHA256, 64 hex digits."""
        return hmac.new(self._patients, patient.encode(), hashlib.sha256).hexdigest()

    def seal(self, content: bytes, place: str) -> bytes:
        """Encrypt (ChaCha20-Poly1305, RFC 8439) and bind to a place: opened for another one, it is refused."""
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        nonce = os.urandom(NONCE_BYTES)
        return nonce + ChaCha20Poly1305(self._sealing).encrypt(nonce, content, place.encode())

    def unseal(self, sealed: bytes, place: str) -> bytes:
        """Decrypt what `seal` gave for the same place. Raises `LedgerError` where it was changed or moved."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        try:
            return ChaCha20Poly1305(self._sealing).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError) as error:
            raise LedgerError(
                f"the stored reply of {place} can't be decrypted",
                why="it was changed, moved to another message, or sealed with another key",
                fix="restore ledger and key file from one backup; until then the site answers nothing",
            ) from error


def read_key(path: Path) -> Vault:
    """The vault of a key file. Raises `LedgerError` where it is absent, damaged, or others may read it."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_bytes()
    except OSError as error:
        raise LedgerError(
            f"{path}: the site's key can't be read",
            why=error.strerror or "",
            fix="restore it from a backup: without it the ledger does not know its patients again",
        ) from error
    if mode & 0o077:
        raise LedgerError(
            f"{path}: others than its owner may read the site's key",
            why=f"its mode is {mode:o}",
            fix=f"chmod 600 {path}",
        )
    try:
        key = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise LedgerError(
            f"{path}: is not a site's key",
            why=f"{KEY_BYTES} bytes in hex are expected",
            fix="restore it from a backup",
        )
    return Vault(key)


def create_key(path: Path) -> None:
    """Write a new key file, whole and on the disk. The caller holds the ledger's lock; there is no key file yet.

    Raises `OSError`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _ONLY_OWNER)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _derived(key: bytes, use: str) -> bytes:
    return hmac.new(key, f"fedbridge {use}".encode(), hashlib.sha256).digest()
