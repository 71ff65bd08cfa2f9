"""The link monitor: a netlink socket that becomes readable when a network interface comes, goes or changes.

It says only *that* something changed; what there is now is read afresh, so that a lost message loses nothing.
"""

from __future__ import annotations

import errno
import socket

RTMGRP_LINK = 1  # rtnetlink(7): the multicast group of link changes
MAX_MESSAGES = 256  # per call: a flapping interface must not keep the supervisor's only thread here
_BUFFER_BYTES = 16 * 1024  # netlink(7): larger than any one datagram the kernel sends to a group


def open_link_monitor() -> socket.socket:
    """Return a non-blocking, close-on-exec socket subscribed to link changes; needs no privilege.

    Raises:
        OSError: no netlink in this kernel or sandbox, or no descriptor is left.
    """
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, RTMGRP_LINK))
    except OSError:
        sock.close()
        raise
    return sock


def drain(sock: socket.socket) -> bool:
    """Empty the socket and return whether any link changed since the last call.

    Raises:
        OSError: the socket is broken.
    """
    has_changed = False
    for _ in range(MAX_MESSAGES):
        try:
            sock.recv(_BUFFER_BYTES)
        except BlockingIOError:
            break
        except OSError as err:
            if err.errno != errno.ENOBUFS:  # ENOBUFS: messages were lost, hence something changed
                raise
        has_changed = True
    return has_changed
