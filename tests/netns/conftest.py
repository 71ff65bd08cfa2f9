"""Two fresh network namespaces joined by a veth pair, made for one test and removed after it whatever happens.

The test itself runs in `here`; `there` is the machine at the other end. Nothing is made in the namespace pytest was
started in, so that an agent running on this machine neither sees these interfaces nor disturbs their counts. IPv6's
own chatter is off and neighbours are permanent: what crosses the link is what the test sends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kon_agent.receiver import pki
from tests.support.agent import AGENT_ID, Agent
from tests.support.receiver import Receiver

CLONE_NEWNET = 0x40000000  # linux/sched.h
DEADLINE_S = 10.0  # a veth delivers within microseconds; this is for a machine under load

_setns = ctypes.CDLL(None, use_errno=True).setns


def missing_feature() -> str:
    """Return what keeps these tests from running here, or nothing."""
    if os.geteuid() != 0:
        return "root"
    for tool in ("ip", "ping"):
        if shutil.which(tool) is None:
            return f"the program {tool}"
    return ""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def wait_until(is_so: Callable[[], bool]) -> bool:
    """Return whether `is_so` came true before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@dataclass(frozen=True)
class Namespace:
    """One end of the link: a namespace, its interface, and that interface's addresses."""

    name: str
    interface: str
    mac: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the calling thread in this namespace; sockets opened meanwhile stay there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert _setns(inside, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert _setns(before, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(before)
            os.close(inside)

    def send(self, frame: bytes, times: int = 1) -> None:
        """Put whole frames on the wire from this end."""
        with self.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((self.interface, 0))
            for _ in range(times):
                raw.send(frame)

    def ifindex(self) -> int:
        """Return the kernel's number of the interface."""
        with self.entered():
            return socket.if_nametoindex(self.interface)


@dataclass(frozen=True)
class Link:
    """The two ends; the test runs in `here`."""

    here: Namespace
    there: Namespace


@pytest.fixture
def link() -> Iterator[Link]:
    """Make the namespaces and the veth pair between them; enter `here`."""
    if missing := missing_feature():
        pytest.skip(f"needs {missing}")
    tag = f"kon-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    here = Namespace(f"{tag}-here", "kon0", "02:00:00:00:00:01", "10.77.0.1")
    there = Namespace(f"{tag}-there", "kon1", "02:00:00:00:00:02", "10.77.0.2")
    with ExitStack() as cleanup:
        for end in (here, there):
            try:
                run("ip", "netns", "add", end.name)
            except subprocess.CalledProcessError as err:
                pytest.skip(f"needs network namespaces: {err.stderr.decode().strip()}")
            cleanup.callback(run, "ip", "netns", "delete", end.name)
            with end.entered():
                for scope in ("all", "default"):
                    with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w", encoding="ascii") as file:
                        file.write("1")
        pair = ("link", "add", here.interface, "address", here.mac, "type", "veth")
        run("ip", "-n", here.name, *pair, "peer", there.interface, "address", there.mac, "netns", there.name)
        for end, other in ((here, there), (there, here)):
            ip = ("ip", "-n", end.name)
            run(*ip, "address", "add", f"{end.address}/24", "dev", end.interface)
            run(*ip, "link", "set", "lo", "up")
            run(*ip, "link", "set", end.interface, "up")
            neighbour = (other.address, "lladdr", other.mac, "nud", "permanent")
            run(*ip, "neighbour", "add", *neighbour, "dev", end.interface)
        cleanup.enter_context(here.entered())
        yield Link(here, there)


@dataclass(frozen=True)
class Station:
    """A receiver in `here`, and the folder with its certificates and those of an agent: AGENT_ID."""

    folder: Path
    receiver: Receiver
    prefix: tuple[str, ...]

    def agent(self, plugins: dict[str, dict[str, Any]]) -> Agent:
        """Return an agent of these plugins, not started yet."""
        return Agent(self.folder, self.receiver.port, self.folder, plugins, prefix=self.prefix)


@pytest.fixture
def station(link: Link) -> Iterator[Station]:
    """Start the receiver."""
    prefix = ("ip", "netns", "exec", link.here.name)
    with tempfile.TemporaryDirectory(prefix="kon-") as name:
        folder = Path(name)
        pki.init(folder, [])
        pki.agent(folder, AGENT_ID)
        with Receiver(folder, folder, prefix=prefix) as receiver:
            yield Station(folder, receiver, prefix)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], bool]:
    """Return the waiting function: a condition, with a deadline."""
    return wait_until
