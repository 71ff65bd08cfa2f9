"""What a worker that runs third-party code says on standard error, passed on to ours within bounds.

Such a worker is not given our own standard error: it could fill the disk that the log is on, or cut the log off. It
gets a pipe, and waits where it says more than is taken from it, as it does for anything else that is slow.

Invariants: at most TAKEN_BYTES are taken at a time, which is about once a second; at most PASSED_BYTES a minute are
passed on, and it is said how much was not. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import logging
import os

from kon_agent.clock import NS_PER_S

log = logging.getLogger(__name__)

TAKEN_BYTES = 64 * 1024  # what a pipe holds
PASSED_BYTES = 64 * 1024  # a minute: some twenty tracebacks
MINUTE_NS = 60 * NS_PER_S


class StderrPipe:
    """The pipe of one worker.

    Args:
        whose: what the log calls it.
        read_fd: our end, where another supervisor made it; None: a pipe is made.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self, whose: str, read_fd: int | None = None) -> None:
        self.write_fd = -1
        if read_fd is None:
            read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        self.read_fd = read_fd
        os.set_blocking(read_fd, False)
        self._whose = whose
        self._left_bytes = PASSED_BYTES
        self._held_back_bytes = 0
        self._minute_over_ns = 0

    def handed_out(self) -> None:
        """The worker has its end: let go of it, so that ours ends with the worker's."""
        os.close(self.write_fd)
        self.write_fd = -1

    def pass_on(self, now_ns: int) -> None:
        """Take what there is and pass on what may be."""
        if now_ns >= self._minute_over_ns:
            self._minute_over_ns = now_ns + MINUTE_NS
            self._left_bytes = PASSED_BYTES
            self._own_up()
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            said = os.read(self.read_fd, TAKEN_BYTES)
        except BlockingIOError:
            return
        passed = said[: self._left_bytes]
        self._left_bytes -= len(passed)
        self._held_back_bytes += len(said) - len(passed)
        with contextlib.suppress(OSError):  # nobody reads ours: the same happens to our own lines
            os.write(2, _harmless(passed))

    def _own_up(self) -> None:
        if self._held_back_bytes:
            log.warning("%s: %d bytes of its standard error left out", self._whose, self._held_back_bytes)
            self._held_back_bytes = 0

    def close(self) -> None:
        """Pass on its last words, and let go."""
        self._pass_on()
        self._own_up()
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)


def _harmless(said: bytes) -> bytes:
    """Return text that cannot steer a terminal: control characters but tab and newline become a question mark."""
    text = said.decode(errors="replace")
    return "".join(char if char.isprintable() or char in "\t\n" else "?" for char in text).encode()
