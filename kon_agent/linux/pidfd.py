"""A process held by descriptor: a signal sent through it can never reach a later one of the same number."""

from __future__ import annotations

import os
import select
import signal


class PidFd:
    """One process; any selector finds the descriptor readable once it has ended (pidfd_open(2)).

    Raises:
        OSError: no such process, or no descriptor is left.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return the descriptor for a selector; -1 once closed."""
        return self._fd

    def send(self, signum: int) -> bool:
        """Send a signal and return whether the process was still there to take it.

        Raises:
            PermissionError: the process belongs to somebody else.
        """
        if self._fd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._fd, signum)
        except ProcessLookupError:
            return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds and return whether the process has ended."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def close(self) -> None:
        """Give the descriptor back; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
