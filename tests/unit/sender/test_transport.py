"""The transport's pure parts: settings, who is a server, and why a connection ended, in words that help."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.errors import ConfigError
from kon_agent.receiver import pki
from kon_agent.sender import transport
from kon_agent.sender.transport import Link, configure, resolve
from kon_agent.wire.frames import ALPN_LEGACY, ALPN_V2

NOBODY = Credentials(ca=b"", cert=None, key=None, token="", server_name=None, skip_verify=False)


def made(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Return the PEM of an authority, an agent's certificate and its key."""
    pki.init(folder, [])
    pki.agent(folder, "edge-1")
    ca, cert, key = ((folder / name).read_bytes() for name in ("ca.pem", "edge-1.pem", "edge-1.key"))
    return ca, cert, key


def test_both_protocols_are_offered_ours_first() -> None:
    """The original's is for servers that know no other."""
    assert [ALPN_V2, ALPN_LEGACY] == configure(NOBODY).alpn_protocols


def test_the_server_is_verified_unless_told_otherwise(tmp_path: Path) -> None:
    """Against the authority named; a user who skips that gets no half of it."""
    ca, _, _ = made(tmp_path)
    verified = configure(Credentials(ca, None, None, "", "receiver", False))
    assert (ssl.CERT_REQUIRED, ca, "receiver") == (verified.verify_mode, verified.cadata, verified.server_name)
    skipped = configure(Credentials(b"nonsense", None, None, "", None, True))
    assert (ssl.CERT_NONE, None) == (skipped.verify_mode, skipped.cadata)


def test_nobody_is_trusted_where_there_is_no_authority() -> None:
    """A machine without a trust store does not fall back to one that a library brings along."""
    assert b"" == configure(NOBODY).cadata


def test_we_present_certificate_chain_and_key(tmp_path: Path) -> None:
    """The first certificate of the file is ours, the others lead to the authority."""
    ca, cert, key = made(tmp_path)
    configuration = configure(Credentials(ca, cert + ca, key, "", None, False))
    own, authority = x509.load_pem_x509_certificates(cert + ca)[:2]
    assert own == configuration.certificate
    assert authority in configuration.certificate_chain
    assert configuration.private_key is not None


@pytest.mark.parametrize("broken", ["cert", "key", "cert and key swapped"])
def test_what_is_no_pem_is_a_config_error(tmp_path: Path, broken: str) -> None:
    """The operator hears of it at the start, and that it is a file's content that is wrong."""
    ca, cert, key = made(tmp_path)
    pair = {"cert": (b"nonsense", key), "key": (cert, b"nonsense"), "cert and key swapped": (key, cert)}[broken]
    with pytest.raises(ConfigError, match="is not PEM"):
        configure(Credentials(ca, *pair, "", None, False))


def test_an_authority_that_is_none_is_a_config_error() -> None:
    """A wrong file named as `ca` is told at the start, not as a server nobody trusts."""
    with pytest.raises(ConfigError):
        configure(Credentials(b"nonsense", None, None, "", None, False))


# ── who is a server ───────────────────────────────────────────────────────────────────────────────────────────────


def certificate(usages: list[x509.ObjectIdentifier] | None) -> x509.Certificate:
    """Return a certificate for these purposes; None for one that names none."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(key, hashes.SHA256())


@pytest.mark.parametrize(
    ("is_server", "usages"),
    [
        (True, None),
        (True, [ExtendedKeyUsageOID.SERVER_AUTH]),
        (True, [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
        (False, [ExtendedKeyUsageOID.CLIENT_AUTH]),
        (False, [ExtendedKeyUsageOID.CODE_SIGNING]),
    ],
    ids=["no purpose named", "server", "both", "client", "neither"],
)
def test_an_agents_certificate_does_not_make_a_server(is_server: bool, usages: list[x509.ObjectIdentifier]) -> None:
    """Another agent of the same authority cannot pose as the receiver."""

    async def problem(verify_mode: ssl.VerifyMode) -> str:
        link = Link(QuicConnection(configuration=QuicConfiguration(verify_mode=verify_mode)))
        link._quic.tls = Peer(certificate(usages))  # type: ignore[assignment]
        return link._server_problem()

    assert is_server == (asyncio.run(problem(ssl.CERT_REQUIRED)) == "")
    assert "" == asyncio.run(problem(ssl.CERT_NONE))


class Peer:
    """What the handshake leaves of the other side."""

    def __init__(self, peer_certificate: x509.Certificate) -> None:
        self._peer_certificate = peer_certificate


# ── why it ended ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expected", "code", "reason"),
    [
        ("is it a kon-receiver?", QuicErrorCode.CRYPTO_ERROR + 120, "No common ALPN protocols"),
        ("TLS failed: unable to get local issuer certificate; check tls.ca", QuicErrorCode.CRYPTO_ERROR + 42,
         "unable to get local issuer certificate"),
        ("the server was silent for", QuicErrorCode.INTERNAL_ERROR, "Idle timeout"),
        ("the connection was closed: the receiver stops", QuicErrorCode.NO_ERROR, "the receiver stops"),
        ("the connection was closed: error 0x3", 3, ""),
    ],
    ids=["no protocol in common", "TLS", "silence", "told why", "told nothing"],
)  # fmt: skip
def test_the_end_is_told_in_words(expected: str, code: int, reason: str) -> None:
    """What happened, and what to look at, instead of a number."""
    assert expected in transport._explain(ConnectionTerminated(code, None, reason))


# ── where to ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_address_is_its_own_name() -> None:
    """What the configuration gives as an address is dialled as it is, and expected in the certificate."""
    [target] = asyncio.run(resolve(ServerAddress("127.0.0.1", 7843)))
    assert (("127.0.0.1", 7843), "127.0.0.1") == (target.address, target.name)


def test_the_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken IPv6 costs one address's patience, not that of all of them."""
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(six, f"6{n}") for n in range(3)] + [(four, "4")]

    async def getaddrinfo(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        return [(family, 2, 17, "", (host, 7843)) for family, host in found]

    async def hosts() -> list[str]:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        return [str(target.address[0]) for target in await resolve(ServerAddress("edge", 7843))]

    assert ["60", "4", "61", "62"] == asyncio.run(hosts())
