"""Small disks for the spool: a tmpfs that can be filled and made read-only, an ext4 image whose power can be cut.

A copy of the image file holds what the file system had written and nothing of what the kernel still kept in memory:
what a disk holds after a power cut. The copy takes some milliseconds while writing goes on, so it is a little worse.
Mounts are made and removed by path; a loop device goes with its mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kon_agent.spool.frame import Kind, scan
from tests.support.netns import run
from tests.support.waiting import wait_for

IMAGE_BYTES = 24 * 1024 * 1024  # small, so that a copy takes little time
Identity = tuple[str, int, int]
"""Plugin, epoch, sequence number."""


@contextlib.contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Have a file system in memory at `folder`."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "kon-test", str(folder))
    try:
        yield folder
    finally:
        unmount(folder)


def make_readonly(folder: Path, is_readonly: bool) -> None:
    """Remount a file system; one that is being written to is asked again until it lets go."""

    def is_done() -> bool:
        try:
            run("mount", "-o", f"remount,{'ro' if is_readonly else 'rw'}", str(folder))
        except AssertionError as err:  # busy: a file is open for writing
            assert "busy" in str(err), err
            return False
        return True

    wait_for(is_done, f"{folder} is remounted")


def fill(folder: Path) -> Path:
    """Leave no byte free in a file system; return the file that takes it all."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        block = bytes(4096)
        try:
            while True:
                file.write(block)
        except OSError as err:
            assert errno.ENOSPC == err.errno, err
    return filler


def make_image(path: Path) -> None:
    """Make an ext4 file system in a file."""
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0", str(path))


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image at `folder`; its journal is replayed first, as after a power cut."""
    folder.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """Unmount; a process that has just ended may still hold it for a moment."""

    def is_done() -> bool:
        with contextlib.suppress(AssertionError):
            run("umount", str(folder))
        return not os.path.ismount(folder)

    wait_for(is_done, f"{folder} is unmounted")


def copy(image: Path, target: Path) -> None:
    """Copy an image while it is in use: the power is cut, the copy is what is left."""
    shutil.copyfile(image, target)


def held(spool: Path) -> set[Identity]:
    """Return the records a spool holds whole, read without the spool's own bookkeeping."""
    found: set[Identity] = set()
    for path in spool.glob("*.seg"):
        for frame in scan(path.read_bytes()):
            if frame.kind is Kind.RECORD and not frame.is_damaged:
                found.add((frame.entry.plugin, frame.entry.epoch, frame.entry.seq))
    return found
