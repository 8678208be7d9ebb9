"""The coordinator's certificate authority and what it signs: X.509 with ECDSA P-384 keys.

Sites trust this one authority and no other, for the one name that they connect to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bridge.errors import EnrolmentError
from bridge.files import cause

AUTHORITY_DAYS = 3653
SERVER_DAYS = 397
"""Browsers take no server certificate that is valid for longer."""
_EARLIER = timedelta(days=1)
"""A certificate begins a day ago: a site's clock may be behind."""


def new_key() -> bytes:
    """A new secret key, as PEM."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_authority(key: bytes, name: str) -> bytes:
    """A self-signed authority's certificate, as PEM, for ten years; it may sign servers and no further authority."""
    secret = _load_key(key)
    subject = _name(f"fedbridge {name}"[:64])
    builder = _builder(subject, subject, secret.public_key(), datetime.now(UTC), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return _signed(builder, secret)


def new_certificate(
    key: bytes,
    hosts: Sequence[str],
    authority_key: bytes,
    authority: bytes,
    *,
    days: int = SERVER_DAYS,
    begins: datetime | None = None,
) -> bytes:
    """A server's certificate, as PEM, for these names and addresses; never valid for longer than its authority."""
    issuer, signer = load_certificate(authority), _load_key(authority_key)
    if issuer.public_key() != signer.public_key():
        raise EnrolmentError(
            "the authority's key does not belong to its certificate",
            fix="bring back both from one backup, or make new ones with `init --new-keys`",
        )
    begins = begins or datetime.now(UTC)
    days = min(days, (issuer.not_valid_after_utc - begins).days)
    public = _load_key(key).public_key()
    builder = _builder(_name(hosts[0][:64]), issuer.subject, public, begins, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(each) for each in hosts]), critical=False)
    own = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return _signed(builder.add_extension(own, critical=False), signer)


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from its file. Raises `EnrolmentError` where it can't be read or is none."""
    try:
        return load_certificate(path.read_bytes())
    except OSError as error:
        raise EnrolmentError(
            f"{path}: can't be read", why=cause(error), fix="bring it back from the backup, or issue a new one"
        ) from error


def load_certificate(pem: bytes) -> x509.Certificate:
    """A certificate from PEM. Raises `EnrolmentError` where it is none."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise EnrolmentError(
            "a certificate is damaged", why=str(error), fix="bring it back from the backup, or issue a new one"
        ) from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for, as text."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def names(hosts: Sequence[str]) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(hosts))


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise EnrolmentError("a secret key is damaged", why=str(error), fix="bring it back from the backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnrolmentError("a secret key is of another kind", why="an ECDSA key is expected")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, begins: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - _EARLIER)
        .not_valid_after(begins + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
