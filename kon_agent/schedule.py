"""A drift-free schedule: ticks at fixed multiples of a period from one origin.

Pure: the clock comes in as an argument. A tick that could not be kept is skipped and counted, never caught up, so a
slow cycle causes no burst.
"""

from __future__ import annotations

FIRST_TICK_MAX_NS = 1_000_000_000  # a new collector's first figures come within a second, however long its period


class Schedule:
    """The ticks of one collector.

    Args:
        period_ns: time between ticks.
        origin_ns: now; the first tick comes one period later, at most FIRST_TICK_MAX_NS.
    """

    def __init__(self, period_ns: int, origin_ns: int) -> None:
        self.period_ns = period_ns
        self.due_ns = origin_ns + min(period_ns, FIRST_TICK_MAX_NS)
        self.missed = 0

    def set_period(self, period_ns: int, now_ns: int) -> None:
        """Tick every `period_ns` from the last tick on; a tick that would already have been comes now."""
        self.due_ns = max(now_ns, self.due_ns - self.period_ns + period_ns)
        self.period_ns = period_ns

    def advance(self, now_ns: int) -> None:
        """Go on to the first tick after `now_ns`; count those that have passed meanwhile as missed."""
        late = max(0, now_ns - self.due_ns) // self.period_ns
        self.missed += late
        self.due_ns += (late + 1) * self.period_ns
