"""Histograms of durations as the kernel's side keeps them: the layout of ebpf/kon_latency.h, said again.

latency: bucket[BUCKETS], sum in ns    as u64; bucket i: at most BOUNDS_S[i]; the last one: more than all bounds
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kon_agent.clock import NS_PER_S

BUCKETS = 22
LATENCY_WORDS = BUCKETS + 1
BOUNDS_S = tuple(2**exponent / 1e6 for exponent in range(BUCKETS - 1))
"""1 µs, 2 µs, … 1.048576 s."""


class Latency(NamedTuple):
    """One histogram.

    Attributes:
        counts: how many durations there were in each of the BUCKETS, not cumulative.
        total_s: the sum of all, in seconds.
    """

    counts: Sequence[int]
    total_s: float


def latency_of(columns: Sequence[int], first: int = 0) -> Latency:
    """Return the histogram that begins at column `first` of a row, or of a sum of rows."""
    return Latency(columns[first : first + BUCKETS], columns[first + BUCKETS] / NS_PER_S)
