"""Signatures of studies: Ed25519 (RFC 8032) of the package `cryptography`, keys and signatures as raw bytes."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES, SIGNATURE_BYTES = 32, 64


def new_key() -> bytes:
    """A new secret key, 32 bytes from the system's generator."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_of(secret: bytes) -> bytes:
    """The 32 public bytes that belong to a secret key. Raises `ValueError` unless the secret has 32 bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, content: bytes) -> bytes:
    """The 64-byte signature of `content`; the same key and content always give the same one.

    Raises `ValueError` unless the secret has 32 bytes.
    """
    return Ed25519PrivateKey.from_private_bytes(secret).sign(content)


def is_signed(public: bytes, signature: bytes, content: bytes) -> bool:
    """Whether `signature` is that of `content` by the key of these public bytes; False for bytes that are no key or no
    signature."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True
