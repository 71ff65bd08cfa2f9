"""The spool's folder: the few file operations it needs, all relative to a descriptor of the folder.

The sender may not be able to reach the folder by name any more (its parents can be private), so it is opened before the
drop. Small enough to be replaced in tests by a disk that tears writes, fills up or fails at the n-th operation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import Protocol

from kon_agent.spool import lock

BLOCK_BYTES = 4096  # what a file's size is rounded up to on disk, as `du` counts
EXTENTS_FROM_BYTES = (
    4 * BLOCK_BYTES
)  # a fragmented file needs a further block for its map (ext4 keeps 4 extents inline)
NAME_BYTES = 32  # what a name takes in its folder, rounded up
# O_NONBLOCK: whatever has come to lie under a segment's name, a FIFO say, opening it never waits.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Facts:
    """What the folder says of one file.

    Attributes:
        size: its length, bytes.
        modified_s: when it was last written, wall time in seconds.
        disk_bytes: what it takes on disk.
    """

    size: int
    modified_s: float
    disk_bytes: int


class Disk(Protocol):
    """What the spool asks of its folder. Every operation may raise OSError."""

    def names(self) -> list[str]:
        """Return the names in the folder."""

    def facts(self, name: str) -> Facts | None:
        """Return what is known of a file; None where it is no regular file, and so none of ours."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`."""

    def create(self, name: str) -> int:
        """Create a new file and return its descriptor; the folder is synced, so that the file is there to stay."""

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`; after an error any part of it may be there."""

    def sync(self, fd: int) -> None:
        """Make what was written durable."""

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file back to `length` bytes."""

    def close(self, fd: int) -> None:
        """Close a file."""

    def harden(self, name: str) -> None:
        """Make what another process wrote to a file durable."""

    def unlink(self, name: str) -> None:
        """Remove a file; the folder is synced."""

    def free_bytes(self) -> int:
        """Return what the file system still has for an unprivileged user."""


class Folder:
    """A real folder.

    Args:
        fd: its descriptor; owned by this object.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock_fd = -1

    def lock(self) -> None:
        """Become the folder's only user, until this process ends or lets go of it.

        Raises:
            SpoolError: another process is; the message names its pid.
            OSError: the folder cannot be written.
        """
        if self._lock_fd < 0:
            self._lock_fd = lock.take(self._fd)

    def release(self) -> None:
        """Let go of the folder, and of its lock."""
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def names(self) -> list[str]:
        """Return the names in the folder."""
        return os.listdir(self._fd)

    def facts(self, name: str) -> Facts | None:
        """Return what is known of a file; None where it is no regular file."""
        info = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            return None
        return Facts(info.st_size, info.st_mtime, info.st_blocks * 512)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`."""
        fd = os.open(name, _READ, dir_fd=self._fd)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def create(self, name: str) -> int:
        """Create a new file and sync the folder."""
        fd = os.open(name, _CREATE, 0o600, dir_fd=self._fd)
        try:
            os.fsync(self._fd)  # else the file itself may be gone after a power cut (fsync(2), NOTES)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):  # empty and never to be used
                os.unlink(name, dir_fd=self._fd)
            raise
        return fd

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Make what was written durable; a file that somebody has removed meanwhile never is."""
        os.fdatasync(fd)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file being written was removed by somebody else")

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file back to `length` bytes."""
        os.ftruncate(fd, length)
        os.lseek(fd, length, os.SEEK_SET)

    def close(self, fd: int) -> None:
        """Close a file."""
        os.close(fd)

    def harden(self, name: str) -> None:
        """Make what another process wrote to a file durable."""
        fd = os.open(name, _READ, dir_fd=self._fd)  # Linux syncs through a descriptor for reading as well
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def unlink(self, name: str) -> None:
        """Remove a file and sync the folder."""
        os.unlink(name, dir_fd=self._fd)
        os.fsync(self._fd)

    def free_bytes(self) -> int:
        """Return what the file system still has for an unprivileged user."""
        fs = os.fstatvfs(self._fd)
        return fs.f_bavail * fs.f_frsize


def on_disk(size_bytes: int) -> int:
    """Return what a file of `size_bytes` takes on disk, at most."""
    blocks = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
    return blocks + BLOCK_BYTES if size_bytes > EXTENTS_FROM_BYTES else blocks


def in_words(err: OSError) -> str:
    """Return what failed and what to do about it, for the operator."""
    advice = {
        errno.ENOSPC: "; free some space, or lower cache.max_size",
        errno.EROFS: "; it may have been remounted after an error, see the kernel's log",
        errno.EIO: "; the disk may be failing, see the kernel's log",
    }
    return f"{err.strerror or type(err).__name__}{advice.get(err.errno or 0, '')}"
