"""The body of the sender process: rings in, batches out, acknowledgements back to the tails.

Runs after the drop of every privilege. Owns the event loop, the lanes and what is in flight; `connector` keeps the
connection, `backlog` the spool. While a server acknowledges, nothing touches the disk; while none does, or a ring is
over half full, records go to the spool and their rings are free again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kon_agent import channel, clock, logs
from kon_agent.errors import KonError
from kon_agent.linkreport import LinkReport
from kon_agent.linux.memory import map_memory, unmap_memory
from kon_agent.ring import CONSUMER_BYTES, Consumer, producer_bytes
from kon_agent.sender.backlog import Backlog
from kon_agent.sender.connector import Connector
from kon_agent.sender.dialect import Answer
from kon_agent.sender.lane import Lane, Portion, gather
from kon_agent.spec import SenderSpec

log = logging.getLogger(__name__)

MAX_IN_FLIGHT_BATCHES = 8
MAX_IN_FLIGHT_BYTES = 1024 * 1024  # the receiver's flow-control window: more would only wait in aioquic
RESERVED_BATCHES = 2  # of those in flight the backlog leaves for what is new
OFFLINE_AFTER_S = 2.0  # a start or a short reconnection writes nothing to disk
SHELVE_RECORDS = 10_000  # per write to the spool; the bytes bind first
SHELVE_BYTES = 256 * 1024
ORPHAN_WAIT_S = 0.2  # after the supervisor's death, until the kernel has killed the workers too
TICK_S = 1.0  # how often deadlines are looked at and a sign of life is shown


@dataclass(frozen=True, slots=True)
class InFlight:
    """A batch on its way: how much it weighs, when it left, and whom to tell once it is answered."""

    bytes: int
    sent_ns: int
    settle: Callable[[Mapping[tuple[str, int], int]], None]


def main(spec: SenderSpec) -> int:
    """Deliver until told to stop; return the process's exit code."""
    logs.setup("sender", spec.log.level, spec.log.format)
    logging.getLogger("quic").setLevel(logging.ERROR)  # aioquic tells of every attempt; `Connector` does already
    try:
        return asyncio.run(Sender(spec).run())
    except KonError as err:
        log.error("%s", err)
        spec.report.publish(LinkReport(since_ns=clock.wall_ns(), alive_ns=clock.now_ns(), detail=str(err)).encode())
        return err.exit_code
    except Exception:
        traceback.print_exc()
        return os.EX_SOFTWARE


class Sender:
    """Every lane, the backlog, and what is in flight of both. A `connector.Client`."""

    def __init__(self, spec: SenderSpec) -> None:
        self._spec = spec
        self._lanes: dict[int, Lane] = {}
        self._turn: deque[int] = deque()  # ring numbers in the order they are served, for fairness
        self._memory: dict[int, list[memoryview]] = {}
        self._sizes: dict[int, int] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._next_batch_id = 1
        self._flush: asyncio.TimerHandle | None = None
        self._offline_since_ns = clock.now_ns()
        self._backlog = Backlog(spec.spool, spec.plugins)
        self._shelve_bytes = min(
            SHELVE_BYTES, spec.spool.limits.segment_bytes // 2
        )  # a small quota's segments are small
        self._connector = Connector(spec, has_backlog=True, client=self)
        self._stopping = asyncio.Event()
        self._stop_timeout_s = 0.0
        self._is_orphan = False
        self._failure: BaseException | None = None
        self._settled = asyncio.Event()

    async def run(self) -> int:
        """Serve the lanes until stopped; then deliver what can be and keep the rest."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_error)
        self._backlog.open(clock.wall_ns() / clock.NS_PER_S)
        loop.add_reader(self._spec.orders.fileno(), self._take_orders)
        loop.add_reader(self._spec.doorbell, self._on_doorbell)
        connecting = loop.create_task(self._connector.run())
        ticking = loop.create_task(self._tick())
        stopped = loop.create_task(self._stopping.wait())
        await asyncio.wait({connecting, ticking, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if self._failure is not None:
            raise self._failure
        for task in (connecting, ticking):
            if task.done():
                task.result()  # neither ends by itself: raise what ended it
        await self._finish()
        for task in (connecting, ticking):
            task.cancel()
        self._connector.end("the agent stops")
        return os.EX_OK

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a callback: crash rather than limp; a successor finds everything in the rings."""
        self._failure = context.get("exception") or RuntimeError(context["message"])
        self._stopping.set()

    # Ending.

    async def _finish(self) -> None:
        self._backlog.insist()
        if self._is_orphan:
            self._shelve(self._lanes.values())
            await asyncio.sleep(ORPHAN_WAIT_S)
            for lane in self._lanes.values():
                lane.is_closed = True
        else:
            await self._deliver_rest()
        self._backlog.insist()
        self._shelve(self._lanes.values())
        self._backlog.close()
        rest = sum(lane.used_bytes() for lane in self._lanes.values())
        if rest:
            log.error("%d bytes of records could neither be delivered nor kept", rest)

    async def _deliver_rest(self) -> None:
        """Deliver what is in the rings, as long as there is somebody to deliver it to."""
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                while self._connector.is_connected and any(lane.used_bytes() for lane in self._lanes.values()):
                    self._settled.clear()
                    self._pump()
                    await self._settled.wait()
        except TimeoutError:
            log.warning("the rest is not acknowledged in time and goes to the spool")

    # The connection's events: `connector.Client`.

    def on_ready(self) -> None:
        """Send what waits, the new before the old."""
        self._offline_since_ns = 0
        self._pump()

    def on_answers(self, answers: list[Answer]) -> None:
        """Settle batches and fill the room they leave."""
        for answer in answers:
            batch = self._in_flight.pop(answer.batch_id, None)
            if batch is None:
                log.warning("the server acknowledged batch %d, which is not in flight", answer.batch_id)
            else:
                batch.settle(answer.rejected)
        self._settled.set()
        self._drop_finished()
        self._pump_backlog()
        if self._flush is None and any(lane.unread_bytes() for lane in self._lanes.values()):
            self._pump()

    def on_lost(self) -> None:
        """Forget what was in flight: it is still in the rings and in the spool."""
        self._offline_since_ns = self._offline_since_ns or clock.now_ns()
        self._in_flight.clear()
        for lane in self._lanes.values():
            lane.rewind()
        self._backlog.lose_connection()
        self._settled.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_ns = clock.now_ns()
            self._connector.tick(now_ns, min((batch.sent_ns for batch in self._in_flight.values()), default=None))
            if self._is_offline(now_ns):
                self._shelve(self._lanes.values())
            elif self._flush is None and any(lane.unread_bytes() for lane in self._lanes.values()):
                self._pump()  # a doorbell that was not heard, or a record that was not visible yet
            self._backlog.retry(now_ns, clock.wall_ns() / clock.NS_PER_S)
            self._backlog.show(self._connector.is_connected)

    def _is_offline(self, now_ns: int) -> bool:
        return bool(self._offline_since_ns) and now_ns - self._offline_since_ns > OFFLINE_AFTER_S * clock.NS_PER_S

    # The records.

    def _on_doorbell(self) -> None:
        try:
            os.eventfd_read(self._spec.doorbell)
        except BlockingIOError:  # a worker can read its doorbell too; what it has published is found all the same
            log.debug("somebody else answered the doorbell")
        crowded = [lane for number, lane in self._lanes.items() if lane.used_bytes() * 2 > self._sizes[number]]
        if crowded:
            self._shelve(crowded)
        if sum(lane.unread_bytes() for lane in self._lanes.values()) >= self._spec.batch.max_bytes:
            self._pump()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(self._spec.batch.max_age, self._pump)

    def _shelve(self, lanes: Iterable[Lane]) -> None:
        """Move everything in `lanes` to the spool; what of it was in flight may arrive twice, and is refused then."""
        for lane in list(lanes):
            if self._backlog.is_resting(clock.now_ns()):
                break  # before any rewind: what is in flight would never be answered
            lane.rewind()
            while portions := gather([lane], SHELVE_RECORDS, self._shelve_bytes, clock.now_ns()):
                if not self._backlog.keep(portions, clock.now_ns(), clock.wall_ns() / clock.NS_PER_S):
                    lane.rewind()
                    break
                for portion in portions:
                    lane.shelve(portion)
        self._drop_finished()

    def _pump(self) -> None:
        """Send batches until there is nothing to send or no room in flight."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        batch = self._spec.batch
        while self._connector.is_ready(is_backlog=False) and self._has_room(MAX_IN_FLIGHT_BATCHES):
            self._turn.rotate(-1)
            portions = gather([self._lanes[n] for n in self._turn], batch.max_records, batch.max_bytes, clock.now_ns())
            if not portions:
                break
            self._send_live(portions)
        self._pump_backlog()
        self._drop_finished()

    def _pump_backlog(self) -> None:
        batch = self._spec.batch
        while (
            self._backlog.has_unread()
            and self._connector.is_ready(is_backlog=True)
            and self._has_room(MAX_IN_FLIGHT_BATCHES - RESERVED_BATCHES)
        ):
            taken = self._backlog.take(batch.max_records, batch.max_bytes)
            if taken is None:
                break
            sent = self._connector.send(self._next_batch_id, taken.parcels, is_backlog=True)
            self._note(sent, functools.partial(self._backlog.settle, taken))

    def _has_room(self, batches: int) -> bool:
        in_flight = self._in_flight.values()
        return len(in_flight) < batches and sum(batch.bytes for batch in in_flight) < MAX_IN_FLIGHT_BYTES

    def _send_live(self, portions: list[Portion]) -> None:
        def settle(rejected: Mapping[tuple[str, int], int]) -> None:
            for portion in portions:
                refused = rejected.get((portion.plugin, portion.epoch), 0)
                portion.lane.settle(portion, min(refused, portion.record_count))

        self._note(self._connector.send(self._next_batch_id, portions, is_backlog=False), settle)

    def _note(self, sent_bytes: int, settle: Callable[[Mapping[tuple[str, int], int]], None]) -> None:
        self._in_flight[self._next_batch_id] = InFlight(sent_bytes, clock.now_ns(), settle)
        self._next_batch_id += 1

    def _drop_finished(self) -> None:
        for number, lane in list(self._lanes.items()):
            if lane.is_drained():
                lane.conclude()
                self._forget(number)
            elif lane.is_faulted:
                self._forget(number)

    def _forget(self, number: int) -> None:
        del self._lanes[number], self._sizes[number]
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
                log.warning("the supervisor is gone: what is in the rings goes to the spool")
                asyncio.get_running_loop().remove_reader(self._spec.orders.fileno())
                self._is_orphan = True
                self._stopping.set()
                return
            self._obey(*order)

    def _obey(self, order: channel.Order, fds: list[int]) -> None:
        match order.op:
            case "attach":
                self._attach(order, *fds)
            case "close" if order.ring in self._lanes:
                self._lanes[order.ring].is_closed = True
                self._pump()
            case "stop":
                self._stop_timeout_s = order.timeout_s
                self._stopping.set()

    def _attach(self, order: channel.Order, producer_fd: int, consumer_fd: int) -> None:
        producer = map_memory(producer_fd, producer_bytes(order.size_bytes), writable=False)
        consumer = map_memory(consumer_fd, CONSUMER_BYTES, writable=True)
        os.close(producer_fd)
        os.close(consumer_fd)
        self._backlog.know(order.plugin)
        lane = Lane(order.plugin, order.epoch, Consumer(producer, consumer, order.size_bytes))
        lane.skip_spooled(self._backlog.highest().get((order.plugin, order.epoch), -1), clock.now_ns())
        self._memory[order.ring] = [producer, consumer]
        self._sizes[order.ring] = order.size_bytes
        self._lanes[order.ring] = lane
        self._turn.append(order.ring)
