"""The `load` collector: how many tasks there are and want to run, what the scheduler has done since boot, open files.

Sources: /proc/loadavg, /proc/stat, /proc/uptime and /proc/sys/fs/file-nr (proc(5)). The kernel counts tasks, that is
threads: `load_forks_total` counts new threads too, and a load of 1 is one task that runs or waits for a disk.

A file that this /proc mount does not have (`subset=pid`) takes only its own metrics with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kon_agent.config.schema import LoadConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

Values = dict[str, float]

_STAT_LINES = {
    b"procs_running": "load_processes_running",
    b"procs_blocked": "load_processes_blocked",
    b"processes": "load_forks_total",
    b"ctxt": "load_context_switches_total",
    b"btime": "load_boot_time_seconds",
}
_CPUS = "cpus"  # no metric: what the load is divided by


class Load:
    """Report the load averages and the counts of tasks, forks, context switches and open files."""

    def __init__(self, config: LoadConfig, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        """Return the values of this moment.

        Raises:
            NoData: this /proc has none of the files.
        """
        values: Values = {}
        for path, parse in _FILES.items():
            values |= self._read(path, parse)
        if not values:
            raise NoData(f"{self._context.path('/proc')} has none of the files {', '.join(_FILES)}")
        cpus = values.pop(_CPUS, 0)
        if cpus and "load1" in values:
            values["load1_per_cpu"] = values["load1"] / cpus
        return [Metric(name, value) for name, value in values.items()]

    def _read(self, path: str, parse: Callable[[bytes], Values]) -> Values:
        try:
            return parse(procfs.read(self._context, path))
        except NoData:
            return {}


def _parse_loadavg(text: bytes) -> Values:
    """Return the load averages and the number of threads, from `0.20 0.18 0.12 1/80 11206`."""
    load1, load5, load15, tasks = text.split()[:4]
    threads = tasks.partition(b"/")[2]
    return {"load1": float(load1), "load5": float(load5), "load15": float(load15), "load_threads": float(threads)}


def _parse_stat(text: bytes) -> Values:
    """Return the counts of _STAT_LINES, and the processors that are online: a `cpuN` line each."""
    values: Values = {_CPUS: 0.0}
    for line in text.split(b"\n"):
        key, _, number = line.partition(b" ")
        if key in _STAT_LINES:
            values[_STAT_LINES[key]] = float(number)
        elif key.startswith(b"cpu") and key != b"cpu":
            values[_CPUS] += 1
    return values


def _parse_uptime(text: bytes) -> Values:
    return {"load_uptime_seconds": float(text.split()[0])}


def _parse_file_nr(text: bytes) -> Values:
    """Return the open files of the machine and their limit; the middle column is 0 since Linux 2.6 (proc(5))."""
    allocated, _, maximum = text.split()
    return {"load_file_descriptors_allocated": float(allocated), "load_file_descriptors_maximum": float(maximum)}


_FILES: dict[str, Callable[[bytes], Values]] = {
    "/proc/loadavg": _parse_loadavg,
    "/proc/stat": _parse_stat,
    "/proc/uptime": _parse_uptime,
    "/proc/sys/fs/file-nr": _parse_file_nr,
}
