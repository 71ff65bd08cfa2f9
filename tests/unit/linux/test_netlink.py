"""The link monitor."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import subprocess

import pytest

from kon_agent.linux import netlink


def test_the_monitor_never_blocks_and_dies_on_exec() -> None:
    """It is non-blocking and close-on-exec from birth, and quiet means unchanged."""
    with netlink.open_link_monitor() as sock:
        assert not sock.getblocking()
        assert fcntl.FD_CLOEXEC == fcntl.fcntl(sock, fcntl.F_GETFD)
        netlink.drain(sock)  # whatever this machine's links did meanwhile
        assert netlink.drain(sock) in (True, False)


class Scripted(socket.socket):
    """A socket whose recv follows a script: bytes are returned, errors raised, and then it would block."""

    script: list[bytes | OSError]

    def recv(self, *_: object) -> bytes:
        if not self.script:
            raise BlockingIOError
        step = self.script.pop(0)
        if isinstance(step, OSError):
            raise step
        return step


@pytest.mark.parametrize(
    ("expected", "script"),
    [(False, []), (True, [b"x"]), (True, [OSError(errno.ENOBUFS, "lost")]), (True, [b"x"] * 10_000)],
)
def test_drain_tells_whether_something_changed(expected: bool, script: list[bytes | OSError]) -> None:
    """A message, or the loss of one, is a change; a flood ends the call all the same."""
    with Scripted(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.script = list(script)
        assert expected == netlink.drain(sock)
        assert len(sock.script) == max(0, len(script) - netlink.MAX_MESSAGES)


def test_a_broken_socket_is_an_error() -> None:
    """Anything but ENOBUFS is raised."""
    with Scripted(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.script = [OSError(errno.EBADF, "closed")]
        with pytest.raises(OSError, match="closed"):
            netlink.drain(sock)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes a veth pair")
def test_a_new_link_wakes_the_monitor() -> None:
    """A link that appears makes the socket readable and drain True; afterwards it is quiet."""
    name = f"kt{os.getpid()}"
    with netlink.open_link_monitor() as sock:
        subprocess.run(["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"], check=True)
        try:
            assert [sock] == select.select([sock], [], [], 5)[0]
            assert netlink.drain(sock)
        finally:
            subprocess.run(["ip", "link", "del", f"{name}a"], check=True)
