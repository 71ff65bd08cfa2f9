"""The connection to whichever server can be reached: dialling, failover, going back, and saying how it stands.

Owns the link and the dialect spoken on it. Servers are tried in order of preference, each by all its addresses, a
little apart and in parallel; after a round in vain the waits grow, with jitter. One that keeps failing, because it does
not answer or acknowledges nothing, rests (its breaker) as long as another can be tried. While a lesser server serves,
the preferred one is asked now and then whether it is back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Sequence
from typing import Protocol

from kon_agent import clock
from kon_agent.backoff import Backoff
from kon_agent.breaker import Breaker
from kon_agent.config.server import ServerAddress
from kon_agent.errors import KonError
from kon_agent.linkreport import LinkReport, LinkState
from kon_agent.page import PageWriter
from kon_agent.sender.dialect import Acknowledged, Answer, Dialect, Parcel, choose
from kon_agent.sender.transport import KEEPALIVE_S, Link, Target, Ticket, configure, connect, resolve
from kon_agent.spec import SenderSpec
from kon_agent.wire.frames import ALPN_V2

log = logging.getLogger(__name__)

ANSWER_DEADLINE_S = 5.0  # an acknowledgement overdue by so much means the connection is dead: QUIC will not say so
REBIND_AFTER_S = 1.5  # before that, a new socket: the local address may have changed, or a NAT forgotten us
CONNECT_DEADLINE_S = 10.0  # handshake and welcome, on a link with a second of delay and some loss
STAGGER_S = 0.25  # between the addresses of one server (RFC 8305 section 5)
MAX_ADDRESSES = 4  # of one server
RECONNECT_BASE_S = 0.5
RECONNECT_MAX_S = 10.0  # of an outage only so much is added; a herd of thousands is spread over it by the jitter
GO_BACK_EVERY_S = 60.0  # how often a preferred server that failed is tried while another serves


class Client(Protocol):
    """Who uses the connection."""

    def on_ready(self) -> None:
        """Batches may be sent, or more kinds of them than before."""

    def on_answers(self, answers: list[Answer]) -> None:
        """Batches have been answered."""

    def on_lost(self) -> None:
        """The connection is gone, and every batch in flight with it."""


class _Attempt:
    """The owner of a link that is not ours yet: `transport.Owner`."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.dialect: Acknowledged | None = None  # where it has spoken early
        self.heard: list[tuple[int, bytes]] = []
        self.alpn = ""
        self.failure = ""
        self.is_over = asyncio.Event()

    def on_connected(self, alpn: str) -> None:
        self.alpn = alpn
        self.is_over.set()

    def on_data(self, stream_id: int, data: bytes) -> None:
        """Keep it for the dialect: an answer to what was said early."""
        self.heard.append((stream_id, data))

    def on_progress(self) -> None:
        """Nothing is sent yet."""

    def on_lost(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.is_over.set()


async def _first(attempts: Sequence[_Attempt], patience_s: float | None) -> _Attempt | None:
    """Return the first attempt that succeeds; None once all have failed, or none has ended for `patience_s`."""
    while True:
        for attempt in attempts:
            if attempt.is_over.is_set() and not attempt.failure:
                return attempt
        waiting = [asyncio.ensure_future(a.is_over.wait()) for a in attempts if not a.is_over.is_set()]
        if not waiting:
            return None
        try:
            done, _ = await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiting:
                waiter.cancel()
        if not done:
            return None


class Connector:
    """The connection, and its report.

    Args:
        spec: servers, credentials, identity, and the report's page.
        has_backlog: whether a stream for the backlog is wanted.
        client: who uses the connection.

    Raises:
        ConfigError: the credentials are unusable.
    """

    def __init__(self, spec: SenderSpec, has_backlog: bool, client: Client) -> None:
        self.report = LinkReport()
        self._servers: Sequence[ServerAddress] = spec.servers
        self._page: PageWriter = spec.report
        self._agent_id = spec.agent_id
        self._token = spec.credentials.token
        self._has_backlog = has_backlog
        self._client = client
        self._configuration = configure(spec.credentials)
        self._link: Link | None = None
        self._dialect: Dialect | None = None
        self._lost: asyncio.Future[str] | None = None
        self._ready_by_ns = 0
        self._last_sent_ns = 0
        self._sent_bytes = 0
        self._go_back_at_ns = 0
        self._tickets: dict[str, Ticket] = {}  # by server; in memory only, and only of ours that issue any
        self._has_rebound = False
        self._has_served = False  # the server has welcomed us
        self._has_answered = False  # and acknowledged a batch
        self._breakers = {str(server): Breaker(str(server)) for server in spec.servers}
        self._background: set[asyncio.Task[None]] = set()
        self._backoff = Backoff(RECONNECT_BASE_S, RECONNECT_MAX_S, random.random)
        self._show(LinkState.DISCONNECTED, "", "")

    # Keeping a connection.

    async def run(self) -> None:
        """Be connected, for ever."""
        while True:
            for server in self._candidates():
                self._show(LinkState.CONNECTING, str(server), self.report.detail)
                reason = await self._converse(server)
                if reason != self.report.detail:  # the same failure is told once, not at every attempt
                    log.warning("not connected to %s: %s; records are kept and sent later", server, reason)
                self._show(LinkState.BACKOFF, str(server), reason)
                if self._has_answered:
                    break  # whatever ended it: begin with the preferred server again
                self._breakers[str(server)].failed(clock.now_ns())
            await asyncio.sleep(self._backoff.next_s())

    def _candidates(self) -> Sequence[ServerAddress]:
        """Return the servers to try, in order: those that rest only where all do."""
        now_ns = clock.now_ns()
        awake = [server for server in self._servers if self._breakers[str(server)].allows(now_ns)]
        return awake or self._servers

    async def _converse(self, server: ServerAddress) -> str:
        """Hold one connection from its first datagram to its end; return why it ended."""
        self._has_served = self._has_answered = False
        self._lost = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                attempt = await self._dial(server, self._tickets.pop(str(server), None))
            self._begin(attempt)
            return await self._lost
        except TimeoutError:
            return f"no answer within {CONNECT_DEADLINE_S:.0f} s; is a receiver running there?"
        except (OSError, KonError) as err:
            return str(err)
        finally:
            if self._link is not None:
                self._link.end("the conversation is over")
                if self._has_served and self._link.ticket is not None and isinstance(self._dialect, Acknowledged):
                    self._tickets[str(server)] = self._link.ticket
            self._link = self._dialect = None
            self._client.on_lost()

    async def _dial(self, server: ServerAddress, ticket: Ticket | None) -> _Attempt:
        """Return the first attempt at the server that comes up.

        Args:
            ticket: resumes an earlier connection; used by the first attempt, tickets are good for one.

        Raises:
            OSError: none of its addresses answers; why.
        """
        attempts: list[_Attempt] = []
        winner: _Attempt | None = None
        try:
            for target in (await resolve(server))[:MAX_ADDRESSES]:
                attempts.append(await self._attempt(target, None if attempts else ticket))
                winner = await _first(attempts, STAGGER_S)
                if winner is not None:
                    break
            winner = winner or await _first(attempts, None)
            if winner is None or winner.link is None:
                raise ConnectionError("; ".join(dict.fromkeys(attempt.failure for attempt in attempts)))
            return winner
        finally:
            for attempt in attempts:
                if attempt is not winner and attempt.link is not None:
                    attempt.link.end("another address was faster")

    async def _attempt(self, target: Target, ticket: Ticket | None) -> _Attempt:
        attempt = _Attempt()
        if ticket is not None:  # Hello may be repeated by an attacker: it changes nothing
            attempt.dialect = Acknowledged(self._agent_id, self._token, self._has_backlog)
        try:
            speak_early = attempt.dialect.open if attempt.dialect else None
            attempt.link = await connect(target, self._configuration, attempt, ticket, speak_early)
        except OSError as err:
            attempt.on_lost(str(err))
        return attempt

    def _begin(self, attempt: _Attempt) -> None:
        assert attempt.link is not None
        now_ns = clock.now_ns()
        self._link = attempt.link
        self._link.owner = self
        if attempt.dialect is not None and attempt.alpn == ALPN_V2:
            self._dialect = attempt.dialect
        else:
            self._dialect = choose(attempt.alpn, self._agent_id, self._token, self._has_backlog)
            self._dialect.open(self._link)
        self._ready_by_ns = now_ns + int(CONNECT_DEADLINE_S * clock.NS_PER_S)
        self._go_back_at_ns = now_ns + int(GO_BACK_EVERY_S * clock.NS_PER_S)
        for stream_id, data in attempt.heard:
            self.on_data(stream_id, data)
        self._check_ready()

    def _check_ready(self) -> None:
        if self._dialect is None or not self._dialect.is_ready(is_backlog=False):
            return
        if self.report.state is not LinkState.CONNECTED:
            self._has_served = True
            self._ready_by_ns = 0
            self._backoff.reset()
            self._show(LinkState.CONNECTED, self.report.address, self._who_rests())
            log.info("connected to %s", self.report.address)
        self._client.on_ready()

    def _who_rests(self) -> str:
        resting = [name for name, breaker in self._breakers.items() if breaker.is_open]
        return f"not tried for a while after failures: {', '.join(resting)}" if resting else ""

    async def _go_back(self) -> None:
        """Ask the preferred server whether it is back; if so, leave the present one.

        That it can be dialled does not close its breaker: only a batch it acknowledges does.
        """
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                attempt = await self._dial(self._servers[0], None)
        except (OSError, TimeoutError) as err:
            log.debug("%s is still away: %s", self._servers[0], err)
            self._breakers[str(self._servers[0])].failed(clock.now_ns())
            return
        if attempt.link is not None:
            attempt.link.end("only asked whether you are back")
        self.end(f"{self._servers[0]} is back")

    # Events of the link: `transport.Owner`.

    def on_connected(self, alpn: str) -> None:
        """Came with `_dial`."""

    def on_data(self, stream_id: int, data: bytes) -> None:
        """Hand the server's words to the dialect."""
        if self._dialect is None:
            return
        try:
            answers = self._dialect.receive(stream_id, data)
        except KonError as err:
            self.end(str(err))
            return
        self._check_ready()
        self._answered(answers)

    def on_progress(self) -> None:
        """The transport may have delivered something."""
        if self._dialect is not None and self._link is not None:
            self._answered(self._dialect.progress(self._link))

    def _answered(self, answers: list[Answer]) -> None:
        if answers:
            self._has_rebound = False
            if not self._has_answered:
                self._has_answered = True
                self._breakers[self.report.address].succeeded()
            self._client.on_answers(answers)

    def on_lost(self, reason: str) -> None:
        """The link is over."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

    # What the client asks for.

    @property
    def is_connected(self) -> bool:
        """Whether live batches can be sent."""
        return self.report.state is LinkState.CONNECTED and self._dialect is not None

    def is_ready(self, is_backlog: bool) -> bool:
        """Whether a batch of that kind can be sent."""
        return self._dialect is not None and self._dialect.is_ready(is_backlog)

    def send(self, batch_id: int, parcels: Sequence[Parcel], is_backlog: bool) -> int:
        """Send a batch; return the bytes it took."""
        assert self._link is not None and self._dialect is not None
        sent = self._dialect.send(self._link, batch_id, parcels, clock.wall_ns(), is_backlog)
        self._last_sent_ns = clock.now_ns()
        self._sent_bytes += sent
        return sent

    def end(self, reason: str) -> None:
        """Give the connection up."""
        if self._link is not None:
            self._link.end(reason)

    def tick(self, now_ns: int, oldest_sent_ns: int | None) -> None:
        """Look at the deadlines, and show a sign of life.

        Args:
            oldest_sent_ns: when the oldest batch in flight was sent; None where there is none.
        """
        self._show(self.report.state, self.report.address, self.report.detail)
        link = self._link
        if link is None or self._dialect is None:
            return
        waited_s = (now_ns - oldest_sent_ns) / clock.NS_PER_S if oldest_sent_ns is not None else 0.0
        if self._ready_by_ns and now_ns > self._ready_by_ns:
            self.end("the server accepts the connection and then says nothing; is it a kon-receiver?")
        elif waited_s > ANSWER_DEADLINE_S:
            self.end(f"an acknowledgement is overdue by {ANSWER_DEADLINE_S:.0f} s")
        elif waited_s > REBIND_AFTER_S and not self._has_rebound:
            self._has_rebound = True
            self._later(self._rebind(link))
        elif now_ns - self._last_sent_ns > KEEPALIVE_S * clock.NS_PER_S:
            self._last_sent_ns = now_ns
            link.keep_alive()
        preferred = str(self._servers[0])
        if self.report.address != preferred and now_ns > self._go_back_at_ns:
            self._go_back_at_ns = now_ns + int(GO_BACK_EVERY_S * clock.NS_PER_S)
            if self._breakers[preferred].allows(now_ns):
                self._later(self._go_back())

    async def _rebind(self, link: Link) -> None:
        try:
            await link.bind()
        except OSError as err:
            log.debug("no new socket: %s", err)
            return
        link.keep_alive()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _show(self, state: LinkState, address: str, detail: str) -> None:
        changed = state is not self.report.state
        rtt_us = self._link.rtt_us if self._link is not None and state is LinkState.CONNECTED else 0
        self.report = LinkReport(
            state=state,
            address=address,
            since_ns=clock.wall_ns() if changed or not self.report.since_ns else self.report.since_ns,
            rtt_us=rtt_us,
            sent_bytes=self._sent_bytes,
            alive_ns=clock.now_ns(),
            detail=detail,
        )
        self._page.publish(self.report.encode())
