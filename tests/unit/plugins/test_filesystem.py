"""The filesystem collector's promises."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kon_agent.config.schema import FilesystemConfig
from kon_agent.errors import NoData
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.filesystem import Filesystem
from tests.support.disk_image import make_image, make_readonly, mounted
from tests.support.netns import run

Values = dict[tuple[str, ...], float]

MOUNTPOINTS = {"/", "/boot/efi", "/media/my disk", "/home/share"}


def values(collector: Filesystem) -> Values:
    """Collect; return the values by name and label values."""
    return {(metric.name, *metric.labels.values()): metric.value for metric in collector.collect()}


def read_only(collector: Filesystem) -> dict[str, float]:
    """Collect; return what is said of each mount point."""
    return {
        metric.labels["mountpoint"]: metric.value
        for metric in collector.collect()
        if metric.name == "filesystem_read_only"
    }


def replace(host: Path, old: str, new: str) -> None:
    """Change the mount table."""
    table = host / "proc/self/mountinfo"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))


def put(folder: Path, **files: str) -> None:
    """Have these files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_each_filesystem_says_whether_it_is_read_only(context: Context) -> None:
    """Every filesystem that stores something, once, with the labels the disk collector gives it."""
    collected = [m for m in Filesystem(FilesystemConfig(), context).collect() if m.name == "filesystem_read_only"]
    assert MOUNTPOINTS == {metric.labels["mountpoint"] for metric in collected}
    assert ("/dev/sda2", "/", "ext4") in {tuple(metric.labels.values()) for metric in collected}
    assert {0.0} == {metric.value for metric in collected}
    assert {MetricType.DISK_USAGE} == {metric.type for metric in collected}


@pytest.mark.parametrize("options", ["ro", "ro,errors=remount-ro", "rw,emergency_ro", "rw,shutdown"])
def test_a_filesystem_that_ends_writing_is_read_only(host: Path, context: Context, options: str) -> None:
    """The superblock's options say so, in the ordinary way or in ext4's after an error."""
    replace(host, "/dev/sda2 rw,errors=remount-ro", f"/dev/sda2 {options}")
    assert 1.0 == read_only(Filesystem(FilesystemConfig(), context))["/"]


def test_a_read_only_mount_of_a_healthy_filesystem_is_not(host: Path, context: Context) -> None:
    """A service's private, read-only view of the machine says nothing about the filesystem below."""
    replace(host, "/ / rw,relatime", "/ / ro,relatime")
    assert 0.0 == read_only(Filesystem(FilesystemConfig(), context))["/"]


def test_becoming_read_only_is_counted_and_warned_about(
    host: Path, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    """Each change from writable to read-only counts once; the way back does not."""
    collector = Filesystem(FilesystemConfig(), context)
    counts = []
    with caplog.at_level(logging.WARNING):
        counts.append(values(collector)["filesystem_remounts_read_only_total",])
        for old, new in (("rw,errors", "ro,errors"), ("ro,errors", "rw,errors"), ("rw,errors", "ro,errors")):
            replace(host, old, new)
            for _ in range(2):
                counts.append(values(collector)["filesystem_remounts_read_only_total",])
    assert [0, 1, 1, 1, 1, 2, 2] == counts
    assert 3 == len(caplog.records)
    assert "/dev/sda2 on / can no longer be written to" == caplog.records[0].message


def test_mounting_read_only_is_no_remount(host: Path, context: Context) -> None:
    """What is read-only from its first moment never was writable."""
    collector = Filesystem(FilesystemConfig(), context)
    values(collector)
    with (host / "proc/self/mountinfo").open("a") as table:
        table.write("50 27 8:33 / /usb rw - vfat /dev/sdc1 ro\n")
    collected = values(collector)
    assert 0 == collected["filesystem_remounts_read_only_total",]
    assert (1, 5) == (collected["filesystem_read_only", "/dev/sdc1", "/usb", "vfat"], collected["filesystem_mounts",])


def test_an_unmounted_filesystem_is_gone(host: Path, context: Context) -> None:
    """The number of filesystems goes down with it, and its figures are no longer reported."""
    collector = Filesystem(FilesystemConfig(), context)
    assert 4 == values(collector)["filesystem_mounts",]
    replace(host, "28 27 8:1 / /boot/efi rw,relatime - vfat /dev/sda1 rw\n", "")
    assert 3 == values(collector)["filesystem_mounts",]
    assert "/boot/efi" not in read_only(collector)


def test_excluded_mount_points_are_left_out(context: Context) -> None:
    """A shell pattern leaves mount points out."""
    collector = Filesystem(FilesystemConfig(exclude_mountpoints=["/media/*", "/boot/*"]), context)
    assert {"/", "/home/share"} == read_only(collector).keys()


def test_ext4_tells_its_errors(host: Path, context: Context) -> None:
    """Counts, the times of the first and the last, and all that was ever written; found by device number."""
    put(
        host / "sys/fs/ext4/sda2",
        errors_count="3\n",
        warning_count="1\n",
        first_error_time="1700000000\n",
        last_error_time="1700000500\n",
        lifetime_write_kbytes="2\n",
    )
    put(host / "sys/fs/ext4/dm-0", errors_count="0\n", first_error_time="0\n", last_error_time="0\n")
    links = host / "sys/dev/block"
    links.mkdir(parents=True)
    (links / "8:2").symlink_to("../../devices/pci/block/sda/sda2")
    (links / "253:0").symlink_to("../../devices/virtual/block/dm-0")
    collected = values(Filesystem(FilesystemConfig(), context))
    assert {
        ("filesystem_errors_total", "/dev/sda2", "ext4"): 3,
        ("filesystem_warnings_total", "/dev/sda2", "ext4"): 1,
        ("filesystem_first_error_seconds", "/dev/sda2", "ext4"): 1700000000,
        ("filesystem_last_error_seconds", "/dev/sda2", "ext4"): 1700000500,
        ("filesystem_written_bytes_total", "/dev/sda2", "ext4"): 2048,
        ("filesystem_errors_total", "/dev/mapper/vg-my\\x2ddisk", "ext4"): 0,
    } == {key: value for key, value in collected.items() if len(key) == 3}


def test_btrfs_tells_the_errors_of_every_device(host: Path, context: Context) -> None:
    """Each device of a filesystem has its counts, by kind; one that is missing has none."""
    uuid = "0b7a-11"
    put(host / f"sys/fs/btrfs/{uuid}/devinfo/1", error_stats="write_errs 2\nread_errs 1\nflush_errs 0\n")
    put(host / f"sys/fs/btrfs/{uuid}/devinfo/2", error_stats="invalid\n")
    put(host / "sys/fs/btrfs/features", raid56="0\n")
    collected = values(Filesystem(FilesystemConfig(), context))
    assert {
        ("filesystem_errors_total", uuid, "btrfs", "1", "write"): 2,
        ("filesystem_errors_total", uuid, "btrfs", "1", "read"): 1,
        ("filesystem_errors_total", uuid, "btrfs", "1", "flush"): 0,
    } == {key: value for key, value in collected.items() if len(key) == 5}


def test_a_proc_without_mounts_is_no_data(host: Path, context: Context) -> None:
    """No mountinfo is no failure."""
    (host / "proc/self/mountinfo").unlink()
    with pytest.raises(NoData, match="mountinfo"):
        Filesystem(FilesystemConfig(), context).collect()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """Mount a real, small ext4 for the test's time."""
    if os.geteuid() != 0:
        pytest.skip("mounting an image needs root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 (e2fsprogs) is not installed")
    file = tmp_path / "image"
    make_image(file)
    with mounted(file, tmp_path / "mount") as folder:
        yield folder


def of_image(collector: Filesystem, image: Path) -> tuple[float, dict[str, float]]:
    """Collect; return whether the image is read-only, and its other figures by name."""
    metrics = list(collector.collect())
    states = [m for m in metrics if m.name == "filesystem_read_only" and m.labels["mountpoint"] == str(image)]
    assert 1 == len(states)
    device = states[0].labels["device"]
    figures = {m.name: m.value for m in metrics if m.labels.get("device") == device and m is not states[0]}
    return states[0].value, figures


@pytest.mark.root
def test_a_real_ext4_that_is_remounted_is_noticed(image: Path) -> None:
    """A healthy image is writable without errors; remounted, it is read-only, and that is counted."""
    collector = Filesystem(FilesystemConfig(), Context())
    is_read_only, figures = of_image(collector, image)
    assert (0.0, 0.0) == (is_read_only, figures["filesystem_errors_total"])
    assert "filesystem_last_error_seconds" not in figures
    make_readonly(image, True)
    assert 1.0 == of_image(collector, image)[0]
    assert 1 == values(collector)["filesystem_remounts_read_only_total",]
    make_readonly(image, False)
    assert 0.0 == of_image(collector, image)[0]


@pytest.mark.root
def test_a_real_ext4_that_meets_an_error_is_noticed(image: Path) -> None:
    """An error the kernel is told to have met ends writing, where it is mounted so, and is counted with its time."""
    device = os.stat(image).st_dev
    name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel's ext4 has no trigger_fs_error")
    run("mount", "-o", "remount,errors=remount-ro", str(image))
    collector = Filesystem(FilesystemConfig(), Context())
    of_image(collector, image)
    trigger.write_text("a test")
    is_read_only, figures = of_image(collector, image)
    assert (1.0, 1.0) == (is_read_only, figures["filesystem_errors_total"])
    assert figures["filesystem_first_error_seconds"] == figures["filesystem_last_error_seconds"] > 1.7e9
