"""A private public-key infrastructure: one authority, one server certificate, one certificate per agent.

    DIR/ca.pem ca.key            the authority: whoever holds ca.key can be any agent and any server
    DIR/server.pem server.key    for TLS servers, naming this host
    DIR/NAME.pem NAME.key        for TLS clients, naming one agent: its `client-id`

Invariants: a key is readable by its owner only from the moment it exists; nothing is ever overwritten.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kon_agent.errors import ConfigError

CA_DAYS = 3653  # ten years: outlives the devices that trust it
LEAF_DAYS = 825  # the longest that all platforms accept of a private authority's certificate
BACKDATE = datetime.timedelta(hours=1)  # for agents whose clock is a little behind
MAX_NAME_CHARS = 64  # of a common name: ub-common-name, RFC 5280 appendix A
RESERVED = ("ca", "server")

_KEY_MODE, _CERT_MODE = 0o600, 0o644


def init(folder: Path, names: Sequence[str]) -> list[Path]:
    """Make an authority and a server certificate in `folder` and return the files made.

    Args:
        names: host names and addresses the server certificate carries besides localhost and the host's own.

    Raises:
        ConfigError: a file is there already or cannot be written, or a name is neither.
    """
    hosts = list(dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *names]))
    alternatives = [_general_name(host) for host in hosts]
    files = [folder / name for name in ("ca.pem", "ca.key", "server.pem", "server.key")]
    _refuse_existing(files)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"Kon-Agent CA of {socket.gethostname()}"[:MAX_NAME_CHARS])
    ca = _authority(subject, ca_key)
    server = _leaf(
        _subject(socket.gethostname()[:MAX_NAME_CHARS]),
        alternatives,
        ExtendedKeyUsageOID.SERVER_AUTH,
        server_key.public_key(),
        ca,
        ca_key,
    )
    for path, data in zip(files, (_pem(ca), _key_pem(ca_key), _pem(server), _key_pem(server_key)), strict=True):
        _write(path, data)
    return files


def agent(folder: Path, name: str) -> list[Path]:
    """Make the certificate of the agent `name`, signed by the authority in `folder`; return the files made.

    Raises:
        ConfigError: there is no authority, a file is there already, or the name cannot be one.
    """
    is_plain = name.isascii() and name.isprintable() and "/" not in name and " " not in name
    if not is_plain or not 0 < len(name) <= MAX_NAME_CHARS or name[0] in ".-" or name in RESERVED:
        what = f"agent name {name[:80]!r} must be 1 to {MAX_NAME_CHARS} ASCII characters, no space, no slash"
        raise ConfigError(f"{what}, must not begin with . or -, and not be {' or '.join(RESERVED)}")
    files = [folder / f"{name}.pem", folder / f"{name}.key"]
    _refuse_existing(files)
    ca, ca_key = _load_authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _leaf(
        _subject(name), [x509.DNSName(name)], ExtendedKeyUsageOID.CLIENT_AUTH, key.public_key(), ca, ca_key
    )
    for path, data in zip(files, (_pem(certificate), _key_pem(key)), strict=True):
        _write(path, data)
    return files


def _authority(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    subject: x509.Name,
    alternatives: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    public_key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, public_key, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days) - BACKDATE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not host.isprintable() or any(char in host for char in " /:"):
        raise ConfigError(f"--name {host!r} is neither a host name nor an address")
    return x509.DNSName(host)


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except OSError as err:
        raise ConfigError(
            f"{err.filename}: {err.strerror}; make an authority with `kon-receiver pki init {folder}`"
        ) from err
    except (ValueError, TypeError) as err:
        raise ConfigError(f"{folder}: ca.pem or ca.key is not what `kon-receiver pki init` writes: {err}") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / 'ca.key'} is no elliptic-curve key, as `kon-receiver pki init` writes")
    return ca, key


def _refuse_existing(files: Sequence[Path]) -> None:
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} is there already and is not overwritten; remove it or give another directory")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    mode = _KEY_MODE if path.suffix == ".key" else _CERT_MODE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError as err:
        raise ConfigError(f"cannot write {path}: {err.strerror}") from err
