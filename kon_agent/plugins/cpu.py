"""The `cpu` collector: how the processors spent the interval since the last cycle, and the load averages.

Source: /proc/stat and /proc/loadavg (proc(5)). The kernel counts ticks since boot; a usage is the share of
one mode in the ticks that passed between two readings, so the first reading is taken in `start()`, before the
first cycle.

Invariants:
* The modes of one processor, idle included, sum to 100. `guest` and `guest_nice` are no modes of their own:
  the kernel has already counted them in `user` and `nice` (account_guest_time), and adding them would count
  them twice.
* No percentage is negative: a counter that went backwards (`iowait` may, proc(5); `idle` does around hotplug)
  counts as standing still.
* A core that was not there at the last cycle is reported from the next one on; one that is gone, no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from kon_agent.config.schema import CpuConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
"""The columns of a `cpu` line, in the kernel's order; older kernels have fewer."""

LOADS = ("cpu_load1", "cpu_load5", "cpu_load15")

_IDLE_MODES = (MODES.index("idle"), MODES.index("iowait"))
_WHOLE_MACHINE = ""

Ticks = tuple[int, ...]
"""One processor's ticks since boot, by mode in the order of MODES."""


class Cpu:
    """Report `cpu_usage_percent{mode}` over the interval, and `cpu_load1|5|15`; each core if `per_core`."""

    def __init__(self, config: CpuConfig, context: Context) -> None:
        self._per_core = config.per_core
        self._context = context
        self._before: dict[str, Ticks] = {}

    def start(self) -> None:
        """Take the baseline, so that the first cycle already reports a real interval."""
        self._before = self._read_stat()

    def collect(self) -> Iterable[Metric]:
        """Return the load averages, and the usage of every processor that ticked since the last call.

        Raises:
            NoData: the kernel's /proc has no stat or loadavg.
        """
        before, self._before = self._before, self._read_stat()
        metrics = self._read_loads()
        for cpu, ticks in self._before.items():
            shares = _percentages(before[cpu], ticks) if cpu in before else ()
            if not shares:
                continue
            busy = sum(share for mode, share in enumerate(shares) if mode not in _IDLE_MODES)
            metrics += (
                Metric("cpu_usage_percent", value, labels, MetricType.CPU_USAGE)
                for labels, value in zip(_labels(cpu), (busy, *shares), strict=False)
            )
        return metrics

    def _read_stat(self) -> dict[str, Ticks]:
        return _parse_stat(procfs.read(self._context, "/proc/stat"), self._per_core)

    def _read_loads(self) -> list[Metric]:
        loads = procfs.read(self._context, "/proc/loadavg").split(None, len(LOADS))
        return [Metric(name, float(load), {}, MetricType.CPU_USAGE) for name, load in zip(LOADS, loads, strict=False)]


def _parse_stat(text: bytes, per_core: bool) -> dict[str, Ticks]:
    """Return the ticks of the whole machine under "" and, `per_core`, of each core under its number."""
    ticks: dict[str, Ticks] = {}
    # The machine's line comes first, the cores' follow; the long interrupt counts after them are not looked
    # at.
    for line in text.split(b"\n", -1 if per_core else 1):
        if not line.startswith(b"cpu"):
            break
        fields = line.split()
        ticks[fields[0][3:].decode()] = tuple(map(int, fields[1 : 1 + len(MODES)]))
        if not per_core:
            break
    return ticks


def _percentages(before: Ticks, after: Ticks) -> tuple[float, ...]:
    """Return each mode's share of the ticks between two readings, in percent; nothing where none passed."""
    passed = [max(0, late - early) for early, late in zip(before, after, strict=False)]
    total = sum(passed)
    return tuple(100.0 * ticks / total for ticks in passed) if total else ()


@functools.cache
def _labels(cpu: str) -> tuple[dict[str, str], ...]:
    """Return the labels of a processor's values: its total, then its modes."""
    core = {} if cpu == _WHOLE_MACHINE else {"cpu": cpu}
    return tuple({"mode": mode, **core} for mode in ("total", *MODES))
