"""The body of a worker process: one collector, on its schedule, into its ring.

Runs after the drop of every privilege. Owns the loop: wait for the tick, collect, encode, publish, ring the sender's
doorbell, beat. It crashes rather than limps: an exception of the collector ends the process with its reason left in the
ring's last words, and the supervisor decides what comes next.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import traceback
from collections.abc import Iterable
from typing import Protocol

from kon_agent import clock, logs
from kon_agent.errors import NoData
from kon_agent.metric import Metric
from kon_agent.plugins.context import Context
from kon_agent.schedule import Schedule
from kon_agent.spec import WorkerSpec
from kon_agent.wire.encode import encode_record

log = logging.getLogger(__name__)

MAX_WAIT_MS = 3_600_000  # poll(2) takes an int of milliseconds: some 24 days; a period may be longer


class Collector(Protocol):
    """What a plugin's class offers; `start` and `stop` are optional."""

    def collect(self) -> Iterable[Metric]:
        """Return one cycle's metrics; raise NoData where there are none."""


def main(spec: WorkerSpec) -> int:
    """Run the collector until told to stop; return the process's exit code."""
    logs.setup(f"worker {spec.name}", spec.log.level, spec.log.format)
    try:
        return Worker(spec).run()
    except Exception as err:
        spec.producer.say(f"{type(err).__name__}: {err}")
        traceback.print_exc()
        return os.EX_SOFTWARE


class Worker:
    """One collector and its loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._producer = spec.producer
        self._doorbell = spec.doorbell
        self._period_ns = int(spec.config.period * clock.NS_PER_S)
        self._wakeup = _wakeup_on(signal.SIGTERM)
        self._unencodable: set[str] = set()
        self._parent_pid = os.getppid()
        module, _, name = spec.target.partition(":")
        self._collector: Collector = getattr(importlib.import_module(module), name)(
            spec.config, Context(grants=spec.grants)
        )

    def run(self) -> int:
        """Collect on schedule until SIGTERM."""
        getattr(self._collector, "start", _nothing)()
        schedule = Schedule(self._period_ns, clock.now_ns())
        while not self._stops_before(schedule.due_ns):
            if os.getppid() != self._parent_pid:  # PDEATHSIG needs the dying parent's CAP_KILL; this needs nothing
                log.warning("the supervisor is gone")
                break
            started_ns = clock.now_ns()
            schedule.advance(started_ns)
            self._cycle()
            ended_ns = clock.now_ns()
            self._producer.beat(ended_ns, ended_ns - started_ns, schedule.missed)
        getattr(self._collector, "stop", _nothing)()
        return os.EX_OK

    def _stops_before(self, due_ns: int) -> bool:
        while True:
            wait_ms = max(0, -((clock.now_ns() - due_ns) // 1_000_000))
            if self._wakeup.poll(min(wait_ms, MAX_WAIT_MS)):
                return True
            if wait_ms <= MAX_WAIT_MS:
                return False

    def _cycle(self) -> None:
        ts_ns = clock.wall_ns()
        published = 0
        try:
            for metric in self._collector.collect():
                published += self._publish(metric, ts_ns)
        except NoData as reason:
            log.debug("no data: %s", reason)
        if published:
            self._ring_doorbell()

    def _publish(self, metric: Metric, ts_ns: int) -> bool:
        try:
            payload = encode_record(metric, ts_ns)
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


def _wakeup_on(*signals: signal.Signals) -> select.poll:
    """Return a poll that becomes readable once one of `signals` has arrived."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd)
    for number in signals:
        signal.signal(number, _nothing)
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    return poll


def _nothing(*_: object) -> None:
    """Do nothing: the wakeup byte is the message."""
