"""The body of the sender process: rings in, batches out, acknowledgements back to the tails.

Runs after the drop of every privilege. Owns the event loop and nothing that decides: `lane` says what may go, `dialect`
how, `transport` carries it. While there is no connection the records stay in the rings.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import random
import traceback
from collections import deque
from dataclasses import dataclass

from kon_agent import channel, clock, logs
from kon_agent.backoff import Backoff
from kon_agent.config.server import ServerAddress
from kon_agent.errors import KonError
from kon_agent.linkreport import LinkReport, LinkState
from kon_agent.linux.memory import map_memory, unmap_memory
from kon_agent.ring import CONSUMER_BYTES, Consumer, producer_bytes
from kon_agent.sender.dialect import Answer, Dialect, choose
from kon_agent.sender.lane import Lane, Portion, gather
from kon_agent.sender.transport import KEEPALIVE_S, Link, configure, connect
from kon_agent.spec import SenderSpec

log = logging.getLogger(__name__)

MAX_IN_FLIGHT_BATCHES = 8
MAX_IN_FLIGHT_BYTES = 1024 * 1024  # the receiver's flow-control window: more would only wait in aioquic
ANSWER_DEADLINE_S = 5.0  # an acknowledgement overdue by so much means the connection is dead: QUIC will not say so
CONNECT_DEADLINE_S = 10.0  # handshake and welcome, on a link with a second of delay and some loss
RECONNECT_BASE_S = 0.5
RECONNECT_MAX_S = 30.0
ORPHAN_TIMEOUT_S = 1.0  # how long a sender whose supervisor has died still tries to deliver
TICK_S = 1.0  # how often deadlines are looked at and a sign of life is shown


@dataclass(slots=True)
class InFlight:
    """A batch on its way: what it carries, how much it weighs, when it left."""

    portions: list[Portion]
    bytes: int
    sent_ns: int


def main(spec: SenderSpec) -> int:
    """Deliver until told to stop; return the process's exit code."""
    logs.setup("sender", spec.log.level, spec.log.format)
    logging.getLogger("quic").setLevel(logging.WARNING)  # aioquic tells of every connection; `Sender` does already
    try:
        return asyncio.run(Sender(spec).run())
    except KonError as err:
        log.error("%s", err)
        return err.exit_code
    except Exception:
        traceback.print_exc()
        return os.EX_SOFTWARE


class Sender:
    """Every lane, and the one connection they share."""

    def __init__(self, spec: SenderSpec) -> None:
        self._spec = spec
        self._configuration = configure(spec.credentials)
        self._lanes: dict[int, Lane] = {}
        self._turn: deque[int] = deque()  # ring numbers in the order they are served, for fairness
        self._memory: dict[int, list[memoryview]] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._in_flight_bytes = 0
        self._next_batch_id = 1
        self._link: Link | None = None
        self._dialect: Dialect | None = None
        self._lost: asyncio.Future[str] | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._connect_by_ns = 0
        self._last_sent_ns = 0
        self._sent_bytes = 0
        self._state = LinkReport()
        self._backoff = Backoff(RECONNECT_BASE_S, RECONNECT_MAX_S, random.random)
        self._stopping = asyncio.Event()
        self._stop_timeout_s = 0.0
        self._settled = asyncio.Event()

    async def run(self) -> int:
        """Serve the lanes until stopped and drained, or until the stop's time is up."""
        loop = asyncio.get_running_loop()
        self._show(LinkState.DISCONNECTED, "", "")
        loop.add_reader(self._spec.orders.fileno(), self._take_orders)
        loop.add_reader(self._spec.doorbell, self._on_doorbell)
        connecting = loop.create_task(self._keep_connected())
        ticking = loop.create_task(self._tick())
        stopped = loop.create_task(self._stopping.wait())
        await asyncio.wait({connecting, ticking, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (connecting, ticking):
            if task.done():
                task.result()  # neither ends by itself: raise what ended it
        await self._deliver_rest()
        connecting.cancel()
        ticking.cancel()
        if self._link is not None:
            self._link.end("the agent stops")
        return os.EX_OK

    async def _deliver_rest(self) -> None:
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                while any(lane.used_bytes() for lane in self._lanes.values()):
                    self._settled.clear()
                    self._pump()
                    await self._settled.wait()
        except TimeoutError:
            rest = sum(lane.used_bytes() for lane in self._lanes.values())
            log.warning("stopped with %d bytes of records undelivered: %s", rest, self._state.detail or "out of time")

    # The connection.

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            address = self._spec.servers[attempt % len(self._spec.servers)]
            self._show(LinkState.CONNECTING, str(address), self._state.detail)
            reason = await self._converse(address, attempt // len(self._spec.servers))
            wait_s = self._backoff.next_s()
            if reason != self._state.detail:  # the same failure is told once, not at every attempt
                log.warning("not connected to %s: %s; records are kept and sent later", address, reason)
            self._show(LinkState.BACKOFF, str(address), reason)
            attempt += 1
            await asyncio.sleep(wait_s)

    async def _converse(self, address: ServerAddress, attempt: int) -> str:
        """Hold one connection from its first datagram to its end; return why it ended."""
        self._lost = asyncio.get_running_loop().create_future()
        self._connect_by_ns = clock.now_ns() + int(CONNECT_DEADLINE_S * clock.NS_PER_S)
        try:
            self._link = await connect(address, attempt, copy.copy(self._configuration), self)
            return await self._lost
        except OSError as err:
            return f"{address.host} cannot be reached: {err}"
        finally:
            self._link = self._dialect = None
            self._in_flight.clear()
            self._in_flight_bytes = 0
            for lane in self._lanes.values():
                lane.rewind()

    def on_connected(self, alpn: str) -> None:
        """`transport.Owner`: the server is verified; begin the conversation."""
        assert self._link is not None
        try:
            self._dialect = choose(alpn, self._spec.agent_id, self._spec.credentials.token)
        except KonError as err:
            self._link.end(str(err))
            return
        self._dialect.open(self._link)
        self._check_ready()

    def on_data(self, stream_id: int, data: bytes) -> None:
        """`transport.Owner`: hand the server's words to the dialect."""
        if self._dialect is None or self._link is None:
            return
        try:
            answers = self._dialect.receive(stream_id, data)
            self._check_ready()
            self._settle(answers)
        except KonError as err:
            self._link.end(str(err))

    def on_progress(self) -> None:
        """`transport.Owner`: the transport may have delivered something."""
        if self._dialect is not None and self._link is not None:
            self._settle(self._dialect.progress(self._link))

    def on_lost(self, reason: str) -> None:
        """`transport.Owner`: the connection is over."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

    def _check_ready(self) -> None:
        if self._dialect is not None and self._dialect.is_ready and self._state.state is not LinkState.CONNECTED:
            self._connect_by_ns = 0
            self._backoff.reset()
            self._show(LinkState.CONNECTED, self._state.address, "")
            log.info("connected to %s", self._state.address)
            self._pump()

    async def _tick(self) -> None:
        """Look at the deadlines."""
        while True:
            await asyncio.sleep(TICK_S)
            self._show(self._state.state, self._state.address, self._state.detail)
            link = self._link
            if link is None:
                continue
            now_ns = clock.now_ns()
            oldest_ns = min((batch.sent_ns for batch in self._in_flight.values()), default=now_ns)
            if self._connect_by_ns and now_ns > self._connect_by_ns:
                link.end(f"no answer within {CONNECT_DEADLINE_S:.0f} s; is a receiver running there?")
            elif now_ns - oldest_ns > ANSWER_DEADLINE_S * clock.NS_PER_S:
                link.end(f"an acknowledgement is overdue by {ANSWER_DEADLINE_S:.0f} s")
            elif self._dialect is not None and now_ns - self._last_sent_ns > KEEPALIVE_S * clock.NS_PER_S:
                self._last_sent_ns = now_ns
                link.keep_alive()

    # The records.

    def _on_doorbell(self) -> None:
        os.eventfd_read(self._spec.doorbell)
        if sum(lane.unread_bytes() for lane in self._lanes.values()) >= self._spec.batch.max_bytes:
            self._pump()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(self._spec.batch.max_age, self._pump)

    def _pump(self) -> None:
        """Send batches until there is nothing to send or no room in flight."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._link is None or self._dialect is None or not self._dialect.is_ready:
            return
        batch = self._spec.batch
        while len(self._in_flight) < MAX_IN_FLIGHT_BATCHES and self._in_flight_bytes < MAX_IN_FLIGHT_BYTES:
            self._turn.rotate(-1)
            portions = gather([self._lanes[n] for n in self._turn], batch.max_records, batch.max_bytes, clock.now_ns())
            if not portions:
                break
            self._send(portions)
        self._drop_finished()

    def _send(self, portions: list[Portion]) -> None:
        assert self._link is not None and self._dialect is not None
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        sent_bytes = self._dialect.send(self._link, batch_id, portions, clock.wall_ns())
        self._last_sent_ns = clock.now_ns()
        self._in_flight[batch_id] = InFlight(portions, sent_bytes, self._last_sent_ns)
        self._in_flight_bytes += sent_bytes
        self._sent_bytes += sent_bytes

    def _settle(self, answers: list[Answer]) -> None:
        for answer in answers:
            batch = self._in_flight.pop(answer.batch_id, None)
            if batch is None:
                log.warning("the server acknowledged batch %d, which is not in flight", answer.batch_id)
                continue
            self._in_flight_bytes -= batch.bytes
            for portion in batch.portions:
                rejected = answer.rejected.get((portion.lane.plugin, portion.lane.epoch), 0)
                portion.lane.settle(portion, min(rejected, portion.record_count))
        if answers:
            self._settled.set()
            self._drop_finished()
            if self._flush is None and any(lane.unread_bytes() for lane in self._lanes.values()):
                self._pump()

    def _drop_finished(self) -> None:
        for number, lane in list(self._lanes.items()):
            if lane.is_drained():
                lane.conclude()
                self._forget(number)
            elif lane.is_faulted:
                self._forget(number)

    def _forget(self, number: int) -> None:
        del self._lanes[number]
        self._turn.remove(number)
        for view in self._memory.pop(number):
            unmap_memory(view)

    # The supervisor.

    def _take_orders(self) -> None:
        while True:
            try:
                order = channel.receive(self._spec.orders)
            except BlockingIOError:
                return
            if order is None:
                log.warning("the supervisor is gone")
                asyncio.get_running_loop().remove_reader(self._spec.orders.fileno())
                self._stop(ORPHAN_TIMEOUT_S)
                return
            self._obey(*order)

    def _obey(self, order: channel.Order, fds: list[int]) -> None:
        match order.op:
            case "attach":
                self._attach(order, *fds)
            case "close" if order.ring in self._lanes:
                self._lanes[order.ring].is_closed = True
                self._pump()
                self._drop_finished()
            case "stop":
                self._stop(order.timeout_s)

    def _attach(self, order: channel.Order, producer_fd: int, consumer_fd: int) -> None:
        producer = map_memory(producer_fd, producer_bytes(order.size_bytes), writable=False)
        consumer = map_memory(consumer_fd, CONSUMER_BYTES, writable=True)
        os.close(producer_fd)
        os.close(consumer_fd)
        self._memory[order.ring] = [producer, consumer]
        self._lanes[order.ring] = Lane(order.plugin, order.epoch, Consumer(producer, consumer, order.size_bytes))
        self._turn.append(order.ring)

    def _stop(self, timeout_s: float) -> None:
        self._stop_timeout_s = timeout_s
        self._stopping.set()

    def _show(self, state: LinkState, address: str, detail: str) -> None:
        changed = state is not self._state.state
        self._state = LinkReport(
            state=state,
            address=address,
            since_ns=clock.wall_ns() if changed else self._state.since_ns,
            rtt_us=self._link.rtt_us if self._link is not None and state is LinkState.CONNECTED else 0,
            sent_bytes=self._sent_bytes,
            alive_ns=clock.now_ns(),
            detail=detail,
        )
        self._spec.report.publish(self._state.encode())
