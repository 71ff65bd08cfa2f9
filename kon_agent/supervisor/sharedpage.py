"""A page the supervisor publishes and chosen children read."""

from __future__ import annotations

import os

from kon_agent.errors import KonError
from kon_agent.linux.memory import create_memfd, map_memory, reopen_readonly, unmap_memory
from kon_agent.page import PageReader, PageWriter, page_size


class SharedPage:
    """Memory for one `page`.

    Args:
        name: what /proc/PID/maps shows.
        payload_bytes: the longest value it holds.

    Raises:
        OSError: no memory or no descriptor left.
    """

    def __init__(self, name: str, payload_bytes: int) -> None:
        self._size = page_size(payload_bytes)
        self._open(create_memfd(name, self._size))

    def _open(self, fd: int) -> None:
        self._fd = fd
        self._ro_fd = reopen_readonly(self._fd)
        self._view = map_memory(self._fd, self._size, writable=True, inherit=False)
        self.writer = PageWriter(self._view)
        self.reader = PageReader(self._view)

    @property
    def fd(self) -> int:
        """The page for who goes on with it; it stays ours to close."""
        return self._fd

    def take_over(self, fd: int) -> None:
        """Be the page behind `fd`, which is ours from now on, instead.

        Raises:
            KonError: it has another size.
        """
        if (size := os.fstat(fd).st_size) != self._size:
            raise KonError(f"a page of {size} bytes is handed over, {self._size} were expected")
        self.release()
        self._open(fd)

    def map_readonly(self) -> memoryview:
        """Return the page for a reader. Called in the child that reads it."""
        return map_memory(self._ro_fd, self._size, writable=False)

    def map_writer(self) -> PageWriter:
        """Return the page for a writer. Called in the child that writes it; the supervisor must not write it then."""
        return PageWriter(map_memory(self._fd, self._size, writable=True))

    def map_both(self) -> tuple[PageWriter, PageReader]:
        """Return the page for a writer that takes over its predecessor's value. Called in that child."""
        view = map_memory(self._fd, self._size, writable=True)
        return PageWriter(view), PageReader(view)

    def release(self) -> None:
        """Let go of the memory."""
        del self.writer, self.reader
        unmap_memory(self._view)
        os.close(self._fd)
        os.close(self._ro_fd)
