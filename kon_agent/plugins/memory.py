"""The `memory` collector: how much memory and swap is in use, as free(1) counts it.

Source: /proc/meminfo (proc(5)), whose kB are 1024 bytes. Used is total − available, the definition of procps
4: `MemAvailable` is the kernel's own estimate of what a new workload can have without swapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kon_agent.config.schema import MemoryConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

_WANTED = frozenset((b"MemTotal", b"MemFree", b"MemAvailable", b"Buffers", b"Cached", b"SwapTotal", b"SwapFree"))
_LAST_WANTED = b"SwapFree"  # the kernel's order is fixed; the forty lines after it are not looked at


class Memory:
    """Report memory in use, available and in total, and swap in use."""

    def __init__(self, config: MemoryConfig, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        """Return the six values of this moment.

        Raises:
            NoData: the kernel's /proc has no meminfo, or it names no total.
        """
        values = _usage(_parse_meminfo(self._read_meminfo()))
        return [Metric(name, value, {}, MetricType.MEMORY_USAGE) for name, value in values.items()]

    def _read_meminfo(self) -> bytes:
        return procfs.read(self._context, "/proc/meminfo")


def _parse_meminfo(text: bytes) -> dict[bytes, int]:
    """Return the wanted lines' values in bytes by the kernel's name."""
    values: dict[bytes, int] = {}
    for line in text.split(b"\n"):
        name, _, amount = line.partition(b":")
        if name in _WANTED:
            values[name] = int(amount.split(None, 1)[0]) * 1024
            if name == _LAST_WANTED:
                break
    return values


def _usage(meminfo: Mapping[bytes, int]) -> dict[str, float]:
    """Return each metric's value; percentages are of the total, 0 where there is none of it (no swap)."""
    total = meminfo.get(b"MemTotal", 0)
    if not total:
        raise NoData("/proc/meminfo names no MemTotal")
    available = _available(meminfo, total)
    swap_total = meminfo.get(b"SwapTotal", 0)
    swap_used = max(0, swap_total - meminfo.get(b"SwapFree", 0))
    return {
        "memory_usage_percent": 100.0 * (total - available) / total,
        "memory_usage_bytes": total - available,
        "memory_total_bytes": total,
        "memory_available_bytes": available,
        "memory_swap_usage_percent": 100.0 * swap_used / swap_total if swap_total else 0.0,
        "memory_swap_usage_bytes": swap_used,
    }


def _available(meminfo: Mapping[bytes, int], total: int) -> int:
    free = meminfo.get(b"MemFree", 0)
    available = meminfo.get(b"MemAvailable")
    if available is None:
        # Before Linux 3.14: the old free(1)'s "-/+ buffers/cache", too high by what tmpfs holds.
        available = free + meminfo.get(b"Buffers", 0) + meminfo.get(b"Cached", 0)
    # A container may see the host's available memory beside its own total; free(1) falls back the same way.
    return available if available <= total else min(free, total)
