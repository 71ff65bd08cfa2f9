"""The replacement of every child by one that runs the present code, after an upgrade (docs/adr/0012).

First the sender, so that no sender is ever given a ring of code newer than its own; then one worker after the other,
each between two of its ticks.

Invariant: a worker is asked to end when it has just kept a tick, or when the next one is far enough away for its
successor to keep it. It is killed only if it does not end in its own good time: a killed worker may lose a record.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from kon_agent import __version__
from kon_agent.clock import NS_PER_S
from kon_agent.control_protocol import Upgraded
from kon_agent.lifecycle import State
from kon_agent.ring import Pulse
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.courier import Courier
from kon_agent.supervisor.handover import Handover
from kon_agent.supervisor.unit import Unit

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.02  # short against the shortest period (100 ms)
FRESH_NS = 60_000_000  # a tick that ended within three looks has just ended
ROOM_NS = 3 * NS_PER_S // 2  # a successor is there within a third of a second and ticks within a second more
WORKER_GRACE_S = 10.0  # a cycle that has begun is finished; the usual grace would cost the record being written


class Renewal:
    """The replacement of every child that still runs the old code.

    Args:
        taken: what was taken over.
        courier: the sender, adopted.
        units: the plugins, adopted; the table as it is at any time.
        counters: what has become of the BPF programs.
        now_ns: the scheduling clock.
    """

    def __init__(
        self, taken: Handover, courier: Courier, units: Mapping[str, Unit], counters: str, now_ns: int
    ) -> None:
        self._before = taken.version
        self._courier = courier
        self._units = units
        self._counters = counters
        self._began_ns = now_ns
        self._ended_ns = 0
        self._old_sender = courier.pid
        self._old_workers = {name: unit.pid for name, unit in units.items() if unit.pid is not None}
        self._replaced: list[str] = []
        self._missed: dict[str, int] = {}
        self._current = ""
        self._last_tick_ns = 0

    @property
    def is_over(self) -> bool:
        """Whether all is done."""
        return bool(self._ended_ns)

    def outcome(self) -> Upgraded | None:
        """Return how it went, once it is over."""
        if not self._ended_ns:
            return None
        troubled = {
            name: unit.obstacle or unit.pause_reason or unit.last_exit or unit.lifecycle.state.value
            for name, unit in self._units.items()
            if name in self._replaced and unit.is_wanted and unit.lifecycle.state is not State.RUNNING
        }
        return Upgraded(
            before=self._before,
            after=__version__,
            pid=os.getpid(),
            replaced=self._replaced,
            missed_ticks=self._missed,
            troubled=troubled,
            counters=self._counters,
            took_s=round((self._ended_ns - self._began_ns) / NS_PER_S, 3),
        )

    def advance(self, now_ns: int) -> None:
        """Do what is to be done now: one process at a time, the next one when its predecessor's successor runs."""
        if self.is_over or not self._is_sender_renewed(now_ns):
            return
        if self._current and not self._conclude(now_ns):
            return
        waiting = [name for name, pid in self._old_workers.items() if self._is_old(name, pid)]
        if not waiting:
            self._ended_ns = now_ns
            log.info("upgrade: every process runs kon-agent %s now", __version__)
            return
        for name in waiting:
            unit = self._units[name]
            if is_between_ticks(unit.pulse(), unit.period_s, now_ns):
                self._current, self._last_tick_ns = name, _tick_ns(unit.pulse())
                unit.renew(now_ns, WORKER_GRACE_S)
                return

    def _is_old(self, name: str, pid: int) -> bool:
        return name in self._units and self._units[name].pid == pid

    def _is_sender_renewed(self, now_ns: int) -> bool:
        courier = self._courier
        if self._old_sender is None:
            return True
        if courier.pid == self._old_sender:
            if courier.lifecycle.state is not State.STOPPING:
                courier.renew(now_ns, courier.stop_grace_s)
            return False
        return _is_settled(courier, now_ns)

    def _conclude(self, now_ns: int) -> bool:
        """Return whether the one being replaced is done with."""
        unit = self._units.get(self._current)
        if unit is not None:
            if unit.pid == self._old_workers[self._current] or not _is_settled(unit, now_ns):
                return False
            missed = missed_between(self._last_tick_ns, _tick_ns(unit.pulse()) or now_ns, unit.period_s)
            if missed:
                unit.count_missed(missed)
                self._missed[self._current] = missed
            self._replaced.append(self._current)
        self._current = ""
        return True


def is_between_ticks(pulse: Pulse, period_s: float, now_ns: int) -> bool:
    """Return whether a worker that is asked to end now misses no tick, or no more than it must."""
    if not pulse.heartbeat_ns:
        return False  # its first one is about to come
    return now_ns - pulse.heartbeat_ns <= FRESH_NS or _tick_ns(pulse) + period_s * NS_PER_S - now_ns >= ROOM_NS


def missed_between(last_ns: int, next_ns: int, period_s: float) -> int:
    """Return how many ticks there should have been between these two."""
    return max(0, int((next_ns - last_ns) / (period_s * NS_PER_S)) - 1)


def _tick_ns(pulse: Pulse) -> int:
    """Return when the latest cycle began; 0: there was none."""
    return pulse.heartbeat_ns - min(pulse.collect_ns, pulse.heartbeat_ns)


def _is_settled(process: Supervised, now_ns: int) -> bool:
    """Return whether nothing more is to be expected of it for now: it runs, or it rests."""
    if process.child is None:
        return not process.is_due(now_ns)
    return process.lifecycle.state is State.RUNNING
