"""A disk in memory that fails, tears, fills up or loses its power at any operation, and knows what survives that.

`kill` leaves what the kernel had been given, `cut_power` only what had been synced, and of the rest whatever the test
chooses. It holds the rules a spool has to keep with a real disk: no second sync on a file whose sync has failed, no
more space than the quota at any moment.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kon_agent.spool.disk import BLOCK_BYTES, Facts

T = TypeVar("T")

KINDS = ("names", "facts", "read", "create", "write", "sync", "truncate", "close", "harden", "unlink", "free")


class Crash(BaseException):
    """The process is gone; nothing of it catches this."""


@dataclass
class File:
    """One file.

    Attributes:
        data: what reading it gives.
        synced: what is on the medium.
        is_sync_lost: a sync has failed: what it should have written never will be.
    """

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    modified_s: float = 0.0
    is_sync_lost: bool = False


@dataclass
class Fault:
    """What happens at one operation.

    Attributes:
        errno: the error it ends with; 0: none, the process crashes instead.
        is_late: it takes effect first.
        torn: of a write, how many bytes take effect.
    """

    errno: int = errno.EIO
    is_late: bool = False
    torn: int = 0


class FaultyDisk:
    """A `kon_agent.spool.disk.Disk`.

    Args:
        max_bytes: the quota the files and their folder must keep to, checked after every operation; 0: none.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.files: dict[str, File] = {}
        self.max_bytes = max_bytes
        self.faults: dict[int, Fault] = {}
        self.kinds: list[str] = []
        self.broken: dict[str, int] = {}  # kinds of operation that fail each time, with their errno
        self.unreadable: dict[str, int] = {}  # names that cannot be read, with their errno
        self.now_s = 0.0
        self.free = 1 << 40
        self._fds: dict[int, str] = {}
        self._next_fd = 3

    @property
    def operations(self) -> int:
        """How many there have been."""
        return len(self.kinds)

    def du(self) -> int:
        """Return what the folder takes, with a lock file and itself."""
        files = (-(-len(file.data) // BLOCK_BYTES) * BLOCK_BYTES for file in self.files.values())
        return sum(files) + 2 * BLOCK_BYTES

    def kill(self) -> None:
        """Lose the process: its descriptors, nothing else."""
        self._fds.clear()
        for file in self.files.values():
            file.is_sync_lost = False  # a successor has no way to know

    def cut_power(self, surviving: Callable[[bytes], bytes] = lambda tail: b"") -> None:
        """Lose everything not synced but what `surviving` makes of it."""
        self._fds.clear()
        for file in self.files.values():
            file.data = bytearray(file.synced + surviving(bytes(file.data[len(file.synced) :])))
            file.synced, file.is_sync_lost = bytes(file.data), False

    def _do(self, kind: str, effect: Callable[[int | None], T]) -> T:
        """Carry out an operation, or what is to happen instead; `effect` takes how much of a write gets through."""
        at = len(self.kinds)
        self.kinds.append(kind)
        if kind in self.broken:
            raise OSError(self.broken[kind], os.strerror(self.broken[kind]))
        fault = self.faults.get(at)
        if fault is None:
            result = effect(None)
        else:
            if fault.is_late:
                effect(None)
            elif fault.torn:
                effect(fault.torn)
            if not fault.errno:
                raise Crash
            raise OSError(fault.errno, os.strerror(fault.errno))
        if self.max_bytes:
            assert self.du() <= self.max_bytes, f"{self.du()} bytes after operation {at}, {kind}"
        return result

    def names(self) -> list[str]:
        """Return the names in the folder."""
        return self._do("names", lambda _: ["lock", *self.files])

    def facts(self, name: str) -> Facts | None:
        """Return what is known of a file."""

        def look(_: int | None) -> Facts:
            file = self._file(name)
            return Facts(len(file.data), file.modified_s, -(-len(file.data) // BLOCK_BYTES) * BLOCK_BYTES)

        return self._do("facts", look)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`."""
        if name in self.unreadable:
            raise OSError(self.unreadable[name], os.strerror(self.unreadable[name]))
        return self._do("read", lambda _: bytes(self._file(name).data[offset : offset + length]))

    def create(self, name: str) -> int:
        """Create a file."""

        def make(_: int | None) -> int:
            if name in self.files:
                raise FileExistsError(errno.EEXIST, name)
            self.files[name] = File(modified_s=self.now_s)
            self._next_fd += 1
            self._fds[self._next_fd] = name
            return self._next_fd

        return self._do("create", make)

    def write(self, fd: int, data: bytes) -> None:
        """Write `data`, or its beginning."""

        def put(torn: int | None) -> None:
            file = self._file(self._fds[fd])
            file.data += data[:torn]
            file.modified_s = self.now_s

        self._do("write", put)

    def sync(self, fd: int) -> None:
        """Make what was written durable."""
        file = self._file(self._fds[fd])
        assert not file.is_sync_lost, "a failed sync is never retried on its file"

        def settle(_: int | None) -> None:
            file.synced = bytes(file.data)

        at = len(self.kinds)
        try:
            self._do("sync", settle)
        except OSError:
            file.is_sync_lost = not (at in self.faults and self.faults[at].is_late)
            raise

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file back."""

        def cut(_: int | None) -> None:
            del self._file(self._fds[fd]).data[length:]

        self._do("truncate", cut)

    def close(self, fd: int) -> None:
        """Close a file; it is closed even where that fails (close(2))."""
        name = self._fds.pop(fd)
        self._do("close", lambda _: name)

    def harden(self, name: str) -> None:
        """Make a file durable."""

        def settle(_: int | None) -> None:
            self._file(name).synced = bytes(self._file(name).data)

        self._do("harden", settle)

    def unlink(self, name: str) -> None:
        """Remove a file."""
        self._file(name)

        def remove(_: int | None) -> None:
            del self.files[name]

        self._do("unlink", remove)

    def free_bytes(self) -> int:
        """Return what is free."""
        return self._do("free", lambda _: self.free)

    def _file(self, name: str) -> File:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, name)
        return self.files[name]
