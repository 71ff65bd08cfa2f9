"""The body of a worker process: one collector, on its schedule, into its ring.

Runs after the drop of every privilege. Owns the loop: wait for the tick, collect, encode, publish, ring the sender's
doorbell, beat. It crashes rather than limps: an exception of the collector ends the process with its reason left in the
ring's last words, and the supervisor decides what comes next.

A collector either has `collect()`, called on schedule, or `run(emit)`, an event-style one: the worker waits for it
wherever it yields (`kon_agent.plugins.events`), and beats at each yield and each period of waiting. So one that waits
for an event that never comes is alive, and one that no longer gets to a yield is hung.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import traceback
from typing import Any

from kon_agent import clock, logs
from kon_agent.config.schema import ForeignConfig, PluginConfig
from kon_agent.config.units import format_size
from kon_agent.errors import NoData, PluginError
from kon_agent.linux.clockstate import read_clock_state
from kon_agent.metric import Metric
from kon_agent.plugins.context import Context
from kon_agent.plugins.events import EventRun, Wish
from kon_agent.schedule import Schedule
from kon_agent.spec import WorkerSpec, decode_orders
from kon_agent.wire.encode import encode_record

log = logging.getLogger(__name__)

MAX_WAIT_MS = 3_600_000  # poll(2) takes an int of milliseconds: some 24 days; a period may be longer


def main(spec: WorkerSpec) -> int:
    """Run the collector until told to stop; return the process's exit code."""
    logs.setup(f"worker {spec.name}", spec.log.level, spec.log.format)
    try:
        return Worker(spec).run()
    except Exception as err:
        spec.producer.say(_last_words(err, spec.config))
        traceback.print_exc()
        return os.EX_SOFTWARE


class Worker:
    """One collector and its loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._producer = spec.producer
        self._doorbell = spec.doorbell
        self._orders = spec.orders
        self._wakeup = Wakeup(signal.SIGTERM, signal.SIGUSR1)
        self._unencodable: set[str] = set()
        self._is_clock_unsynced = True  # as far as we know; once it has been set it stays so
        self._parent_pid = os.getppid()
        self._collector = _make(spec)

    def run(self) -> int:
        """Collect on schedule, or as it comes, until SIGTERM."""
        getattr(self._collector, "start", _nothing)()
        if hasattr(self._collector, "run"):
            self._follow(EventRun(lambda: self._collector.run(self._emit)))
        else:
            self._keep_schedule()
        getattr(self._collector, "stop", _nothing)()
        return os.EX_OK

    def _keep_schedule(self) -> None:
        period_ns = self._ordered_period_ns(0)
        schedule = Schedule(period_ns, clock.now_ns())
        while not self._stops_before(schedule):
            if self._is_orphan():
                break
            started_ns = clock.now_ns()
            schedule.advance(started_ns)
            self._cycle()
            ended_ns = clock.now_ns()
            self._producer.beat(ended_ns, ended_ns - started_ns, schedule.missed)

    def _is_orphan(self) -> bool:
        if os.getppid() == self._parent_pid:  # PDEATHSIG needs the dying parent's CAP_KILL; this needs nothing
            return False
        log.warning("the supervisor is gone")
        return True

    def _stops_before(self, schedule: Schedule) -> bool:
        """Wait for the next tick, which an order may move; return whether the worker is to stop instead."""
        while True:
            if schedule.period_ns != (period_ns := self._ordered_period_ns(schedule.period_ns)):
                schedule.set_period(period_ns, clock.now_ns())
            wait_ms = max(0, -((clock.now_ns() - schedule.due_ns) // 1_000_000))
            signals = self._wakeup.wait(min(wait_ms, MAX_WAIT_MS))
            if signal.SIGTERM in signals:
                return True
            if not signals and wait_ms <= MAX_WAIT_MS:
                return False

    def _ordered_period_ns(self, otherwise_ns: int) -> int:
        data = self._orders.read()
        return decode_orders(data) if data is not None else otherwise_ns

    def _look_at_clock(self) -> None:
        if self._is_clock_unsynced:
            self._is_clock_unsynced = not _has_clock_been_set()

    def _cycle(self) -> None:
        self._look_at_clock()
        ts_ns = clock.wall_ns()
        published = 0
        try:
            for metric in self._collector.collect():
                published += self._publish(metric, ts_ns)
        except NoData as reason:
            log.debug("no data: %s", reason)
        if published:
            self._ring_doorbell()

    def _follow(self, events: EventRun) -> None:
        """Let an event-style collector go on from yield to yield."""
        is_ready: bool | None = False
        try:
            while is_ready is not None:
                self._look_at_clock()
                started_ns = clock.now_ns()
                wish = events.resume(is_ready)
                ended_ns = clock.now_ns()
                self._producer.beat(ended_ns, ended_ns - started_ns, 0)
                is_ready = self._grant(wish)
        finally:
            events.close()

    def _grant(self, wish: Wish) -> bool | None:
        """Wait for what a collector waits for; return whether its source is ready, None if the worker is to stop."""
        since_ns = clock.now_ns()
        while not self._is_orphan():
            period_ns = self._ordered_period_ns(clock.NS_PER_S)
            wished_ns = period_ns if wish.seconds is None else int(wish.seconds * clock.NS_PER_S)
            left_ns = since_ns + wished_ns - clock.now_ns()
            wait_ms = max(0, -(-min(left_ns, period_ns) // 1_000_000))
            signals, is_ready = self._wakeup.wait_for(wish.fd, min(wait_ms, MAX_WAIT_MS))
            if signal.SIGTERM in signals:
                return None
            if is_ready or clock.now_ns() - since_ns >= wished_ns:
                return is_ready
            self._producer.beat(clock.now_ns(), 0, 0)
        return None

    def _emit(self, metric: Metric) -> None:
        if self._publish(metric, clock.wall_ns()):
            self._ring_doorbell()

    def _publish(self, metric: Metric, ts_ns: int) -> bool:
        try:
            payload = encode_record(metric, ts_ns, self._is_clock_unsynced)
        except (TypeError, ValueError) as err:
            if metric.name not in self._unencodable:  # once per name: it will be the same every cycle
                self._unencodable.add(metric.name)
                log.warning("metric %r cannot be encoded and is rejected: %s", metric.name, err)
            return self._producer.reject()
        return self._producer.publish(payload)

    def _ring_doorbell(self) -> None:
        try:
            os.eventfd_write(self._doorbell, 1)
        except BlockingIOError:
            log.debug("the doorbell is full: the sender has not looked for 2^64 rings")


class Wakeup:
    """Waits for signals, which a handler turns into bytes in a pipe.

    Args:
        signals: the ones to wait for.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd)
        for number in signals:
            signal.signal(number, _nothing)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, timeout_ms: int) -> bytes:
        """Return the numbers of the signals that have come, as soon as there is one; none once the time is over."""
        return self.wait_for(None, timeout_ms)[0]

    def wait_for(self, source_fd: int | None, timeout_ms: int) -> tuple[bytes, bool]:
        """Return as `wait` does, or as soon as a descriptor is readable; and whether it is.

        A pipe whose writers are gone is not, until the time is over.
        """
        if source_fd is not None:
            self._poll.register(source_fd, select.POLLIN)
        try:
            ready: dict[int | None, int] = dict(self._poll.poll(timeout_ms))
        finally:
            if source_fd is not None:
                self._poll.unregister(source_fd)
        is_readable = bool(ready.get(source_fd, 0) & select.POLLIN)
        if ready and self._fd not in ready and not is_readable:
            return self.wait(timeout_ms), False  # hung up: that would stay so, and whoever asks again be busy with it
        return os.read(self._fd, 256) if self._fd in ready else b"", is_readable


def _last_words(err: Exception, config: PluginConfig) -> str:
    if isinstance(err, PluginError):
        return str(err)
    if isinstance(err, MemoryError):  # says nothing itself
        return f"MemoryError: far above its memory_limit of {format_size(config.memory_limit)}"
    return f"{type(err).__name__}: {err}"


def _make(spec: WorkerSpec) -> Any:
    """Return the collector."""
    context = Context(grants=spec.grants)
    if isinstance(spec.config, ForeignConfig):
        loading = importlib.import_module("kon_agent.plugins.loading")  # what only these workers need
        return loading.make(spec.config, spec.source, context)
    module, _, name = spec.target.partition(":")
    return getattr(importlib.import_module(module), name)(spec.config, context)


def _has_clock_been_set() -> bool:
    """Whether a time service has set the clock; where the kernel does not tell, it is believed to be right."""
    try:
        return read_clock_state().is_synchronized
    except OSError as err:
        log.debug("the clock's state is unknown: %s", err)
        return True


def _nothing(*_: object) -> None:
    """Do nothing: the wakeup byte is the message."""
