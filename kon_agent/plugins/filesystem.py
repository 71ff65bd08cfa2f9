"""The `filesystem` collector: which filesystems cannot be written to, and which have met errors.

Sources: the mounts `mounts` chooses from /proc/self/mountinfo, one per filesystem; for ext2 to ext4
/sys/fs/ext4/DEVICE (Documentation/ABI/testing/sysfs-fs-ext4), for btrfs /sys/fs/btrfs/UUID/devinfo
(fs/btrfs/sysfs.c). The kernel shows no such counts for xfs, vfat or f2fs: of these only whether they can be
written to is known.

Invariants:
* Read-only is a property of the filesystem, not of the mount: a bind mount, or a service's private view of the
  machine (systemd's ProtectSystem), may be read-only while the filesystem is healthy.
* A filesystem that was writable in one cycle and is read-only in the next was remounted, whoever did it; one
  mounted read-only from the start was not.
* Nothing is asked of the filesystem itself, so none can hold this collector up.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterable, Iterator, Mapping

from kon_agent.config.schema import FilesystemConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import mounts, procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.mounts import Mount

log = logging.getLogger(__name__)

EXT4 = frozenset(("ext2", "ext3", "ext4"))
"""Types the ext4 driver serves."""

# Superblock options that end writing: the ordinary one, and ext4's after an error (since Linux 6.15) and after
# FS_IOC_SHUTDOWN.
_READ_ONLY = frozenset((b"ro", b"emergency_ro", b"shutdown"))

_EXT4_FIGURES = (
    ("filesystem_errors_total", "errors_count", 1),
    ("filesystem_warnings_total", "warning_count", 1),
    ("filesystem_written_bytes_total", "lifetime_write_kbytes", 1024),
)
_EXT4_TIMES = (
    ("filesystem_first_error_seconds", "first_error_time"),
    ("filesystem_last_error_seconds", "last_error_time"),
)

MAX_BTRFS = 256  # filesystems, and devices of one of them; a large storage machine has some dozens
BTRFS = "/sys/fs/btrfs"

FilesystemId = tuple[int, str]
"""Mount id and device number: the kernel uses either again, but not while it is mounted."""


class Filesystem:
    """Report whether filesystems are read-only, became so, and how many errors they have met."""

    def __init__(self, config: FilesystemConfig, context: Context) -> None:
        self._excluded = config.exclude_mountpoints
        self._context = context
        self._mountinfo = b""
        self._mounts: list[Mount] = []
        self._read_only: dict[FilesystemId, bool] = {}
        self._remounts = 0

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment.

        Raises:
            NoData: this /proc shows no mounts.
        """
        self._read_mounts()
        metrics = [
            Metric("filesystem_mounts", len(self._mounts), {}, MetricType.DISK_USAGE),
            Metric("filesystem_remounts_read_only_total", self._remounts, {}, MetricType.DISK_USAGE),
        ]
        for mount in self._mounts:
            is_read_only = float(self._read_only[_identity(mount)])
            metrics.append(Metric("filesystem_read_only", is_read_only, mount.labels(), MetricType.DISK_USAGE))
            if mount.fstype in EXT4:
                metrics += self._ext4(mount)
        metrics += self._btrfs()
        return metrics

    def _read_mounts(self) -> None:
        mountinfo = procfs.read(self._context, "/proc/self/mountinfo")
        if mountinfo == self._mountinfo:
            return
        found = mounts.storage(mountinfo, procfs.read(self._context, "/proc/filesystems"))
        self._mounts = mounts.once_each(mount for mount in found if not _matches(mount.mountpoint, self._excluded))
        read_only_ids = _parse_read_only(mountinfo)
        before, self._read_only = (
            self._read_only,
            {_identity(mount): mount.mount_id in read_only_ids for mount in self._mounts},
        )
        self._mountinfo = mountinfo
        for mount in self._mounts:
            self._note_remount(mount, before.get(_identity(mount)), self._read_only[_identity(mount)])

    def _note_remount(self, mount: Mount, was_read_only: bool | None, is_read_only: bool) -> None:
        if was_read_only is None or was_read_only == is_read_only:
            return
        labels = mount.labels()
        if is_read_only:
            self._remounts += 1
            log.warning("%s on %s can no longer be written to", labels["device"], labels["mountpoint"])
        else:
            log.warning("%s on %s can be written to again", labels["device"], labels["mountpoint"])

    def _ext4(self, mount: Mount) -> Iterator[Metric]:
        folder = f"/sys/fs/ext4/{self._kernel_name(mount)}"
        labels = mount.labels()
        identity = {"device": labels["device"], "fstype": labels["fstype"]}
        for name, file, unit in _EXT4_FIGURES:
            count = self._number(f"{folder}/{file}")
            if count is not None:
                yield Metric(name, count * unit, identity, MetricType.DISK_USAGE)
        for name, file in _EXT4_TIMES:
            at_s = self._number(f"{folder}/{file}")
            if at_s:  # 0: never
                yield Metric(name, at_s, identity, MetricType.DISK_USAGE)

    def _kernel_name(self, mount: Mount) -> str:
        """Return the device's name in sysfs: /dev/mapper/root is dm-0, and /dev/root any."""
        link = self._context.path(f"/sys/dev/block/{mount.device_number}")
        try:
            return os.path.basename(os.readlink(link))
        except OSError:
            return os.path.basename(mount.source)

    def _btrfs(self) -> Iterator[Metric]:
        """Yield the errors of every device of every btrfs; a filesystem has many, so it goes by its UUID."""
        for uuid in self._folders(BTRFS):
            for devid in self._folders(f"{BTRFS}/{uuid}/devinfo"):
                text = self._read(f"{BTRFS}/{uuid}/devinfo/{devid}/error_stats")
                for kind, count in _parse_error_stats(text).items():
                    labels = {"device": uuid, "fstype": "btrfs", "devid": devid, "kind": kind}
                    yield Metric("filesystem_errors_total", count, labels, MetricType.DISK_USAGE)

    def _folders(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._context.path(path)))[:MAX_BTRFS]
        except OSError:  # no such filesystem, or gone since
            return []

    def _number(self, path: str) -> int | None:
        text = self._read(path).strip()
        return int(text) if text.isdigit() else None

    def _read(self, path: str) -> bytes:
        try:
            return procfs.read(self._context, path)
        except (NoData, OSError):
            return b""


def _identity(mount: Mount) -> FilesystemId:
    return mount.mount_id, mount.device_number


def _parse_read_only(mountinfo: bytes) -> frozenset[int]:
    """Return the ids of the mounts whose filesystem, not only the mount, is read-only."""
    lines = (line.split(b" ") for line in mountinfo.split(b"\n") if line)
    # The superblock's options end the line (proc(5)).
    return frozenset(int(fields[0]) for fields in lines if not _READ_ONLY.isdisjoint(fields[-1].split(b",")))


def _parse_error_stats(text: bytes) -> Mapping[str, int]:
    """Return btrfs's counts by kind, from lines such as `write_errs 3`; none of a device that is missing."""
    pairs = (line.split() for line in text.decode().splitlines())
    return {pair[0].removesuffix("_errs"): int(pair[1]) for pair in pairs if len(pair) == 2}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
