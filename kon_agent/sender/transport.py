"""The QUIC connection to one server. The only module of the sender that knows aioquic.

Owns the socket and the connection on it; offers streams (`dialect.Wire`) and tells its owner what happens. Nothing is
offered before the server's certificate has been verified, its extended key usage included, which aioquic does not
look at.
"""

from __future__ import annotations

import asyncio
import copy
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from aioquic import tls
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import NetworkAddress, QuicConnection
from aioquic.quic.packet import QuicErrorCode
from cryptography import x509

from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.errors import ConfigError
from kon_agent.wire.frames import ALPN_LEGACY, ALPN_V2

IDLE_TIMEOUT_S = 15.0  # after so long without a sign the path is taken for dead
KEEPALIVE_S = 5.0  # a third of it: two may be lost
DATAGRAM_BYTES = 1350  # fits an IPv6 packet in a 1400-byte tunnel

Ticket = tls.SessionTicket

_UNSUPPORTED_ALPN = QuicErrorCode.CRYPTO_ERROR + 120  # no_application_protocol, RFC 7301 section 3.2
_IDLE_REASON = "Idle timeout"


class Owner(Protocol):
    """Who a link reports to."""

    def on_connected(self, alpn: str) -> None:
        """The handshake is complete and the server is who it should be."""

    def on_data(self, stream_id: int, data: bytes) -> None:
        """The server sent data."""

    def on_progress(self) -> None:
        """A datagram was handled: acknowledgements may have come in."""

    def on_lost(self, reason: str) -> None:
        """The connection is over; called once."""


class Link(QuicConnectionProtocol):
    """One connection."""

    owner: Owner
    target: Target
    ticket: Ticket | None = None
    _is_over = False

    def keep(self, ticket: Ticket) -> None:
        """Remember what resumes this connection; good for one use."""
        self.ticket = ticket

    async def bind(self) -> None:
        """Take a new socket, at first or in place of the one before: the connection goes on from a new address.

        Raises:
            OSError: none can be had, or there is no route.
        """
        old = self._transport
        sock = socket.socket(self.target.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self.target.address)  # so that the kernel passes ICMP errors on
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
        except BaseException:
            sock.close()
            raise
        if old is not None:
            old.close()

    def open_stream(self, is_unidirectional: bool) -> int:
        """Open a stream and return its id."""
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional)
        self._quic.send_stream_data(stream_id, b"")
        return stream_id

    def send(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        """Queue `data` on the stream; it leaves with the loop's next turn."""
        self._quic.send_stream_data(stream_id, data, end_stream)
        self._transmit_soon()

    def is_delivered(self, stream_id: int) -> bool:
        """Whether the peer has acknowledged every byte of a stream we finished."""
        stream = self._quic._streams.get(stream_id)  # aioquic forgets finished streams
        return stream is None or stream.sender.is_finished

    @property
    def rtt_us(self) -> int:
        """Smoothed round-trip time, microseconds; 0 before the first sample."""
        return int(self._quic._loss._rtt_smoothed * 1e6)

    @property
    def certificate_ends_s(self) -> float | None:
        """Until when the server's certificate is valid, UNIX time; None before it has shown one. Verified or not."""
        certificate = self._quic.tls._peer_certificate
        return None if certificate is None else certificate.not_valid_after_utc.timestamp()

    def keep_alive(self) -> None:
        """Make the peer show a sign of life."""
        self._quic.send_ping(0)
        self.transmit()

    def end(self, reason: str) -> None:
        """Close the connection, telling the peer and the owner why."""
        self.close(reason_phrase=reason)
        self._lose(reason)

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        """Handle a datagram, then let the owner look at what it brought."""
        super().datagram_received(data, addr)
        if not self._is_over:
            self.owner.on_progress()

    def error_received(self, exc: Exception) -> None:
        """The kernel reports that the peer cannot be reached (ICMP, on a connected socket)."""
        if not self._connected:
            self.end(f"the server cannot be reached: {exc}; is the receiver running and its port open?")

    def quic_event_received(self, event: events.QuicEvent) -> None:
        """Translate aioquic's events into the owner's."""
        match event:
            case events.HandshakeCompleted():
                self._connected = True
                # A ticket came over a connection whose certificate was verified: none is shown again.
                problem = "" if event.session_resumed else self._server_problem()
                if problem:
                    self.end(problem)
                else:
                    self.owner.on_connected(event.alpn_protocol or "")
            case events.StreamDataReceived() if not self._is_over:
                self.owner.on_data(event.stream_id, event.data)
            case events.StopSendingReceived() | events.StreamReset():
                self.end(f"the server aborted stream {event.stream_id} with code {event.error_code}")
            case events.ConnectionTerminated():
                self._lose(_explain(event))

    def _server_problem(self) -> str:
        if self._quic.configuration.verify_mode == ssl.CERT_NONE:
            return ""
        certificate = cast(x509.Certificate, self._quic.tls._peer_certificate)
        try:
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return ""
        if x509.oid.ExtendedKeyUsageOID.SERVER_AUTH in usage:
            return ""
        return "the server's certificate is not meant for a server (its extended key usage lacks serverAuth)"

    def _lose(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self.owner.on_lost(reason)
            if self._transport is not None:
                self._transport.close()


@dataclass(frozen=True, slots=True)
class Target:
    """One address a server's name resolves to."""

    family: socket.AddressFamily
    address: NetworkAddress
    name: str


async def resolve(server: ServerAddress) -> list[Target]:
    """Return the addresses of a server, the families taking turns (RFC 8305 section 4).

    Raises:
        OSError: the name does not resolve.
    """
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM)
    targets = [Target(family, cast(NetworkAddress, address), server.host) for family, _, _, _, address in infos]
    first = [target for target in targets if target.family == targets[0].family]
    second = [target for target in targets if target.family != targets[0].family]
    paired = [target for pair in zip(first, second, strict=False) for target in pair]
    return paired + first[len(second) :] + second[len(first) :]


async def connect(
    target: Target,
    configuration: QuicConfiguration,
    owner: Owner,
    ticket: Ticket | None = None,
    speak_early: Callable[[Link], None] | None = None,
) -> Link:
    """Start a handshake; the owner hears how it went.

    Args:
        ticket: of an earlier connection to the same server, to resume it.
        speak_early: says what can be said with the first datagrams (0-RTT), which an attacker may repeat: only what
            does no harm twice. Without a ticket nothing can be.

    Raises:
        OSError: no socket of that family can be had, or there is no route.
    """
    configuration = copy.copy(configuration)
    configuration.server_name = configuration.server_name or target.name
    configuration.session_ticket = ticket
    link = Link(QuicConnection(configuration=configuration, session_ticket_handler=lambda new: link.keep(new)))
    link.owner = owner
    link.target = target
    await link.bind()
    link.connect(target.address, transmit=False)
    if ticket is not None and speak_early is not None:
        speak_early(link)
    link.transmit()
    return link


def configure(credentials: Credentials) -> QuicConfiguration:
    """Return the settings of a connection: both protocols offered, the server verified, ourselves presented.

    Raises:
        ConfigError: a certificate or key is not what its file should hold.
    """
    configuration = QuicConfiguration(
        alpn_protocols=[ALPN_V2, ALPN_LEGACY],
        idle_timeout=IDLE_TIMEOUT_S,
        max_datagram_size=DATAGRAM_BYTES,
        server_name=credentials.server_name,
        verify_mode=ssl.CERT_NONE if credentials.skip_verify else ssl.CERT_REQUIRED,
    )
    try:
        if not credentials.skip_verify:
            tls.load_pem_x509_certificates(credentials.ca)
            configuration.cadata = credentials.ca
        if credentials.cert is not None and credentials.key is not None:
            configuration.certificate, *configuration.certificate_chain = tls.load_pem_x509_certificates(
                credentials.cert
            )
            configuration.private_key = tls.load_pem_private_key(credentials.key)
            if configuration.certificate.public_key() != configuration.private_key.public_key():
                raise ConfigError("tls.cert and tls.key do not belong together; make a new pair")
    except (ValueError, TypeError) as err:
        raise ConfigError(f"tls: a certificate or key file is not PEM: {err}") from err
    return configuration


def validity_of(pem: bytes) -> tuple[float, float]:
    """Return from when until when a certificate is valid, UNIX times.

    Args:
        pem: the certificate, with or without its chain behind it.

    Raises:
        ConfigError: it is none.
    """
    try:
        certificate = tls.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError) as err:
        raise ConfigError("it holds no PEM certificate; replace the file") from err
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def _explain(event: events.ConnectionTerminated) -> str:
    reason = event.reason_phrase or f"error {event.error_code:#x}"
    if event.error_code == _UNSUPPORTED_ALPN:
        return f"the server speaks neither {ALPN_V2} nor {ALPN_LEGACY}; is it a kon-receiver?"
    if event.error_code & ~0xFF == QuicErrorCode.CRYPTO_ERROR:
        return f"TLS failed: {reason}; check tls.ca, tls.server_name and the server's certificate"
    if reason == _IDLE_REASON:
        return f"the server was silent for {IDLE_TIMEOUT_S:.0f} s"
    return f"the connection was closed: {reason}"
