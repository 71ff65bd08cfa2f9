"""The `disk` collector: how full each filesystem is, and what each block device has read and written.

Sources: statvfs(3) of the mounts `mounts` chooses, and /proc/diskstats
(Documentation/admin-guide/iostats.rst).

* Figures are df's: used is `f_blocks − f_bfree`, free is what an unprivileged user can still have
  (`f_bavail`), and the percentage is used / (used + free), so that 100 is where writes fail. A filesystem
  without blocks is no storage.
* Devices are those of /sys/block: whole disks, and the dm and md devices stacked on them, whose traffic the
  disks below carry again. Partitions repeat their disk and are left out. So is a device that has done nothing
  since boot, as iostat(1) does.
* A `…_delta` is the growth since the previous cycle: none in a device's first cycle, and none where a counter
  went backwards (the device was replaced, or a 32-bit counter wrapped).
* A filesystem that does not answer is `disk_stuck` = 1 and nothing else; the first cycle it answers again, 0.
* One we may not look at, or that fails (EACCES, ESTALE, EIO), is left out: it has no figures now.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterable, Iterator, Mapping

from kon_agent.config.schema import DiskConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import mounts, procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.prober import Prober, Statvfs

log = logging.getLogger(__name__)

SECTOR_BYTES = 512  # diskstats' unit whatever the device's own sector size (iostats.rst)

Labels = Mapping[str, str]

Counters = tuple[int, int, int, int]
"""A device's counters since boot, in the order of _COUNTER_NAMES."""

_COUNTER_NAMES = (
    "disk_io_read_bytes",
    "disk_io_write_bytes",
    "disk_io_read_count",
    "disk_io_write_count",
)


class Disk:
    """Report the room of every mounted filesystem and the I/O of every block device.

    Args:
        config: the plugin's section.
        context: the collector's surroundings.
        statvfs: asks one filesystem; os.statvfs but for tests.
    """

    def __init__(self, config: DiskConfig, context: Context, statvfs: Statvfs = os.statvfs) -> None:
        self._config = config
        self._context = context
        self._prober = Prober(statvfs, config.timeout)
        self._mountinfo = b""
        self._mounts: dict[str, Labels] = {}
        self._stuck: frozenset[str] = frozenset()
        self._counters: dict[str, Counters] = {}
        self._reported: dict[str, bool] = {}

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this cycle, within the configured timeout.

        Raises:
            NoData: there is neither a filesystem nor a device to report.
        """
        metrics = [*self._filesystems(), *self._devices()]
        if not metrics:
            raise NoData("no filesystem with storage is mounted and no block device has done any I/O")
        return metrics

    def _filesystems(self) -> Iterator[Metric]:
        self._read_mounts()
        answers = self._prober.ask(self._mounts)
        for path, answer in answers.items():
            if isinstance(answer, OSError):
                log.debug("statvfs %s: %s", path, answer)
            else:
                yield from _room(answer, self._mounts[path])
        yield from self._stuck_ones()

    def _stuck_ones(self) -> Iterator[Metric]:
        was_stuck, self._stuck = self._stuck, self._prober.stuck & self._mounts.keys()
        for path in self._stuck - was_stuck:
            log.warning("%s does not answer statvfs; it is left alone until it does", path)
        for path in (was_stuck - self._stuck) & self._mounts.keys():
            log.warning("%s answers statvfs again", path)
            yield Metric("disk_stuck", 0, self._mounts[path], MetricType.DISK_USAGE)
        for path in sorted(self._stuck):
            yield Metric("disk_stuck", 1, self._mounts[path], MetricType.DISK_USAGE)

    def _read_mounts(self) -> None:
        mountinfo = procfs.read(self._context, "/proc/self/mountinfo")
        if mountinfo == self._mountinfo:
            return
        # A type can appear with its module, but not be mounted before: the types are read when a mount
        # changes.
        found = mounts.storage(mountinfo, procfs.read(self._context, "/proc/filesystems"))
        excluded = self._config.exclude_mountpoints
        chosen = mounts.once_each(mount for mount in found if not _matches(mount.mountpoint, excluded))
        self._mountinfo = mountinfo
        self._mounts = {self._context.path(mount.mountpoint): mount.labels() for mount in chosen}

    def _devices(self) -> Iterator[Metric]:
        before, self._counters = self._counters, self._read_diskstats()
        for device, now in self._counters.items():
            if not any(now):
                continue
            labels = {"device": device}
            for name, count in zip(_COUNTER_NAMES, now, strict=True):
                yield Metric(f"{name}_total", count, labels, MetricType.DISK_USAGE)
            for name, growth in zip(_COUNTER_NAMES, _growth(before.get(device), now), strict=False):
                yield Metric(f"{name}_delta", growth, labels, MetricType.DISK_USAGE)

    def _read_diskstats(self) -> dict[str, Counters]:
        try:
            text = procfs.read(self._context, "/proc/diskstats")
        except NoData:  # a kernel without block layer still has filesystems
            return {}
        return {name: counters for name, counters in _parse_diskstats(text) if self._is_reported(name)}

    def _is_reported(self, device: str) -> bool:
        known = self._reported.get(device)
        if known is None:
            # sysfs cannot have a slash in a name and writes "!" (cciss/c0d0).
            path = self._context.path("/sys/block/" + device.replace("/", "!"))
            known = os.path.exists(path) and not _matches(device, self._config.exclude_devices)
            self._reported[device] = known
        return known


def _parse_diskstats(text: bytes) -> Iterator[tuple[str, Counters]]:
    """Yield each block device's name and counters, partitions included."""
    for line in text.decode().split("\n"):
        # major minor name reads merged sectors ms writes merged sectors ms …
        fields = line.split(None, 10)
        if len(fields) < 10:  # the end; before Linux 2.6.25 also a partition
            continue
        yield (
            fields[2],
            (
                int(fields[5]) * SECTOR_BYTES,
                int(fields[9]) * SECTOR_BYTES,
                int(fields[3]),
                int(fields[7]),
            ),
        )


def _growth(before: Counters | None, now: Counters) -> tuple[int, ...]:
    """Return how much each counter grew; nothing where there is no earlier reading of the same count."""
    if before is None:
        return ()
    growth = tuple(late - early for early, late in zip(before, now, strict=True))
    return growth if min(growth) >= 0 else ()


def _room(answer: os.statvfs_result, labels: Labels) -> Iterator[Metric]:
    """Yield a filesystem's figures in df's definitions; nothing where it has no blocks."""
    if answer.f_blocks == 0:
        return
    unit = answer.f_frsize
    used = (answer.f_blocks - answer.f_bfree) * unit
    free = answer.f_bavail * unit
    room = used + free
    figures = {
        "disk_usage_percent": 100.0 * used / room if room else 0.0,
        "disk_usage_bytes": used,
        "disk_total_bytes": answer.f_blocks * unit,
        "disk_free_bytes": free,
    }
    if answer.f_files:  # vfat and btrfs have no table of inodes
        figures["disk_inodes_total"] = answer.f_files
        figures["disk_inodes_used"] = answer.f_files - answer.f_ffree
        figures["disk_inodes_free"] = answer.f_ffree
    for name, value in figures.items():
        yield Metric(name, value, labels, MetricType.DISK_USAGE)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
