"""The supervisor's orders to the sender: datagrams on a socket pair, file descriptors riding along.

attach  a ring to consume; carries two descriptors: the producer's area (read-only) and the consumer's (read-write)
close   the ring's producer is dead: drain it, then conclude it
stop    deliver what there is within `timeout_s`, then exit
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Literal

import msgspec

MAX_ORDER_BYTES = 1024


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """One order.

    Attributes:
        op: what to do.
        ring: the ring it is about, numbered by the supervisor.
        plugin, epoch, size_bytes: of a ring to attach.
        timeout_s: of a stop.
    """

    op: Literal["attach", "close", "stop"]
    ring: int = 0
    plugin: str = ""
    epoch: int = 0
    size_bytes: int = 0
    timeout_s: float = 0.0


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the supervisor's and the sender's end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def send(end: socket.socket, order: Order, fds: tuple[int, ...] = ()) -> None:
    """Send an order and the descriptors that belong to it.

    Raises:
        OSError: the sender is gone, or does not take its orders (its queue is full).
    """
    socket.send_fds(end, [msgspec.json.encode(order)], list(fds))


def receive(end: socket.socket) -> tuple[Order, list[int]] | None:
    """Return the next order and its descriptors; None once the supervisor is gone.

    Raises:
        BlockingIOError: there is none now.
    """
    data, fds, _, _ = socket.recv_fds(end, MAX_ORDER_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    try:
        return msgspec.json.decode(data, type=Order), fds
    except msgspec.DecodeError:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
