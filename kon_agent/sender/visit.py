"""A visit: one connection to a server by the sender's own means, up to its welcome, to see whether it would do.

Nothing is delivered: what is said is the Hello that any agent says, which changes nothing at a receiver. Owns an event
loop for as long as it lasts; whatever happens, it ends within the time it is given.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.errors import KonError
from kon_agent.sender.dialect import Dialect, choose
from kon_agent.sender.transport import Link, configure, connect, resolve

MAX_ADDRESSES = 4  # of one server, as the sender tries them


@dataclass(frozen=True, slots=True)
class Visit:
    """How far one came.

    Attributes:
        server: where to.
        addresses: what its name resolved to; none: it did not.
        alpn: the protocol the handshake has settled on; empty: there was no handshake.
        rtt_s: round-trip time of the handshake, seconds; 0: unknown.
        certificate_ends_s: until when the server's certificate is valid, UNIX time; None: none was seen.
        is_welcome: whether the server takes us; with the original's protocol, whether it does not refuse us.
        failure: what ended it before that; empty: nothing.
    """

    server: ServerAddress
    addresses: tuple[str, ...] = ()
    alpn: str = ""
    rtt_s: float = 0.0
    certificate_ends_s: float | None = None
    is_welcome: bool = False
    failure: str = ""


def visit(servers: Sequence[ServerAddress], credentials: Credentials, agent_id: str, timeout_s: float) -> list[Visit]:
    """Visit servers, all at once.

    Args:
        servers: whom.
        credentials: what we prove ourselves with.
        agent_id: who we say we are.
        timeout_s: seconds until the visits are over.

    Raises:
        ConfigError: the credentials are unusable.
    """
    logging.getLogger("quic").setLevel(logging.CRITICAL)  # aioquic tells of every failure; so does the visit
    visitors = [_Visitor(server, credentials, agent_id) for server in servers]
    # Not `asyncio.run`: that would wait for a name server that does not answer.
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_all(visitors, timeout_s))
    finally:
        loop.close()
    return [visitor.report() for visitor in visitors]


async def _all(visitors: Sequence[_Visitor], timeout_s: float) -> None:
    await asyncio.gather(*(visitor.go(timeout_s) for visitor in visitors))


class _Visitor:
    """One visit, from the outside."""

    def __init__(self, server: ServerAddress, credentials: Credentials, agent_id: str) -> None:
        self._server = server
        self._configuration = configure(credentials)
        self._agent_id = agent_id
        self._token = credentials.token
        self._addresses: tuple[str, ...] = ()
        self._calls: list[_Call] = []
        self._has_called_all = False
        self._failure = ""
        self._is_over = asyncio.Event()

    async def go(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                targets = (await resolve(self._server))[:MAX_ADDRESSES]
                self._addresses = tuple(dict.fromkeys(str(target.address[0]) for target in targets))
                for target in targets:
                    call = _Call(self._agent_id, self._token, self._look)
                    self._calls.append(call)
                    try:
                        call.link = await connect(target, self._configuration, call)
                    except OSError as err:
                        call.on_lost(str(err))
                self._has_called_all = True
                self._look()
                await self._is_over.wait()
        except TimeoutError:
            silent = f"no answer within {timeout_s:.0f} s; is a receiver running there?"
            unresolved = f"the name does not resolve within {timeout_s:.0f} s; check /etc/resolv.conf"
            self._failure = silent if self._addresses else unresolved
        except OSError as err:
            self._failure = str(err)
        finally:
            for call in self._calls:
                call.end()

    def _look(self) -> None:
        """See whether one address has led to a welcome, or none will."""
        has_failed = self._has_called_all and all(call.failure for call in self._calls)
        if has_failed or any(call.is_welcome for call in self._calls):
            self._is_over.set()

    def report(self) -> Visit:
        # Of several addresses the one that came furthest tells.
        best = max(self._calls, key=lambda call: (call.is_welcome, bool(call.alpn)), default=None)
        if best is None:
            return Visit(self._server, self._addresses, failure=self._failure)
        return Visit(
            server=self._server,
            addresses=self._addresses,
            alpn=best.alpn,
            rtt_s=best.rtt_s,
            certificate_ends_s=best.certificate_ends_s,
            is_welcome=best.is_welcome,
            failure="" if best.is_welcome else best.failure or self._failure,
        )


class _Call:
    """A connection to one address: `transport.Owner`."""

    def __init__(self, agent_id: str, token: str, tell: Callable[[], None]) -> None:
        self.link: Link | None = None
        self.alpn = ""
        self.rtt_s = 0.0
        self.certificate_ends_s: float | None = None
        self.is_welcome = False
        self.failure = ""
        self._agent_id = agent_id
        self._token = token
        self._dialect: Dialect | None = None
        self._tell = tell
        self._has_hung_up = False

    def on_connected(self, alpn: str) -> None:
        """Say Hello."""
        assert self.link is not None
        self.alpn = alpn
        self.rtt_s = self.link.rtt_us / 1e6
        self.certificate_ends_s = self.link.certificate_ends_s
        try:
            self._dialect = choose(alpn, self._agent_id, self._token, has_backlog=False)
        except KonError as err:
            self._fail(str(err))
            return
        self._dialect.open(self.link)
        self._check()

    def on_data(self, stream_id: int, data: bytes) -> None:
        """Hear whether we are welcome."""
        if self._dialect is None:
            return
        try:
            self._dialect.receive(stream_id, data)
        except KonError as err:
            self._fail(str(err))
            return
        self._check()

    def on_progress(self) -> None:
        """Nothing has been sent that would be acknowledged."""

    def on_lost(self, reason: str) -> None:
        """It is over, one way or the other."""
        if self.link is not None and self.certificate_ends_s is None:
            self.certificate_ends_s = self.link.certificate_ends_s
        if not self.is_welcome and not self._has_hung_up:
            self._fail(reason)

    def end(self) -> None:
        """Hang up."""
        self._has_hung_up = True
        if self.link is not None:
            self.link.end("only a visit")

    def _check(self) -> None:
        assert self._dialect is not None
        if self._dialect.is_ready(is_backlog=False):
            self.is_welcome = True
            self._tell()

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._tell()
