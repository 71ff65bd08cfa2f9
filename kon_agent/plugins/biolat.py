"""The `biolat` collector: how long each block device took to answer.

From ebpf/kon_biolat.bpf.c: each request is one observation, from its being given to the device's driver until it is
done. The block layer merges neighbouring I/O into one request; one that is given again (requeued) counts from then on.
`other` is what neither reads nor writes: flush, discard, write zeroes, zones, commands passed through.

    disk_io_latency_seconds_bucket|sum|count    {device, operation, le}    `other` from its first request on
    disk_io_latency_missed_total                {device}                   requests not measured: too many in flight

* The device is the whole disk, by the name it has now; one that is gone is reported no more.
* Devices beyond the first biolat.DEVICES that had a request since the program was loaded are `device="other"` together.
* dm and md devices, zram and the like have no requests: the disks below them are reported.

Without BPF, from /proc/diskstats (Documentation/admin-guide/iostats.rst): sum and count since boot, labelled
`source="procfs"`, with the one bucket that has no bound. There a request's time begins earlier, when it is made, not
when the driver gets it; it is counted in milliseconds; `other` is discards and flushes; and dm and md devices are
reported too.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator

from kon_agent.bpf.biolat import DEVICE, DEVICES, MISSED, OPERATIONS, ROW_BYTES, SLOTS, SPEC, device_number
from kon_agent.bpf.latency import BOUNDS_S, LATENCY_WORDS, Latency, latency_of
from kon_agent.bpf.rows import sum_rows
from kon_agent.config.schema import BiolatConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.probed import Probed, histogram

NAME = "disk_io_latency_seconds"
MISSED_NAME = "disk_io_latency_missed_total"
OTHER_DEVICES = "other"

_ALWAYS = 2  # of OPERATIONS: a rate can be taken from the first read and write on
_MS_PER_S = 1000
# Columns of diskstats, the major number being column 0: completed, ms. Discards came with Linux 4.18, flushes with 5.5.
_COMPLETED_AND_MS = {"read": ((3, 6),), "write": ((7, 10),), "other": ((14, 17), (18, 19))}


class Biolat(Probed):
    """Report how long the requests of every block device took.

    Args:
        config: the plugin's section.
        context: with the grants `rows` and `origin`; without them /proc/diskstats is read.
    """

    def __init__(self, config: BiolatConfig, context: Context) -> None:
        super().__init__("biolat", context)
        self._exclude = config.exclude_devices

    def _from_rows(self, rows: memoryview) -> Iterator[Metric]:
        cpus = SPEC.cpus_of(rows)
        for slot in range(SLOTS):
            number = sum_rows(rows, ROW_BYTES, slot * cpus, 1)[DEVICE]
            if not number and slot < DEVICES:  # they are taken in order
                return
            device = self._name_of(number) if number else OTHER_DEVICES
            if device and not self._is_excluded(device):
                columns = sum_rows(rows, ROW_BYTES, slot * cpus, cpus)
                if any(columns):
                    yield from _device_metrics(device, columns)

    def _name_of(self, number: int) -> str | None:
        """Return the name of a device; None where there is none of this number now."""
        major, minor = device_number(number)
        try:
            path = os.readlink(self._context.path(f"/sys/dev/block/{major}:{minor}"))
        except OSError:
            return None
        # sysfs cannot have a slash in a name and writes "!" (cciss/c0d0).
        return os.path.basename(path).replace("!", "/")

    def _is_excluded(self, device: str) -> bool:
        return any(fnmatch.fnmatchcase(device, pattern) for pattern in self._exclude)

    def _from_procfs(self) -> Iterator[Metric]:
        try:
            text = procfs.read(self._context, "/proc/diskstats")
        except NoData:  # a kernel without block layer; the origin is still told
            return
        for device, operation, latency in _parse_diskstats(text):
            if self._is_disk(device) and not self._is_excluded(device):
                labels = {"device": device, "operation": operation, "source": "procfs"}
                yield from histogram(NAME, (), latency.counts, latency.total_s, labels)

    def _is_disk(self, device: str) -> bool:
        """Whether it is a whole disk: partitions repeat theirs."""
        return os.path.exists(self._context.path("/sys/block/" + device.replace("/", "!")))


def _device_metrics(device: str, columns: list[int]) -> Iterator[Metric]:
    for number, operation in enumerate(OPERATIONS):
        latency = latency_of(columns, number * LATENCY_WORDS)
        if number < _ALWAYS or any(latency.counts):
            yield from histogram(
                NAME, BOUNDS_S, latency.counts, latency.total_s, {"device": device, "operation": operation}
            )
    yield Metric(MISSED_NAME, float(columns[MISSED]), {"device": device}, MetricType.EBPF_RAW)


def _parse_diskstats(text: bytes) -> Iterator[tuple[str, str, Latency]]:
    """Yield each device's requests and their time by operation; nothing of one that has done nothing since boot."""
    for line in text.decode().splitlines():
        fields = line.split()
        if len(fields) < 11 or not any(int(field) for field in fields[3:]):
            continue
        for operation, pairs in _COMPLETED_AND_MS.items():
            known = [(int(fields[count]), int(fields[ms])) for count, ms in pairs if ms < len(fields)]
            if known:
                counts, ms = zip(*known, strict=True)
                yield fields[2], operation, Latency([sum(counts)], sum(ms) / _MS_PER_S)
