"""What a coordinator and a hospital exchange before the first run: two small files, each checked by telephone.

The coordinator hands out `coordinator.yaml` (where it listens, its certificate authority, the key it signs studies
with). A site answers with an enrolment request (its agreed name and its node's public key, signed by that key). Nothing
secret is in either; what makes them trustworthy is that both sides read the fingerprint to each other.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Literal

from pydantic import Field, field_validator

from bridge.config import Settings
from bridge.hashing import canonical_json
from bridge.messages import SITE_NAME

COORDINATOR_FILE = "coordinator.yaml"
ADDRESS = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})\Z")


class CoordinatorFile(Settings):
    """`coordinator.yaml`: everything a site needs to know of its coordinator. Public."""

    schema_: Literal["fedbridge.coordinator/1"] = Field(default="fedbridge.coordinator/1", alias="schema")
    name: str = Field(min_length=1, max_length=64)
    """As in every job's `coordinator`."""
    address: str
    """host:port that sites connect to, without a scheme."""
    signing_key: str
    """The Ed25519 public key that signs studies: 32 bytes as base64."""
    ca_certificate: str
    """PEM of the authority that signed the server's certificate."""

    @field_validator("address")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        found = ADDRESS.match(value)
        if not found or not 1 <= int(found.group(2)) <= 65535:
            raise ValueError("must be host:port, without https://")
        return value

    @field_validator("signing_key")
    @classmethod
    def _is_a_key(cls, value: str) -> str:
        if len(base64.b64decode(value, validate=True)) != 32:
            raise ValueError("must be 32 bytes as base64")
        return value

    @property
    def verify_key(self) -> bytes:
        """The signing key's 32 public bytes."""
        return base64.b64decode(self.signing_key)

    @property
    def fingerprint(self) -> str:
        """To be read over the telephone: of signing key, certificate authority, name and address together."""
        return fingerprint(canonical_json(self.model_dump(mode="json", by_alias=True)))


class EnrolmentRequest(Settings):
    """What a site asks its coordinator to register. Public."""

    schema_: Literal["fedbridge.request/1"] = Field(default="fedbridge.request/1", alias="schema")
    site: str
    """The site's agreed name."""
    public_key: str
    """The node's ECDSA P-384 key as one OpenSSH line, without a comment."""
    signature: str
    """By that key over `signed_bytes`, ECDSA with SHA-384, DER as base64: the name and the key belong together."""

    @field_validator("site")
    @classmethod
    def _is_a_plain_word(cls, value: str) -> str:
        if not SITE_NAME.match(value):
            raise ValueError("must be letters, digits, '.', '_', '-', at most 63, no space")
        return value

    @property
    def fingerprint(self) -> str:
        """To be read over the telephone."""
        return fingerprint(signed_bytes(self.site, self.public_key))


def signed_bytes(site: str, public_key: str) -> bytes:
    """What a request's signature is over."""
    return canonical_json(["fedbridge.request/1", site, public_key])


def fingerprint(content: bytes) -> str:
    """The first 160 bits of the sha256, as ten groups of four hex digits."""
    digits = hashlib.sha256(content).hexdigest()[:40]
    return " ".join(digits[i : i + 4] for i in range(0, 40, 4))
