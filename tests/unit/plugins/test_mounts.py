"""Which mounts are reported."""

from __future__ import annotations

import pytest

from kon_agent.plugins.mounts import once_each, storage

FILESYSTEMS = (
    b"nodev\tproc\nnodev\ttmpfs\nnodev\toverlay\nnodev\tnfs4\nnodev\tfuse\nnodev\tautofs\n"
    b"nodev\tzfs\n\text4\n\tvfat\n\tfuseblk\n\tbtrfs\n\tsquashfs\n"
)


def line(
    mount_id: int,
    parent_id: int,
    mountpoint: str,
    fstype: str = "ext4",
    *,
    device: str = "8:1",
    root: str = "/",
    source: str = "/dev/sda1",
    optional: str = "",
) -> str:
    """Return one line of mountinfo."""
    return f"{mount_id} {parent_id} {device} {root} {mountpoint} rw {optional}- {fstype} {source} rw\n"


ROOT = line(1, 0, "/", device="8:9", source="/dev/sda9")


def reported(*lines: str) -> list[str]:
    """Return the mount points chosen from a mount table."""
    return [mount.mountpoint for mount in once_each(storage("".join(lines).encode(), FILESYSTEMS))]


@pytest.mark.parametrize(
    "fstype", ["ext4", "vfat", "btrfs", "fuseblk", "nfs4", "cifs", "fuse.sshfs", "zfs", "ubifs", "9p"]
)
def test_storage_is_reported(fstype: str) -> None:
    """Disks, network filesystems, FUSE, and the pools and flash the kernel manages without a block device."""
    assert ["/", "/data"] == reported(ROOT, line(2, 1, "/data", fstype))


@pytest.mark.parametrize(
    "fstype",
    [
        "proc",
        "tmpfs",
        "devtmpfs",
        "autofs",
        "cgroup2",
        "nsfs",
        "overlay",
        "squashfs",
        "iso9660",
        "fuse.snapfuse",
    ],
)
def test_what_stores_nothing_is_left_out(fstype: str) -> None:
    """Pseudo filesystems, memory, read-only images, and overlays whose numbers another mount has."""
    assert ["/"] == reported(ROOT, line(2, 1, "/data", fstype))


@pytest.mark.parametrize("fstype", ["overlay", "tmpfs", "ext4"])
def test_the_root_is_reported_whatever_its_type(fstype: str) -> None:
    """A container's overlay and a diskless host's tmpfs are what that host writes to."""
    assert ["/"] == reported(line(1, 0, "/", fstype))


@pytest.mark.parametrize("order", [1, -1])
def test_a_bind_mount_is_reported_once(order: int) -> None:
    """Of several mounts of one filesystem the one nearest to the root is kept, whatever their order."""
    mounts = [line(2, 1, "/srv"), line(3, 1, "/home/ann/data", root="/ann")]
    assert ["/srv"] == reported(*mounts[::order])


def test_a_deeper_part_does_not_win() -> None:
    """A bind mount of a subdirectory is not preferred for its shorter path (df's rule)."""
    assert ["/srv/data"] == reported(line(2, 1, "/srv/data"), line(3, 1, "/mnt", root="/deep"))


def test_exports_of_one_server_are_kept_apart() -> None:
    """Two exports share the device number of their server and are both reported."""
    assert ["/a", "/b"] == reported(
        line(2, 1, "/a", "nfs4", device="0:50", source="server:/a"),
        line(3, 1, "/b", "nfs4", device="0:50", source="server:/b"),
    )


def test_a_mount_covered_at_its_own_mount_point_is_left_out() -> None:
    """Of two filesystems at one mount point only the upper one answers, so only it is reported."""
    mounts = storage((ROOT + line(2, 1, "/mnt", device="8:1") + line(3, 2, "/mnt", device="8:2")).encode(), FILESYSTEMS)
    assert ["8:9", "8:2"] == [mount.device_number for mount in mounts]


def test_a_mount_buried_under_a_later_one_is_left_out() -> None:
    """A filesystem mounted over /mnt hides what was mounted below it before, and what is mounted on that."""
    assert ["/", "/mnt"] == reported(
        ROOT,
        line(2, 1, "/mnt/old", device="8:2"),
        line(3, 2, "/mnt/old/sub", device="8:3"),
        line(4, 1, "/mnt", device="8:4"),
    )


def test_a_mount_on_the_upper_of_two_is_reported() -> None:
    """What is mounted on the upper filesystem is reached through it."""
    assert ["/", "/mnt", "/mnt/sub"] == reported(
        ROOT,
        line(2, 1, "/mnt", device="8:2"),
        line(3, 2, "/mnt", device="8:3"),
        line(4, 3, "/mnt/sub", device="8:4"),
    )


def test_the_real_root_over_the_initial_one() -> None:
    """The root mounted over the kernel's rootfs is reported, with what stands on it."""
    assert ["/", "/boot"] == reported(
        line(1, 1, "/", "rootfs", device="0:1"), line(2, 1, "/", device="8:2"), line(3, 2, "/boot")
    )


def test_a_root_that_is_its_own_parent_buries_nothing() -> None:
    """The top of the tree may name itself as parent (proc(5)); its children are still reachable."""
    assert ["/", "/boot"] == reported(line(1, 1, "/", device="8:9"), line(2, 1, "/boot"))


def test_escapes_and_optional_fields_are_read() -> None:
    """Octal escapes are decoded; any number of optional fields may stand before the separator."""
    text = line(1, 0, r"/my\040disk\134x", source=r"/dev/a\011b", optional="shared:1 master:2 ")
    [mount] = storage(text.encode(), FILESYSTEMS)
    assert ("/my disk\\x", "/dev/a\tb", "ext4") == (mount.mountpoint, mount.source, mount.fstype)


def test_a_mount_point_that_is_no_utf8_has_a_printable_label() -> None:
    """The path keeps its bytes, so that it can be asked; the label is valid UTF-8, so that it can be sent."""
    [mount] = storage(line(1, 0, "/caf\udce9").encode("utf-8", "surrogateescape"), FILESYSTEMS)
    assert (b"/caf\xe9", "/caf�") == (
        mount.mountpoint.encode("utf-8", "surrogateescape"),
        mount.labels()["mountpoint"],
    )
