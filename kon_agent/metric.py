"""A metric: one named value with labels at one moment. The noun every collector produces."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec


class MetricType(enum.IntEnum):
    """The wire's `MetricType`; 0 to 3 are the original's numbers, the rest are ours."""

    CPU_USAGE = 0
    MEMORY_USAGE = 1
    NETWORK_PACKETS = 2
    EBPF_RAW = 3
    DISK_USAGE = 4
    AGENT_TELEMETRY = 5
    OTHER = 6


class Metric(msgspec.Struct, frozen=True):
    """One value of one time series.

    Attributes:
        name: the metric's name, `[a-z_][a-z0-9_]*`, unit as its suffix.
        value: the value, in the unit the name ends with.
        labels: label name to label value; the series' identity together with the name.
        type: the wire's coarse kind.
        ts_ns: wall time, nanoseconds since the epoch; 0 = the worker stamps it with its cycle's time.
    """

    name: str
    value: float
    labels: Mapping[str, str] = {}
    type: MetricType = MetricType.OTHER
    ts_ns: int = 0
