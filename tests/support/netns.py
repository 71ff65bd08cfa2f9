"""Two network namespaces joined by a cable: one for the agent, one for the receiver and what stands before it.

Nothing is made in the namespace the tests were started in. A thread enters a namespace to open a socket there and
leaves again: the socket stays. Whatever happens, both namespaces are removed, and their interfaces with them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000  # linux/sched.h
PREFIX_BITS = 24

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespace:
    """One end of the cable: a namespace, its interface, and the interface's address."""

    name: str
    interface: str
    address: str

    @property
    def prefix(self) -> Sequence[str]:
        """Return what runs a command in this namespace, with the /sys that belongs to it."""
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calling thread in this namespace for a while."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            inside = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _enter(inside)
            finally:
                os.close(inside)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def ip(self, *arguments: str) -> str:
        """Run `ip` in this namespace and return what it says."""
        return run("ip", "-n", self.name, *arguments)

    def move(self, address: str) -> Namespace:
        """Take the interface's address away and give it another; return the namespace as it is now."""
        self.ip("address", "delete", f"{self.address}/{PREFIX_BITS}", "dev", self.interface)
        self.ip("address", "add", f"{address}/{PREFIX_BITS}", "dev", self.interface)
        return Namespace(self.name, self.interface, address)

    def xdp_programs(self) -> list[str]:
        """Return the interfaces that have an XDP program."""
        lines = self.ip("-o", "link", "show").splitlines()
        return [line.split(":")[1].strip() for line in lines if "prog/xdp" in line]


@contextmanager
def cable() -> Iterator[tuple[Namespace, Namespace]]:
    """Make the two ends, and remove them."""
    tag = f"kon-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    here = Namespace(f"{tag}-agent", "kon0", "10.78.0.1")
    there = Namespace(f"{tag}-receiver", "kon1", "10.78.0.2")
    with ExitStack() as cleanup:
        for end in (here, there):
            run("ip", "netns", "add", end.name)
            cleanup.callback(run, "ip", "netns", "delete", end.name)
        here.ip("link", "add", here.interface, "type", "veth", "peer", there.interface, "netns", there.name)
        for end in (here, there):
            end.ip("address", "add", f"{end.address}/{PREFIX_BITS}", "dev", end.interface)
            end.ip("link", "set", "lo", "up")
            end.ip("link", "set", end.interface, "up")
        yield here, there


def run(*command: str) -> str:
    """Run a command and return what it says.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
