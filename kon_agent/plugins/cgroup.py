"""The `cgroup` collector: what each control group, that is each service and container, uses.

Sources: the hierarchies mounted by /proc/self/mountinfo, version 2 (Documentation/admin-guide/cgroup-v2.rst),
version 1 (Documentation/admin-guide/cgroup-v1/) or both at once. A group is its path below the hierarchy's
mount point; `/` is the whole of it. Under version 1 a group is what has this path in any of the hierarchies.

Invariants:
* A group's figures include those of the groups below it, as the kernel counts them; do not add them up.
* A figure comes from one hierarchy: that of version 1 which has the controller, else version 2's.
* I/O is counted at the disks: device mapper, md and loop devices carry again what the disks below them do.
* Reported are the groups that match, no more than `max_cgroups`, those nearest to the root first and by name
  among equals. How many were left out is reported too.
* A group that goes while it is read has the figures it still gave, or none; it stops nobody.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator

from kon_agent.config.schema import CgroupConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

log = logging.getLogger(__name__)

MAX_FOLDERS = 10_000  # looked into in one cycle, about a tenth of a second; a large container host has some 2000

UNLIMITED_BYTES = 1 << 62  # version 1 says "no limit" by the largest number of whole pages
LOOP_MAJOR = "7:"  # Documentation/admin-guide/devices.txt

US_PER_S = 1e6
NS_PER_S = 1e9

Figures = Iterator[tuple[str, float]]
Read = Callable[[str], bytes]
"""Returns the content of one of a group's files; nothing where it has no such file."""
IsDisk = Callable[[str], bool]
"""Whether the device `major:minor` is one whose I/O no other device carries again."""

_MOUNT = re.compile(r"\S+ \S+ \S+ \S+ (?P<mountpoint>\S+) \S+ (?:\S+ )*?- (?P<fstype>cgroup2?) \S+ (?P<options>\S+)")


class Cgroup:
    """Report CPU, memory, I/O and tasks of the control groups that the configuration chooses."""

    def __init__(self, config: CgroupConfig, context: Context) -> None:
        self._config = config
        self._context = context
        self._is_disk: dict[str, bool] = {}
        self._was_cut = False

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment.

        Raises:
            NoData: no hierarchy with figures is mounted.
        """
        hierarchies = _parse_hierarchies(procfs.read(self._context, "/proc/self/mountinfo"))
        if not hierarchies:
            raise NoData("no control group hierarchy with cpu, memory, io or pids is mounted; see /proc/self/mountinfo")
        matching = [path for path in self._groups(set(hierarchies.values())) if self._matches(path)]
        chosen = matching[: self._config.max_cgroups]
        metrics = [Metric("cgroup_omitted", len(matching) - len(chosen), {}, MetricType.OTHER)]
        for path in chosen:
            labels = {"cgroup": path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")}
            figures = self._read_figures(hierarchies, path)
            metrics += (Metric(name, value, labels, MetricType.OTHER) for name, value in figures.items())
        return metrics

    def _matches(self, path: str) -> bool:
        return _matches(path, self._config.include) and not _matches(path, self._config.exclude)

    def _groups(self, mountpoints: set[str]) -> list[str]:
        """Return the paths of all groups of these hierarchies, level by level, by name on each."""
        paths: list[str] = []
        level = {"/": mountpoints}
        left = MAX_FOLDERS
        while level:
            below: dict[str, set[str]] = {}
            for path, tops in sorted(level.items()):
                paths.append(path)
                left -= len(tops)
                for top in tops if left >= 0 else ():
                    for name in self._read_children(top + path):
                        below.setdefault(f"{path.rstrip('/')}/{name}", set()).add(top)
            level = below
        if left < 0 and not self._was_cut:
            log.warning("more than %d control groups: some below the first %d are not seen", MAX_FOLDERS, len(paths))
        self._was_cut = left < 0
        return paths

    def _read_children(self, folder: str) -> list[str]:
        path = self._context.path(folder)
        try:
            # A folder has two links and one more for each folder in it. Most have none, and listing their some
            # sixty files is what costs.
            if os.stat(path).st_nlink == 2:
                return []
            with os.scandir(path) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:  # gone since, or not ours to see
            return []

    def _read_figures(self, hierarchies: dict[str, str], path: str) -> dict[str, float]:
        figures: dict[str, float] = {}
        for controller, mountpoint in hierarchies.items():
            read = functools.partial(self._read, mountpoint + path)
            for name, value in _CONTROLLERS[controller](read, self._carries_io):
                figures.setdefault(name, value)
        return figures

    def _read(self, folder: str, name: str) -> bytes:
        try:
            return procfs.read(self._context, f"{folder}/{name}")
        except (NoData, OSError):  # ENODEV: the group went while its file was open; EOPNOTSUPP: no such accounting
            return b""

    def _carries_io(self, number: str) -> bool:
        is_disk = self._is_disk.get(number)
        if is_disk is None:
            is_disk = self._is_disk[number] = not number.startswith(LOOP_MAJOR) and not self._has_slaves(number)
        return is_disk

    def _has_slaves(self, number: str) -> bool:
        try:
            return bool(os.listdir(self._context.path(f"/sys/dev/block/{number}/slaves")))
        except OSError:
            return False


def _parse_hierarchies(mountinfo: bytes) -> dict[str, str]:
    """Return where each hierarchy we know the figures of is mounted, in the order of _CONTROLLERS."""
    mounted: dict[str, str] = {}
    for line in mountinfo.decode("utf-8", "surrogateescape").split("\n"):
        match = _MOUNT.fullmatch(line)
        if match is not None:
            controllers = (UNIFIED,) if match["fstype"] == "cgroup2" else match["options"].split(",")
            for controller in controllers:
                mounted.setdefault(controller, match["mountpoint"])
    return {controller: mounted[controller] for controller in _CONTROLLERS if controller in mounted}


def _parse_flat(text: bytes) -> dict[bytes, int]:
    """Return the numbers of a file of lines `name number`."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _parse_io(text: bytes, is_disk: IsDisk) -> Figures:
    """Yield the sums of io.stat: lines `major:minor rbytes=… wbytes=… …`, a device without I/O bare or missing."""
    read = written = 0
    for line in text.decode().splitlines():
        device, *pairs = line.split()
        if is_disk(device):
            counts = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            read += int(counts.get("rbytes", 0))
            written += int(counts.get("wbytes", 0))
    yield "cgroup_io_read_bytes_total", read
    yield "cgroup_io_write_bytes_total", written


def _parse_service_bytes(text: bytes, is_disk: IsDisk) -> Figures:
    """Yield the sums of version 1's lines `major:minor Read|Write|… number`; `Total number` ends them.

    Without a line of any disk nothing is counted, which is not the same as no I/O: since Linux 6.10 this file counts
    only where throttling is configured.
    """
    sums = {"Read": 0, "Write": 0}
    has_disk = False
    for line in text.decode().splitlines():
        device, *counted = line.split()
        if len(counted) == 2 and counted[0] in sums and is_disk(device):
            has_disk = True
            sums[counted[0]] += int(counted[1])
    if has_disk:
        yield "cgroup_io_read_bytes_total", sums["Read"]
        yield "cgroup_io_write_bytes_total", sums["Write"]


def _parse_pressure(resource: str, text: bytes) -> Figures:
    """Yield the times of a pressure file: lines `some|full avg10=… avg60=… avg300=… total=MICROSECONDS`."""
    for line in text.decode().splitlines():
        share, _, rest = line.partition(" ")
        yield f"cgroup_pressure_{resource}_{share}_seconds_total", int(rest.rpartition("total=")[2]) / US_PER_S


def _figure(name: str, text: bytes, per_unit: float = 1.0) -> Figures:
    """Yield a file's one number; nothing where it has none, or says `max`."""
    if text.strip().isdigit():
        yield name, int(text) / per_unit


# One function per hierarchy: version 1's controllers, then version 2.


def _cpuacct(read: Read, is_disk: IsDisk) -> Figures:
    yield from _figure("cgroup_cpu_seconds_total", read("cpuacct.usage"), NS_PER_S)


def _cpu(read: Read, is_disk: IsDisk) -> Figures:
    throttled = _parse_flat(read("cpu.stat")).get(b"throttled_time")
    if throttled is not None:
        yield "cgroup_cpu_throttled_seconds_total", throttled / NS_PER_S


def _memory(read: Read, is_disk: IsDisk) -> Figures:
    yield from _figure("cgroup_memory_bytes", read("memory.usage_in_bytes"))
    for name, limit in _figure("cgroup_memory_limit_bytes", read("memory.limit_in_bytes")):
        if limit < UNLIMITED_BYTES:
            yield name, limit
    kills = _parse_flat(read("memory.oom_control")).get(b"oom_kill")  # since Linux 4.13
    if kills is not None:
        yield "cgroup_oom_kills_total", kills


def _pids(read: Read, is_disk: IsDisk) -> Figures:
    yield from _figure("cgroup_tasks", read("pids.current"))


def _blkio(read: Read, is_disk: IsDisk) -> Figures:
    # The recursive one includes the groups below, as everything else does.
    for name in ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"):
        if text := read(name):
            yield from _parse_service_bytes(text, is_disk)
            return


def _unified(read: Read, is_disk: IsDisk) -> Figures:
    cpu = _parse_flat(read("cpu.stat"))
    if b"usage_usec" in cpu:
        yield "cgroup_cpu_seconds_total", cpu[b"usage_usec"] / US_PER_S
    if b"throttled_usec" in cpu:  # where the cpu controller is enabled
        yield "cgroup_cpu_throttled_seconds_total", cpu[b"throttled_usec"] / US_PER_S
    yield from _figure("cgroup_memory_bytes", read("memory.current"))
    yield from _figure("cgroup_memory_limit_bytes", read("memory.max"))
    events = _parse_flat(read("memory.events"))
    if b"oom_kill" in events:
        yield "cgroup_oom_kills_total", events[b"oom_kill"]
    yield from _figure("cgroup_tasks", read("pids.current"))
    if text := read("io.stat"):
        yield from _parse_io(text, is_disk)
    for resource in ("cpu", "memory", "io"):
        yield from _parse_pressure(resource, read(f"{resource}.pressure"))


UNIFIED = "unified"
"""What version 2's hierarchy is called here; those of version 1 go by their controllers."""

_CONTROLLERS: dict[str, Callable[[Read, IsDisk], Figures]] = {
    "cpuacct": _cpuacct,
    "cpu": _cpu,
    "memory": _memory,
    "pids": _pids,
    "blkio": _blkio,
    UNIFIED: _unified,
}
"""Where figures come from, the preferred first."""


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
