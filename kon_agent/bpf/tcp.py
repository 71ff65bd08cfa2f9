"""The rows of ebpf/kon_tcp.bpf.c: what they are, and how to read them. Mirrors ebpf/kon_tcp.h.

row     opened, accepted, closed, failed[6], aborted[5], retransmits[2], resets sent, resets received,
        then the histograms connect and rtt: sum, buckets[22]; u64 each, one row per CPU
"""

from __future__ import annotations

from dataclasses import dataclass

from kon_agent.bpf import netns
from kon_agent.bpf.rows import WORD_BYTES, ProbeSpec, sum_rows

FAILURES = ("refused", "timeout", "reset", "unreachable", "abandoned", "other")
ABORTS = ("reset", "timeout", "unreachable", "local", "other")
RETRANSMITS = ("syn", "data")
FIRST_BOUND = 6  # log2 of microseconds
BUCKETS = 22
ROW_BYTES = 512
SETTINGS_BYTES = 8

BOUNDS_S = tuple(2**exponent / 1e6 for exponent in range(FIRST_BOUND, FIRST_BOUND + BUCKETS - 1))
"""Upper bounds of all buckets but the last, in seconds."""

SENT_RESETS, RECEIVED_RESETS = "kon_tcp_rst_tx", "kon_tcp_rst_rx"
"""Programs without which that much is not counted."""

SPEC = ProbeSpec(
    "kon_tcp",
    ROW_BYTES,
    optional=frozenset({"kon_tcp_synack", SENT_RESETS, RECEIVED_RESETS}),
    settings_bytes=SETTINGS_BYTES,
    settings=netns.settings,
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """One histogram: what was measured, added up in seconds, and how many were in each bucket alone."""

    total_s: float
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Counts:
    """Everything counted since the load, over all CPUs. `failed`, `aborted` and `retransmits` are by reason or kind."""

    opened: int
    accepted: int
    closed: int
    failed: dict[str, int]
    aborted: dict[str, int]
    retransmits: dict[str, int]
    resets_sent: int
    resets_received: int
    connect: Histogram
    rtt: Histogram


def read(rows: memoryview) -> Counts:
    """Return the counts of mapped rows.

    Raises:
        BpfError: these are not that object's rows.
    """
    columns = iter(sum_rows(rows, ROW_BYTES, 0, SPEC.cpus_of(rows)))
    return Counts(
        opened=next(columns),
        accepted=next(columns),
        closed=next(columns),
        failed={reason: next(columns) for reason in FAILURES},
        aborted={reason: next(columns) for reason in ABORTS},
        retransmits={kind: next(columns) for kind in RETRANSMITS},
        resets_sent=next(columns),
        resets_received=next(columns),
        connect=Histogram(next(columns) / 1e9, [next(columns) for _ in range(BUCKETS)]),
        rtt=Histogram(next(columns) / 1e6, [next(columns) for _ in range(BUCKETS)]),
    )


COLUMNS = 5 + len(FAILURES) + len(ABORTS) + len(RETRANSMITS) + 2 * (1 + BUCKETS)
assert ROW_BYTES == COLUMNS * WORD_BYTES, "a row is its columns"
