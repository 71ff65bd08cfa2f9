"""The service manager's notification socket (sd_notify(3)): lines such as `READY=1`, one datagram each.

Absence is normal: without NOTIFY_SOCKET nothing is sent and nothing is said.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `state`, for instance `READY=1` or `STATUS=…`, and return whether the service manager took it.

    A manager that does not listen is not this process's trouble: no error is raised.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # unix(7): an abstract name begins with a zero byte
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        return False
    return True


def watchdog_interval_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """Return how often to send `WATCHDOG=1`, in seconds: half of what the manager waits.

    None where no watchdog is armed for this process. Source: sd_watchdog_enabled(3).
    """
    usec = environ.get("WATCHDOG_USEC", "")
    owner = environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if owner and owner != str(os.getpid() if pid is None else pid):
        return None
    return int(usec) / 2 / 1_000_000
