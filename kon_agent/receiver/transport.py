"""QUIC for the receiver: the only module here that knows aioquic.

Owns the UDP socket and the connections on it; feeds each connection's intake and does what it says. Reading
the socket ourselves rather than through asyncio's endpoint buys three things: IPv6 and IPv4 on one socket, a
whole burst of datagrams per turn of the loop (which is what makes group commits groups), and a way to stop
reading when the store is behind.

Invariants:
* Where client certificates are asked for, no stream data reaches an intake before the handshake is complete and the
  certificate has been judged, and no session ticket is issued: a resumption would skip the certificate.
* Where none are, tickets are issued, each good for one resumption, and early data (0-RTT) is taken: what an attacker
  repeats are records the ledger refuses.
* A batch is acknowledged from the committer's report only.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import logging
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.tls import SessionTicket

from kon_agent.config.server import ServerAddress
from kon_agent.errors import ConfigError, KonError, StoreError
from kon_agent.receiver.batch import Batch, Outcome
from kon_agent.receiver.committer import Committer
from kon_agent.receiver.identity import Gate, RefusedError
from kon_agent.receiver.intake import Action, AgentIntake, Close, Intake, Send
from kon_agent.receiver.legacy import LegacyIntake
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import ALPN_LEGACY, ALPN_V2

IDLE_TIMEOUT_S = 15.0  # an agent pings three times in it; the dead are forgotten soon
DATAGRAMS_PER_TURN = 64  # read before the loop may do something else
MAX_DATAGRAM_BYTES = 65536
MAX_TICKETS = 4096  # some 300 bytes each; an agent holds one or two
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024  # a burst of many agents reconnecting; the kernel may grant less
MAX_REASON_BYTES = 512  # of a CONNECTION_CLOSE, which has to fit one packet
GOING_AWAY = 0  # application error code of an orderly end

log = logging.getLogger(__name__)

Report = Callable[[Batch, Outcome, float], None]
"""Told of each batch stored, and the seconds from its arrival to its being durable."""


class Connection(QuicConnectionProtocol):
    """One agent's connection."""

    gate: Gate
    committer: Committer
    report: Report
    _intake: Intake | None = None
    _peer = ""

    def quic_event_received(self, event: events.QuicEvent) -> None:
        """Pass an event on to the intake."""
        if isinstance(event, events.ProtocolNegotiated):
            if self.gate.authority is None:
                self._intake = self._judge(event.alpn_protocol)
        elif isinstance(event, events.HandshakeCompleted):
            self._intake = self._intake or self._judge(event.alpn_protocol)
        elif isinstance(event, events.ConnectionTerminated):
            self._end(event)
        elif self._intake is None:
            return
        elif isinstance(event, events.StreamDataReceived):
            actions = self._intake.receive(event.stream_id, event.data, event.end_stream, time.monotonic())
            self._do(actions)
        elif isinstance(event, events.StreamReset):
            self._do(self._intake.reset(event.stream_id))
        elif isinstance(event, events.StopSendingReceived):
            # Writing to such a stream is an error in aioquic, and an agent deaf to acknowledgements is of no
            # use.
            self._do([Close(int(pb.Refusal.MALFORMED), "an agent may not refuse a stream's acknowledgements")])

    def _judge(self, alpn: str | None) -> Intake:
        tls = self._quic.tls
        self._peer = f"{self._quic._network_paths[0].addr[0]}".removeprefix("::ffff:")
        names: list[str] = []
        refusal: RefusedError | None = None
        if tls._peer_certificate is not None:
            chain = [tls._peer_certificate, *tls._peer_certificate_chain]
            try:
                names = self.gate.certified_names(chain, datetime.datetime.now(datetime.UTC))
            except RefusedError as err:
                refusal = err
        if alpn == ALPN_V2:
            return AgentIntake(self.gate, names, refusal)
        return LegacyIntake(self.gate, secrets.randbits(64), names, refusal)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._quic.send_stream_data(action.stream_id, action.data, action.is_end)
                self._transmit_soon()
            elif isinstance(action, Close):
                who = (
                    f"{self._intake.agent_id!r} at {self._peer}"
                    if self._intake and self._intake.agent_id
                    else self._peer
                )
                log.warning("refused %s: %s", who, action.message)
                self.transmit()  # what was said before; once closing, aioquic sends nothing else
                self.close(action.code, _reason(action.message))
                self._intake = None
            else:
                self._submit(action.stream_id, action.batch)

    def _submit(self, stream_id: int, batch: Batch) -> None:
        intake = cast(Intake, self._intake)

        def done(result: Outcome | StoreError) -> None:
            if isinstance(result, StoreError):
                actions = intake.not_stored(stream_id)  # why is for our log, not for them
            else:
                self.report(batch, result, time.monotonic() - batch.received_s)
                actions = intake.stored(stream_id, batch, result)
            if self._intake is intake:  # else the connection is gone, and the agent will send the batch again
                self._do(actions)

        self.committer.submit(batch, done)

    def _end(self, event: events.ConnectionTerminated) -> None:
        if self._intake is not None and self._intake.agent_id:
            why = event.reason_phrase or "closed"
            log.info("%s at %s left: %.200r", self._intake.agent_id, self._peer, why)
        self._intake = None


class Endpoint:
    """The receiver's socket and everything that arrives on it.

    Args:
        address: where to listen; `::` takes IPv4 too, and where there is no IPv6, only IPv4.

    Raises:
        KonError: the address cannot be had.
    """

    def __init__(
        self,
        address: ServerAddress,
        configuration: QuicConfiguration,
        gate: Gate,
        committer: Committer,
        report: Report,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._committer = committer
        self._socket = _bind(address)
        self._is_reading = False

        def connect(quic: QuicConnection, **_: Any) -> Connection:
            if gate.authority is not None:
                _ask_for_certificate(quic)
            connection = Connection(quic)
            connection.gate, connection.committer, connection.report = gate, committer, report
            return connection

        tickets = Tickets() if gate.authority is None else None
        self._server = QuicServer(
            configuration=configuration,
            create_protocol=connect,
            session_ticket_fetcher=tickets.pop if tickets else None,
            session_ticket_handler=tickets.add if tickets else None,
        )
        self._server.connection_made(_Sender(self._socket))
        committer.on_room = self._resume
        self._resume()

    @property
    def address(self) -> ServerAddress:
        """Where it listens, the port as the kernel chose it."""
        host, port = self._socket.getsockname()[:2]
        return ServerAddress(host, port)

    def stop_reading(self) -> None:
        """Take nothing more in."""
        if self._is_reading:
            self._loop.remove_reader(self._socket)
            self._is_reading = False

    def close(self) -> None:
        """Say goodbye to every agent and close the socket."""
        self._committer.on_room = lambda: None
        self.stop_reading()
        for connection in set(self._server._protocols.values()):
            connection.transmit()  # acknowledgements on their way
            connection.close(GOING_AWAY, "the receiver is stopping")
        self._socket.close()

    def _resume(self) -> None:
        if not self._is_reading:
            self._loop.add_reader(self._socket, self._read)
            self._is_reading = True

    def _read(self) -> None:
        for _ in range(DATAGRAMS_PER_TURN):
            if self._committer.is_full:
                log.info("the store is behind: reading stops until it has caught up")
                self.stop_reading()
                return
            try:
                data, peer = self._socket.recvfrom(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as err:  # an ICMP error of an earlier datagram, udp(7): that peer's trouble
                log.debug("socket: %s", err)
                continue
            self._server.datagram_received(data, peer)


class Tickets:
    """The session tickets issued and not used yet; the oldest go first."""

    def __init__(self) -> None:
        self._tickets: dict[bytes, SessionTicket] = {}

    def add(self, ticket: SessionTicket) -> None:
        """Keep a ticket just issued."""
        self._tickets[ticket.ticket] = ticket
        if len(self._tickets) > MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]

    def pop(self, label: bytes) -> SessionTicket | None:
        """Return a ticket and forget it: it resumes one session."""
        return self._tickets.pop(label, None)


class _Sender(asyncio.DatagramTransport):
    """The sending half of our socket, as aioquic wants it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._socket = sock

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send, or lose, a datagram: QUIC sends again what got lost."""
        with contextlib.suppress(OSError):
            self._socket.sendto(data, addr)


def configure(cert: Path, key: Path) -> QuicConfiguration:
    """Return the settings of every connection.

    Raises:
        ConfigError: the certificate or key cannot be read or used.
    """
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[ALPN_V2, ALPN_LEGACY], idle_timeout=IDLE_TIMEOUT_S
    )
    try:
        configuration.load_cert_chain(cert, key)
    except OSError as err:
        raise ConfigError(f"{err.filename}: {err.strerror}; make both with `kon-receiver pki init`") from err
    except (ValueError, TypeError, IndexError) as err:
        raise ConfigError(f"{cert} and {key}: not a PEM certificate and its key: {err}") from err
    if configuration.certificate.public_key() != configuration.private_key.public_key():
        raise ConfigError(f"{key} is another certificate's key, not that of {cert}")
    return configuration


def _ask_for_certificate(quic: QuicConnection) -> None:
    """Make the handshake ask the client for its certificate, which aioquic has no public way for."""
    initialize = quic._initialize

    def initialize_and_ask(peer_cid: bytes) -> None:
        initialize(peer_cid)
        quic.tls._request_client_certificate = True

    quic._initialize = initialize_and_ask  # type: ignore[method-assign]


def _bind(address: ServerAddress) -> socket.socket:
    try:
        infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
    except OSError as err:
        raise KonError(f"cannot listen on {address}: {err.strerror}; give an address of this host") from err
    targets = [(info[0], info[4]) for info in infos]
    if address.host == "::":  # with ipv6.disable=1 there is not even a socket of that family
        targets.append((socket.AF_INET, ("0.0.0.0", address.port)))  # noqa: S104 - as asked for
    error: OSError | None = None
    for family, target in targets:
        try:
            return _bind_one(family, target)
        except OSError as err:
            error = error or err
    reason = error.strerror if error else "no address"
    is_taken = error is not None and error.errno == errno.EADDRINUSE
    advice = "is another receiver running there?" if is_taken else "give an address of this host"
    raise KonError(f"cannot listen on {address}: {reason}; {advice}") from error


def _bind_one(family: int, target: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if target[0] == "::" else 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        sock.bind(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _reason(message: str) -> str:
    return message.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
