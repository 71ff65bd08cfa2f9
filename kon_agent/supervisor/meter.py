"""What every process of the tree costs: CPU over the last interval, and its proportional share of memory.

The supervisor alone may read the others' figures (they are not dumpable). CPU is read at every measurement; PSS, which
makes the kernel walk a process's page tables, at most every PSS_INTERVAL_S.
"""

from __future__ import annotations

from collections.abc import Iterable

from kon_agent.clock import NS_PER_S
from kon_agent.linux import procfs
from kon_agent.telemetry import ProcessSample

PSS_INTERVAL_S = 15.0


class Meter:
    """Remembers the previous measurement of each process."""

    def __init__(self) -> None:
        self.samples: list[ProcessSample] = []
        self._previous: dict[int, tuple[int, float]] = {}
        self._pss: dict[int, tuple[int, int]] = {}

    @property
    def cpu_percent(self) -> float:
        """CPU of the whole tree over the last interval, percent of one core."""
        return sum(sample.cpu_percent for sample in self.samples)

    @property
    def pss_bytes(self) -> int:
        """Memory of the whole tree."""
        return sum(sample.pss_bytes for sample in self.samples)

    def measure(self, processes: Iterable[tuple[str, int]], now_ns: int) -> None:
        """Measure `(name, pid)` of each process; one that has gone meanwhile is left out."""
        self.samples = []
        previous, self._previous = self._previous, {}
        for name, pid in processes:
            try:
                cpu_s = procfs.read_cpu_seconds(pid)
                pss_bytes = self._read_pss(pid, now_ns)
            except OSError:
                continue
            self._previous[pid] = now_ns, cpu_s
            then_ns, then_s = previous.get(pid, (now_ns, cpu_s))
            percent = 100 * NS_PER_S * (cpu_s - then_s) / (now_ns - then_ns) if now_ns > then_ns else 0.0
            self.samples.append(ProcessSample(name, pid, cpu_s, percent, pss_bytes))
        self._pss = {pid: known for pid, known in self._pss.items() if pid in self._previous}

    def _read_pss(self, pid: int, now_ns: int) -> int:
        measured_ns, pss_bytes = self._pss.get(pid, (0, 0))
        if not measured_ns or now_ns - measured_ns >= PSS_INTERVAL_S * NS_PER_S:
            pss_bytes, _ = procfs.read_pss_bytes(pid)
            self._pss[pid] = now_ns, pss_bytes
        return pss_bytes
