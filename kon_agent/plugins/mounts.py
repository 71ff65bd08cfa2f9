"""The mount table: which filesystems that store something are mounted, and where each is best asked.

Source: /proc/self/mountinfo and /proc/filesystems (proc(5)). Pure: text in, mounts out. What is reported
follows df(1), with the exceptions below.

* Stored on a disk: every type without `nodev` in /proc/filesystems. On the network, or on flash and pools the
  kernel manages without a block device: the types of NETWORK and DEVICELESS. Everything else is no storage:
  pseudo filesystems, and tmpfs, which is memory and counted by the `memory` collector.
* The root filesystem is reported whatever its type: overlay in a container, tmpfs on a diskless host. Any
  other overlay is not: its numbers are those of the filesystem its upper directory lies on.
* Read-only images (IMAGES: snaps, live media) are full by construction and say nothing.
* A filesystem mounted more than once (bind mounts, btrfs subvolumes) is reported once: nearest to the root.
* A mount that another one covers cannot be asked: its path answers for the one on top.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import msgspec

NETWORK = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "vboxsf", "ceph", "afs", "lustre", "beegfs", "fuse")
)
"""Types that another machine, or another process, answers for; `fuse.sshfs` and the like count as `fuse`."""

DEVICELESS = frozenset(("zfs", "ubifs", "jffs2", "yaffs2"))
"""Types that keep data without one block device of their own, hence `nodev`."""

IMAGES = frozenset(("squashfs", "erofs", "cramfs", "romfs", "iso9660", "fuse.snapfuse", "fuse.squashfuse"))
"""Types that are written once, as a whole."""

_ESCAPE = re.compile(r"\\([0-7]{3})")  # space, tab, newline and backslash, mangle_path() in the kernel


class Mount(msgspec.Struct, frozen=True):
    """One line of mountinfo.

    Attributes:
        mount_id, parent_id: the mount's place in the tree.
        device_number: `major:minor` of the filesystem (its superblock).
        root: the directory of the filesystem that is mounted.
        mountpoint: where; undecodable bytes as surrogates, so that it still is a path.
        fstype: the type, with its subtype: `fuse.sshfs`.
        source: the device, or what the filesystem calls so: `server:/export`.
    """

    mount_id: int
    parent_id: int
    device_number: str
    root: str
    mountpoint: str
    fstype: str
    source: str

    def labels(self) -> Mapping[str, str]:
        """Return the series' identity; undecodable bytes are replaced, as protobuf takes UTF-8 only."""
        return {
            "device": _printable(self.source),
            "mountpoint": _printable(self.mountpoint),
            "fstype": self.fstype,
        }


def storage(mountinfo: bytes, filesystems: bytes) -> list[Mount]:
    """Return the mounts to ask, in the kernel's order, from the texts of mountinfo and filesystems."""
    disk_types = _parse_filesystems(filesystems)
    mounts = _reachable(list(_parse_mountinfo(mountinfo)))
    return [mount for mount in mounts if _stores(mount, disk_types)]


def once_each(mounts: Iterable[Mount]) -> list[Mount]:
    """Return one mount per filesystem, chosen as df does.

    The one nearer to the root wins, unless it shows only a deeper part of the filesystem. Exports of one
    server are kept apart by their source: they share a device number, but each was mounted on purpose.
    """
    chosen: dict[tuple[str, str], Mount] = {}
    for mount in mounts:
        key = (mount.device_number, mount.source if _base(mount.fstype) in NETWORK else "")
        seen = chosen.get(key)
        if seen is None or (len(mount.mountpoint) < len(seen.mountpoint) and len(mount.root) <= len(seen.root)):
            chosen[key] = mount
    return list(chosen.values())


def _parse_mountinfo(text: bytes) -> Iterator[Mount]:
    for line in text.decode("utf-8", "surrogateescape").split("\n"):
        if not line:
            continue
        fields = line.split(" ")
        separator = fields.index("-", 6)  # any number of optional fields stands before it
        yield Mount(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            device_number=fields[2],
            root=_unescape(fields[3]),
            mountpoint=_unescape(fields[4]),
            fstype=fields[separator + 1],
            source=_unescape(fields[separator + 2]),
        )


def _parse_filesystems(text: bytes) -> frozenset[str]:
    """Return the types that need a block device: those not marked `nodev`."""
    rows = (line.partition("\t") for line in text.decode().split("\n"))
    return frozenset(name for mark, _, name in rows if name and mark != "nodev")


def _stores(mount: Mount, disk_types: frozenset[str]) -> bool:
    base = _base(mount.fstype)
    if mount.fstype in IMAGES:
        return False
    return mount.mountpoint == "/" or base in disk_types or base in NETWORK or base in DEVICELESS


def _reachable(mounts: list[Mount]) -> list[Mount]:
    """Return the mounts whose mount point leads to them, and not to one mounted on top later.

    A mount is covered where another one stands on its own root, or where it, or one it stands on, has a
    sibling higher up its path: mounted after it, or it would stand on that one.
    """
    by_id = {mount.mount_id: mount for mount in mounts}
    # The top of the tree may name itself as its parent (proc(5)); that covers nothing.
    places = {(m.parent_id, m.mountpoint) for m in mounts if m.parent_id != m.mount_id}

    def is_buried(mount: Mount) -> bool:
        if any((mount.parent_id, above) in places for above in _directories_above(mount.mountpoint)):
            return True
        parent = by_id.get(mount.parent_id, mount)
        return parent is not mount and is_buried(parent)

    return [m for m in mounts if (m.mount_id, m.mountpoint) not in places and not is_buried(m)]


def _directories_above(path: str) -> Iterator[str]:
    while path != "/":
        path = path.rpartition("/")[0] or "/"
        yield path


def _base(fstype: str) -> str:
    return fstype.partition(".")[0]


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


def _printable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
