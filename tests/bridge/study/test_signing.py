"""Ed25519 against the test vectors of RFC 8032, and against OpenSSL."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bridge.study.signing import is_signed, new_key, public_of, sign

# RFC 8032, 7.1, tests 1 to 3: secret, public, message, signature.
VECTORS = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
)


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_keys_and_signatures_are_those_of_the_standard(secret: str, public: str, message: str, signature: str) -> None:
    key, content = bytes.fromhex(secret), bytes.fromhex(message)
    assert public_of(key).hex() == public
    assert sign(key, content).hex() == signature
    assert is_signed(bytes.fromhex(public), bytes.fromhex(signature), content)
    assert not is_signed(bytes.fromhex(public), bytes.fromhex(signature), content + b"\0")


def test_no_other_key_or_changed_signature_passes() -> None:
    secret, other = new_key(), new_key()
    assert secret != other
    assert len(secret) == 32
    signature = sign(secret, b"content")
    assert is_signed(public_of(secret), signature, b"content")
    assert not is_signed(public_of(other), signature, b"content")
    for i in range(64):
        changed = bytes(byte ^ (1 if k == i else 0) for k, byte in enumerate(signature))
        assert not is_signed(public_of(secret), changed, b"content")


@pytest.mark.parametrize("public", [b"", b"\xff" * 32, b"\0" * 31, b"\0" * 33])
def test_bytes_that_are_no_key_sign_nothing(public: bytes) -> None:
    assert not is_signed(public, b"\0" * 64, b"content")


@pytest.mark.parametrize("signature", [b"", b"\0" * 63, b"\0" * 65])
def test_bytes_that_are_no_signature_are_none(signature: bytes) -> None:
    assert not is_signed(public_of(new_key()), signature, b"content")


def test_a_secret_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        sign(b"short", b"content")


def test_openssl_takes_the_signature(tmp_path: Path) -> None:
    secret = new_key()
    # RFC 8410: the fixed prefix of an Ed25519 SubjectPublicKeyInfo, then the key.
    (tmp_path / "key.der").write_bytes(bytes.fromhex("302a300506032b6570032100") + public_of(secret))
    (tmp_path / "content").write_bytes(b"what is signed")
    (tmp_path / "signature").write_bytes(sign(secret, b"what is signed"))
    command = "openssl pkeyutl -verify -pubin -keyform DER -inkey key.der -rawin -in content -sigfile signature"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "content").write_bytes(b"what is signet")
    assert subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=False).returncode != 0
