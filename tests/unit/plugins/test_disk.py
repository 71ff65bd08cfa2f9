"""The disk collector's promises."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path
from time import monotonic

import pytest

from kon_agent.config.schema import DiskConfig, Duration
from kon_agent.errors import NoData
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.disk import Disk

# f_bsize, f_frsize, blocks, bfree, bavail, files, ffree, favail, flag, namemax
EXT4 = os.statvfs_result((4096, 1024, 1000, 400, 200, 64, 24, 24, 0, 255))
VFAT = os.statvfs_result((4096, 4096, 100, 75, 75, 0, 0, 0, 0, 255))
EMPTY = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))

Values = dict[tuple[str, str], float]


class Statvfs:
    """Answers by mount point; EXT4 unless told otherwise."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.answers: dict[str, os.statvfs_result | OSError | threading.Event] = {}

    def __call__(self, path: str) -> os.statvfs_result:
        answer = self.answers.get(path.removeprefix(self._root), EXT4)
        if isinstance(answer, threading.Event):
            assert answer.wait(10.0)
            return EXT4
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def statvfs(host: Path) -> Statvfs:
    """Return what the host's filesystems answer."""
    return Statvfs(host)


def values(disk: Disk, label: str) -> Values:
    """Collect; return the values of the metrics with `label` by name and that label's value."""
    return {
        (metric.name, metric.labels[label]): metric.value
        for metric in disk.collect()
        if label in metric.labels and (label == "mountpoint" or "mountpoint" not in metric.labels)
    }


def rooms(disk: Disk) -> Values:
    """Collect; return the filesystems' values by name and mount point."""
    return values(disk, "mountpoint")


def transfers(disk: Disk) -> Values:
    """Collect; return the devices' values by name and device."""
    return values(disk, "device")


def test_figures_are_those_of_df(context: Context, statvfs: Statvfs) -> None:
    """Used excludes the reserve, free is what users may have, and the percentage is of used + free."""
    collected = rooms(Disk(DiskConfig(), context, statvfs))
    assert {
        "disk_usage_percent": 75.0,
        "disk_usage_bytes": 600 * 1024,
        "disk_total_bytes": 1000 * 1024,
        "disk_free_bytes": 200 * 1024,
        "disk_inodes_total": 64,
        "disk_inodes_used": 40,
        "disk_inodes_free": 24,
    } == {name: value for (name, mountpoint), value in collected.items() if mountpoint == "/"}


def test_a_filesystem_without_inodes_reports_none(context: Context, statvfs: Statvfs) -> None:
    """vfat has room but no table of inodes."""
    statvfs.answers["/boot/efi"] = VFAT
    names = {name for name, mountpoint in rooms(Disk(DiskConfig(), context, statvfs)) if mountpoint == "/boot/efi"}
    assert {"disk_usage_percent", "disk_usage_bytes", "disk_total_bytes", "disk_free_bytes"} == names


def test_each_filesystem_is_labelled(context: Context, statvfs: Statvfs) -> None:
    """Real filesystems only, each once, with device, mount point and type decoded."""
    disk = Disk(DiskConfig(), context, statvfs)
    assert {
        ("/dev/sda2", "/", "ext4"),
        ("/dev/sda1", "/boot/efi", "vfat"),
        ("/dev/mapper/vg-my\\x2ddisk", "/media/my disk", "ext4"),
        ("server:/export/home", "/home/share", "nfs4"),
    } == {tuple(metric.labels.values()) for metric in disk.collect() if "mountpoint" in metric.labels}


def test_excluded_mount_points_are_left_out(context: Context, statvfs: Statvfs) -> None:
    """A shell pattern leaves mount points out."""
    disk = Disk(DiskConfig(exclude_mountpoints=["/boot/*", "/media/*", "/home/*"]), context, statvfs)
    assert {"/"} == {mountpoint for _, mountpoint in rooms(disk)}


@pytest.mark.parametrize(
    "answer",
    [EMPTY, PermissionError(errno.EACCES, "Permission denied"), OSError(errno.ESTALE, "Stale file handle")],
)
def test_a_filesystem_without_figures_is_left_out(
    context: Context, statvfs: Statvfs, answer: os.statvfs_result | OSError
) -> None:
    """One without blocks, one we may not look at and one that fails are left out; the others stay."""
    statvfs.answers["/boot/efi"] = answer
    mountpoints = {mountpoint for _, mountpoint in rooms(Disk(DiskConfig(), context, statvfs))}
    assert {"/", "/home/share", "/media/my disk"} == mountpoints


def test_a_new_mount_is_noticed(host: Path, context: Context, statvfs: Statvfs) -> None:
    """What is mounted between two cycles is reported in the second."""
    disk = Disk(DiskConfig(), context, statvfs)
    rooms(disk)
    with (host / "proc/self/mountinfo").open("a") as table:
        table.write("50 27 8:33 / /usb rw - vfat /dev/sdc1 rw\n")
    assert ("disk_usage_percent", "/usb") in rooms(disk)


def test_a_hanging_filesystem_stops_nobody(
    context: Context, statvfs: Statvfs, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported as stuck and nothing else, and warned about once; recovered, as not stuck, once."""
    dead = statvfs.answers["/home/share"] = threading.Event()
    disk = Disk(DiskConfig(timeout=Duration(0.2)), context, statvfs)
    stuck = ("disk_stuck", "/home/share")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            collected = rooms(disk)
            assert 1 == collected[stuck]
            assert [stuck] == [series for series in collected if series[1] == "/home/share"]
            assert {("disk_usage_percent", path) for path in ("/", "/boot/efi")} <= collected.keys()
    assert 1 == len(caplog.records)
    dead.set()
    deadline = monotonic() + 10.0
    while collected[stuck] == 1:
        assert monotonic() < deadline
        collected = rooms(disk)
    assert (0, 75.0) == (collected[stuck], collected["disk_usage_percent", "/home/share"])
    assert stuck not in rooms(disk)


def test_device_counters_are_totals(context: Context, statvfs: Statvfs) -> None:
    """Whole devices that did any I/O; a sector is always 512 bytes; no delta in the first cycle."""
    assert {
        ("disk_io_read_bytes_total", "sda"): 2048 * 512,
        ("disk_io_write_bytes_total", "sda"): 4096 * 512,
        ("disk_io_read_count_total", "sda"): 100,
        ("disk_io_write_count_total", "sda"): 40,
        ("disk_io_read_bytes_total", "dm-0"): 160 * 512,
        ("disk_io_write_bytes_total", "dm-0"): 64 * 512,
        ("disk_io_read_count_total", "dm-0"): 20,
        ("disk_io_write_count_total", "dm-0"): 8,
        ("disk_io_read_bytes_total", "cciss/c0d0"): 8 * 512,
        ("disk_io_write_bytes_total", "cciss/c0d0"): 8 * 512,
        ("disk_io_read_count_total", "cciss/c0d0"): 1,
        ("disk_io_write_count_total", "cciss/c0d0"): 1,
    } == transfers(Disk(DiskConfig(), context, statvfs))


def test_deltas_are_since_the_previous_cycle(host: Path, context: Context, statvfs: Statvfs) -> None:
    """The second cycle reports what each counter grew by; an idle device's deltas are 0."""
    disk = Disk(DiskConfig(), context, statvfs)
    transfers(disk)
    table = host / "proc/diskstats"
    table.write_text(table.read_text().replace(" sda 100 3 2048 50 40 5 4096", " sda 103 3 2050 50 41 5 4100"))
    collected = transfers(disk)
    assert (2 * 512, 4 * 512, 3, 1, 0) == (
        collected["disk_io_read_bytes_delta", "sda"],
        collected["disk_io_write_bytes_delta", "sda"],
        collected["disk_io_read_count_delta", "sda"],
        collected["disk_io_write_count_delta", "sda"],
        collected["disk_io_read_count_delta", "dm-0"],
    )


def test_a_counter_reset_has_no_delta(host: Path, context: Context, statvfs: Statvfs) -> None:
    """A device whose counters went backwards has totals and no delta; the next cycle has them again."""
    disk = Disk(DiskConfig(), context, statvfs)
    transfers(disk)
    table = host / "proc/diskstats"
    table.write_text(table.read_text().replace(" sda 100 3 2048", " sda 1 0 8"))
    after_reset = {name for name, device in transfers(disk) if device == "sda"}
    assert not [name for name in after_reset if name.endswith("_delta")]
    assert ("disk_io_read_bytes_delta", "sda") in transfers(disk)


def test_a_device_that_starts_working_has_a_delta(host: Path, context: Context, statvfs: Statvfs) -> None:
    """A device left out for doing nothing was still watched: its first I/O is a delta from 0."""
    disk = Disk(DiskConfig(), context, statvfs)
    transfers(disk)
    table = host / "proc/diskstats"
    table.write_text(table.read_text().replace(" sr0 0 0 0", " sr0 2 0 16"))
    assert 2 == transfers(disk)["disk_io_read_count_delta", "sr0"]


def test_excluded_devices_are_left_out(context: Context, statvfs: Statvfs) -> None:
    """A shell pattern leaves devices out."""
    disk = Disk(DiskConfig(exclude_devices=["loop*", "dm-*", "cciss/*"]), context, statvfs)
    assert {"sda"} == {device for _, device in transfers(disk)}


def test_a_kernel_without_block_layer_reports_filesystems(host: Path, context: Context, statvfs: Statvfs) -> None:
    """Without diskstats there are no devices, and the filesystems are reported all the same."""
    (host / "proc/diskstats").unlink()
    disk = Disk(DiskConfig(), context, statvfs)
    assert ({}, True) == (transfers(disk), bool(rooms(disk)))


def test_every_metric_is_disk_usage(context: Context, statvfs: Statvfs) -> None:
    """All metrics carry the wire's DISK_USAGE type."""
    disk = Disk(DiskConfig(), context, statvfs)
    assert {MetricType.DISK_USAGE} == {metric.type for metric in disk.collect()}


def test_nothing_to_report_is_no_data(host: Path, context: Context, statvfs: Statvfs) -> None:
    """A host with neither storage nor device has nothing to collect."""
    (host / "proc/self/mountinfo").write_text("22 27 0:21 / /proc rw - proc proc rw\n")
    (host / "proc/diskstats").write_text("")
    with pytest.raises(NoData):
        Disk(DiskConfig(), context, statvfs).collect()


@pytest.mark.skipif(not shutil.which("df"), reason="needs df(1) of coreutils")
def test_equals_df_to_the_unit() -> None:
    """On this machine df -B1 shows, for every filesystem, the collector's figures."""
    names = (
        "disk_total_bytes",
        "disk_usage_bytes",
        "disk_free_bytes",
        "disk_inodes_total",
        "disk_inodes_used",
    )
    disk = Disk(DiskConfig(), Context())
    deadline = monotonic() + 60.0
    before, after = {("", ""): -1.0}, rooms(disk)
    while before != after:  # others write meanwhile: compare where nothing has changed around df
        assert monotonic() < deadline
        before = rooms(disk)
        paths = sorted({mountpoint for _, mountpoint in before})
        table = subprocess.run(
            ["df", "-B1", "--output=size,used,avail,itotal,iused", *paths],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        after = rooms(disk)
    shown = [[int(figure) for figure in row.replace("-", "0").split()] for row in table.splitlines()[1:]]
    assert shown == [[int(after.get((name, path), 0)) for name in names] for path in paths]
