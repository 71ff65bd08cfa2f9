"""The spool's folder: the few file operations it needs, all relative to a descriptor of the folder.

The sender may not be able to reach the folder by name any more (its parents can be private), so it is opened before the
drop. Small enough to be replaced in tests by a disk that tears writes, fills up or fails at the n-th operation.
"""

from __future__ import annotations

import fcntl
import os
from typing import Protocol

from kon_agent.errors import SpoolError

BLOCK_BYTES = 4096  # what a file's size is rounded up to on disk, as `du` counts
_LOCK = "lock"


class Disk(Protocol):
    """What the spool asks of its folder. Every operation may raise OSError."""

    def names(self) -> list[str]:
        """Return the names in the folder."""

    def size(self, name: str) -> int:
        """Return a file's length, bytes."""

    def modified_s(self, name: str) -> float:
        """Return when a file was last written, wall time in seconds."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`."""

    def create(self, name: str) -> int:
        """Create a new file and return its descriptor; the folder is synced, so that the file is there to stay."""

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`."""

    def sync(self, fd: int) -> None:
        """Make what was written durable."""

    def close(self, fd: int) -> None:
        """Close a file."""

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
        """Become the folder's only user, until this process ends.

        Raises:
            SpoolError: another process is; the message names its pid.
            OSError: the folder cannot be written.
        """
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise SpoolError(
                f"the spool is in use by pid {holder}; stop that agent or choose another cache.path"
            ) from err
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def release(self) -> None:
        """Let go of the folder, and of its lock."""
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)

    def names(self) -> list[str]:
        """Return the names in the folder."""
        return os.listdir(self._fd)

    def size(self, name: str) -> int:
        """Return a file's length, bytes."""
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_size

    def modified_s(self, name: str) -> float:
        """Return when a file was last written, wall time in seconds."""
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mtime

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def create(self, name: str) -> int:
        """Create a new file and sync the folder."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            os.fsync(self._fd)  # else the file itself may be gone after a power cut (fsync(2), NOTES)
        except OSError:
            os.close(fd)
            raise
        return fd

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Make what was written durable."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Close a file."""
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
    """Return what a file of `size_bytes` takes on disk."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
