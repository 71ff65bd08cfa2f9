"""Processes that are not there: what the supervisor's parts believe to have spawned, in the test's hands."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import LogConfig, PluginConfig
from kon_agent.linux.memory import map_memory, unmap_memory
from kon_agent.linux.pidfd import PidFd
from kon_agent.process import Child, Exit, Role
from kon_agent.ring import CONSUMER_BYTES, Consumer, Producer, producer_bytes
from kon_agent.sender.lane import Lane
from kon_agent.spec import WorkerSpec
from kon_agent.supervisor import unit as unit_module
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.supervisor.unit import Surroundings, Unit

START_NS = 1000 * NS_PER_S  # long after boot, so that no time before it is negative
_PIDS = itertools.count(100_000)


class FakePidFd(PidFd):
    """A process that notes its signals and does nothing about them."""

    def __init__(self) -> None:
        self.pid = next(_PIDS)
        self._fd = -1
        self.sent: list[int] = []

    def send(self, signum: int) -> bool:
        """Note the signal."""
        self.sent.append(signum)
        return True


def fake_child() -> Child:
    """Return a child that is not there."""
    pidfd = FakePidFd()
    return Child(pidfd.pid, pidfd)


def sent(child: Child | None) -> list[int]:
    """Return the signals a fake child has been sent."""
    assert child is not None
    return cast(FakePidFd, child.pidfd).sent


def killed(child: Child | None, signum: signal.Signals = signal.SIGKILL) -> Exit:
    """Return the end of a child by a signal."""
    assert child is not None
    return Exit(child.pid, signum=signum)


def ended(child: Child | None, code: int = 0) -> Exit:
    """Return the end of a child of its own accord."""
    assert child is not None
    return Exit(child.pid, code=code)


def consume(ring: SharedRing) -> tuple[Lane, Callable[[], None]]:
    """Return the sender's end of a ring, and what unmaps it again."""
    producer_fd, consumer_fd = ring.consumer_fds()
    producer = map_memory(producer_fd, producer_bytes(ring.size_bytes), writable=False)
    consumer = map_memory(consumer_fd, CONSUMER_BYTES, writable=True)
    lane = Lane(ring.plugin, ring.epoch, Consumer(producer, consumer, ring.size_bytes))
    lane.is_closed = ring.is_closed

    def unmap() -> None:
        lane.__dict__.clear()  # its views of the memory go first
        unmap_memory(producer)
        unmap_memory(consumer)

    return lane, unmap


def drain(ring: SharedRing) -> None:
    """Be the sender for one ring: have everything acknowledged, and conclude it where it is closed."""
    lane, unmap = consume(ring)
    while portion := lane.take(1000, 1 << 20, 0):
        lane.settle(portion)
    if lane.is_drained():
        lane.conclude()
    unmap()


@dataclass
class Plugin:
    """A unit whose workers are not there, and what it has said to the sender."""

    unit: Unit
    announced: list[SharedRing] = field(default_factory=list)
    dismissed: list[SharedRing] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    specs: list[WorkerSpec] = field(default_factory=list)
    refusal: OSError | None = None  # what the next spawn fails with

    @property
    def producer(self) -> Producer:
        """The current worker's end of its ring."""
        return self.specs[-1].producer

    def spawn(self, role: Role, argument: object = None, prepare: Callable[[], object] | None = None) -> Child:
        """Stand in for `process.spawn`."""
        if self.refusal is not None:
            raise self.refusal
        assert prepare is not None
        self.roles.append(role)
        self.specs.append(cast(WorkerSpec, prepare()))
        return fake_child()

    def start(self, now_ns: int = START_NS) -> None:
        """Spawn a worker and have it show its first heartbeat."""
        self.unit.spawn(now_ns)
        self.producer.beat(now_ns, 1, 0)
        self.unit.look(now_ns)

    def die(self, now_ns: int = START_NS) -> None:
        """Have the worker killed."""
        self.unit.gone(killed(self.unit.child), now_ns)

    def release(self) -> None:
        """Let go of every ring, and of the doorbell."""
        os.close(self.unit._around.doorbell)
        self.unit.release()


def make_plugin(monkeypatch: pytest.MonkeyPatch, name: str = "cpu", config: PluginConfig | None = None) -> Plugin:
    """Return a unit in the test's hands; all those of one test share what stands in for `spawn`."""
    plugins: list[Plugin] = []
    surroundings = Surroundings(
        user=None,
        doorbell=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
        log=LogConfig(),
        announce=lambda ring: plugins[0].announced.append(ring),
        dismiss=lambda ring: plugins[0].dismissed.append(ring),
        next_ring_number=itertools.count(1).__next__,
    )
    unit = Unit(name, "module:Class", config or PluginConfig(), surroundings)
    plugins.append(Plugin(unit))
    monkeypatch.setattr(unit_module, "spawn", plugins[0].spawn)
    return plugins[0]
