"""The `time` collector: whether the wall clock is kept on time, how far it may be off, and when it jumped.

Sources: adjtimex(2), and the two clocks of `kon_agent.clock`. CLOCK_REALTIME and CLOCK_BOOTTIME are disciplined
alike, so that slewing moves both: their difference changes only where the wall clock is set, or a leap second comes.

Invariants:
* A step is counted only where the difference moved by more than STEP_NS beyond what the readings leave uncertain: a
  worker that was held up between two readings of a clock sees no step.
* `time_clock_steps_total` starts at 0 with the worker.
* Where adjtimex is refused (a container's seccomp profile), the clocks are compared all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import msgspec

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import TimeConfig
from kon_agent.linux import clockstate
from kon_agent.metric import Metric
from kon_agent.plugins.context import Context

log = logging.getLogger(__name__)

STEP_NS = 100_000_000
"""A difference below 0.1 s is what time services slew away; they step from 0.128 s (ntpd) or more on."""

_READINGS = 3  # of which the least disturbed counts: to be held up in all of them is most unlikely


class Difference(msgspec.Struct, frozen=True):
    """The wall clock minus the boot clock, in nanoseconds, known to lie between two bounds."""

    low_ns: int
    high_ns: int

    def width_ns(self) -> int:
        """Return how uncertain it is."""
        return self.high_ns - self.low_ns

    def middle_ns(self) -> int:
        """Return the best estimate."""
        return (self.low_ns + self.high_ns) // 2


class Time:
    """Report the state of the clock's synchronization, its errors, and the steps of the wall clock."""

    def __init__(self, config: TimeConfig, context: Context) -> None:
        self._context = context
        self._steps = 0
        self._difference: Difference | None = None

    def start(self) -> None:
        """Take the baseline, so that a step before the first cycle is counted."""
        self._difference = self._read_difference()

    def collect(self) -> Iterable[Metric]:
        """Return the values of this moment."""
        return [Metric(name, float(value)) for name, value in (*self._discipline(), *self._clocks())]

    def _discipline(self) -> Iterator[tuple[str, float]]:
        try:
            state = clockstate.read_clock_state()
        except OSError as err:
            log.debug("no clock state: %s", err)
            return
        yield "time_clock_synchronized", state.is_synchronized
        yield "time_offset_seconds", state.offset_s
        yield "time_frequency_ppm", state.frequency_ppm
        yield "time_maximum_error_seconds", state.max_error_s
        yield "time_estimated_error_seconds", state.estimated_error_s
        yield "time_tai_offset_seconds", state.tai_offset_s

    def _clocks(self) -> Iterator[tuple[str, float]]:
        before, now = self._difference, self._read_difference()
        self._difference = now
        if before is not None and _is_step(before, now):
            self._steps += 1
            moved_s = (now.middle_ns() - before.middle_ns()) / NS_PER_S
            log.warning("the wall clock was set: it moved by %+.3f s", moved_s)
        yield "time_clock_steps_total", self._steps
        yield "time_wall_minus_boot_seconds", now.middle_ns() / NS_PER_S

    def _read_difference(self) -> Difference:
        return min((self._read_once() for _ in range(_READINGS)), key=Difference.width_ns)

    def _read_once(self) -> Difference:
        earliest_ns = self._context.now_ns()
        wall_ns = self._context.wall_ns()
        return Difference(low_ns=wall_ns - self._context.now_ns(), high_ns=wall_ns - earliest_ns)


def _is_step(before: Difference, now: Difference) -> bool:
    """Whether the clocks moved apart by more than STEP_NS, wherever between its bounds either reading lies."""
    return max(now.low_ns - before.high_ns, before.low_ns - now.high_ns) > STEP_NS
