"""The two clocks: one to schedule by, one to stamp records with.

Schedules, deadlines and rates use CLOCK_BOOTTIME, which never steps and counts suspended time (clock_gettime(2)).
Only a record's time stamp is wall time. Both are nanoseconds as `int`.
"""

from __future__ import annotations

import time

NS_PER_S = 1_000_000_000


def now_ns() -> int:
    """Return the scheduling clock: nanoseconds since boot, never stepping."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wall_ns() -> int:
    """Return wall time as nanoseconds since the epoch, for record time stamps only."""
    return time.time_ns()
