"""The promises of the sender under supervision: whatever happens to it, its successor hears of every ring."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kon_agent import channel
from kon_agent.channel import Order
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import CacheConfig, Config, Duration
from kon_agent.lifecycle import State
from kon_agent.linkreport import LinkReport, LinkState
from kon_agent.process import Child, Role
from kon_agent.spec import SenderSpec
from kon_agent.spoolreport import Slots
from kon_agent.supervisor import courier as courier_module
from kon_agent.supervisor.courier import EXIT_GRACE_S, FOLDER_RETRY_S, SILENCE_MAX_S, START_PATIENCE_S, Courier, Parts
from kon_agent.supervisor.sharedring import SharedRing
from tests.unit.supervisor.fakes import START_NS, ended, fake_child, killed, sent

RING_SIZE = 16 * 1024


class Sender:
    """The sender's side of a courier whose process is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.rings: list[SharedRing] = []
        self.roles: list[Role] = []
        self.orders: socket.socket | None = None
        self.spec: SenderSpec | None = None
        self.refusal = 0  # errno of the next spawn
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        parts = Parts(None, self.doorbell, Slots(["cpu"]), lambda: self.rings)
        self.courier = Courier(self.config(3.0), parts)
        monkeypatch.setattr(courier_module, "spawn", self.spawn)

    def config(self, shutdown_timeout_s: float) -> Config:
        return Config(shutdown_timeout=Duration(shutdown_timeout_s), cache=CacheConfig(path=str(self.folder / "spool")))

    def spawn(self, role: Role, argument: object = None, prepare: Callable[[], object] | None = None) -> Child:
        """Stand in for `process.spawn`: keep what the child would keep."""
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        assert prepare is not None
        self.roles.append(role)
        self.hang_up()
        self.orders = socket.socket(fileno=os.dup(role.keep_fds[0]))
        self.spec = cast(SenderSpec, prepare())
        return fake_child()

    def heard(self) -> list[Order]:
        """Return the orders that have come in."""
        assert self.orders is not None
        orders = []
        with contextlib.suppress(BlockingIOError):
            while received := channel.receive(self.orders):
                orders.append(received[0])
                for fd in received[1]:
                    os.close(fd)
        return orders

    def report(self, **fields: Any) -> None:
        """Publish a report as the sender does."""
        assert self.spec is not None
        self.spec.report.publish(LinkReport(**fields).encode())

    def ring(self, is_closed: bool = False) -> SharedRing:
        """Make a ring that waits to be consumed."""
        ring = SharedRing(len(self.rings) + 1, "cpu", RING_SIZE)
        ring.is_closed = is_closed
        self.rings.append(ring)
        return ring

    def hang_up(self) -> None:
        """Die, as far as orders are concerned."""
        if self.orders is not None:
            self.orders.close()
            self.orders = None

    def close(self) -> None:
        self.hang_up()
        self.courier._on_gone()
        self.courier.release()
        for ring in self.rings:
            ring.release()
        os.close(self.doorbell)


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sender]:
    made = Sender(monkeypatch, tmp_path)
    yield made
    made.close()


def attach(ring: SharedRing) -> Order:
    return Order("attach", ring.number, ring.plugin, ring.epoch, ring.size_bytes)


def test_a_new_sender_hears_of_every_ring(sender: Sender) -> None:
    """Those of the living, and those of the dead with their end."""
    first, second = sender.ring(is_closed=True), sender.ring()
    sender.courier.spawn(START_NS)
    assert [attach(first), Order("close", first.number), attach(second)] == sender.heard()


def test_news_reach_the_sender(sender: Sender) -> None:
    """A ring made later is announced, and dismissed once its producer is dead."""
    sender.courier.spawn(START_NS)
    ring = sender.ring()
    sender.courier.announce(ring)
    sender.courier.dismiss(ring)
    assert [attach(ring), Order("close", ring.number)] == sender.heard()


def test_orders_without_a_sender_are_for_the_next_one(sender: Sender) -> None:
    """Nobody to tell is no error: the next one is told everything."""
    ring = sender.ring()
    sender.courier.announce(ring)
    sender.courier.spawn(START_NS)
    assert [attach(ring)] == sender.heard()


def test_orders_to_a_dead_sender_are_for_the_next_one(sender: Sender) -> None:
    """Between its death and its reaping nothing is lost, and nobody is killed for it."""
    sender.courier.spawn(START_NS)
    sender.hang_up()
    ring = sender.ring()
    sender.courier.announce(ring)
    assert [] == sent(sender.courier.child)
    sender.courier.gone(killed(sender.courier.child), START_NS)
    sender.courier.spawn(START_NS)
    assert [attach(ring)] == sender.heard()


def test_a_deaf_sender_is_replaced(sender: Sender) -> None:
    """An order lost could be a ring lost: the next sender hears of all of them, and is not held deaf itself."""
    sender.courier.spawn(START_NS)
    ring = sender.ring()
    for _ in range(2000):  # many times what the channel holds
        sender.courier.dismiss(ring)
    sender.courier.look(START_NS)
    assert [signal.SIGABRT] == sent(sender.courier.child)
    sender.courier.gone(killed(sender.courier.child, signal.SIGABRT), START_NS)
    sender.courier.spawn(START_NS)
    sender.courier.look(START_NS)
    assert ([attach(ring)], []) == (sender.heard(), sent(sender.courier.child))


def test_every_ring_there_may_be_fits_the_channel(sender: Sender) -> None:
    """A new sender is told of all rings before it reads its first order: five plugins, nine rings each."""
    sender.rings = [sender.ring(is_closed=True)] * 45
    sender.courier.spawn(START_NS)
    assert 90 == len(sender.heard())
    sender.rings = sender.rings[:1]


def test_the_sender_gets_the_network_and_three_descriptors(sender: Sender) -> None:
    """Its orders, the doorbell, and the spool's folder to write in; it finishes its work when the supervisor dies."""
    sender.courier.spawn(START_NS)
    [role] = sender.roles
    assert ("kon-agent: sender", 3, role.keep_fds[2:], frozenset({"network"}), None) == (
        role.title,
        len(role.keep_fds),
        role.profile.write,
        role.profile.allow,
        role.profile.death_signal,
    )


def test_without_a_folder_there_is_a_sender_all_the_same(sender: Sender) -> None:
    """Where the spool cannot be had, the sender is told why, and keeps the records in the rings."""
    (sender.folder / "spool").symlink_to("/nowhere")
    sender.courier.spawn(START_NS)
    assert sender.spec is not None
    assert (-1, 2, ()) == (sender.spec.spool.folder_fd, len(sender.roles[0].keep_fds), sender.roles[0].profile.write)
    assert "cannot be used" in sender.spec.spool.obstacle


def test_a_folder_that_can_be_had_later_gets_its_sender(sender: Sender) -> None:
    """It is looked for again every so often, and a sender that runs without one is replaced then, not before."""
    obstacle = sender.folder / "spool"
    obstacle.symlink_to("nowhere")
    sender.courier.is_wanted = True
    sender.courier.spawn(START_NS)
    sender.report(alive_ns=START_NS)
    later_ns = START_NS + int(FOLDER_RETRY_S * NS_PER_S)
    sender.courier.look(later_ns - 1, later_ns)
    sender.courier.look(later_ns, later_ns)
    states = [sender.courier.lifecycle.state]
    obstacle.unlink()
    again_ns = later_ns + int(FOLDER_RETRY_S * NS_PER_S)
    for now_ns in (again_ns - 1, again_ns):
        sender.courier.look(now_ns, again_ns)
        states.append(sender.courier.lifecycle.state)
    assert [State.RUNNING, State.RUNNING, State.STOPPING] == states


def test_a_sender_that_cannot_be_forked_leaves_no_descriptor(sender: Sender) -> None:
    """Its channel is closed at both ends."""
    sender.refusal = errno.EAGAIN
    before = set(os.listdir("/proc/self/fd"))
    sender.courier.spawn(START_NS)
    assert State.BACKOFF is sender.courier.lifecycle.state
    assert before >= set(os.listdir("/proc/self/fd"))


def test_stopping_tells_how_long_it_may_deliver(sender: Sender) -> None:
    """The kill comes only after that time and a little more."""
    sender.courier.spawn(START_NS)
    sender.courier.stop(START_NS)
    assert [Order("stop", timeout_s=3.0)] == sender.heard()
    assert START_NS + int((3.0 + EXIT_GRACE_S) * NS_PER_S) == sender.courier.next_deadline_ns()


def test_another_configuration_is_another_sender(sender: Sender) -> None:
    """The one that runs is ended, within the new configuration's grace, and its successor gets the new one."""
    sender.courier.spawn(START_NS)
    sender.courier.reconfigure(sender.config(30.0), START_NS)
    assert START_NS + int((30.0 + EXIT_GRACE_S) * NS_PER_S) == sender.courier.next_deadline_ns()
    sender.courier.gone(ended(sender.courier.child), START_NS)
    assert sender.courier.is_due(START_NS)


def test_its_report_is_shown(sender: Sender) -> None:
    """What it says of its connection; before that, nothing; without it, why there is none."""
    assert "the sender is not running" == sender.courier.report().detail
    sender.courier.spawn(START_NS)
    sender.report(state=LinkState.CONNECTED, address="a predecessor's", alive_ns=START_NS - 1)
    assert (LinkState.DISCONNECTED, "", "") == (
        sender.courier.report().state,
        sender.courier.report().address,
        sender.courier.report().detail,
    )
    sender.report(state=LinkState.CONNECTED, address="edge:7843", alive_ns=START_NS)
    assert "edge:7843" == sender.courier.report().address
    sender.courier.gone(ended(sender.courier.child, 70), START_NS)
    assert (sender.courier.report().detail or "").startswith("exited with 70")


def test_its_report_is_its_heartbeat(sender: Sender) -> None:
    """The first makes it run, silence after it is a hang, and a predecessor's counts for nothing."""
    sender.courier.spawn(START_NS)
    sender.report(alive_ns=START_NS - 1)
    sender.courier.look(START_NS)
    states = [sender.courier.lifecycle.state]
    sender.report(alive_ns=START_NS)
    sender.courier.look(START_NS)
    states.append(sender.courier.lifecycle.state)
    assert [State.STARTING, State.RUNNING] == states
    sender.courier.look(START_NS + int(SILENCE_MAX_S * NS_PER_S))
    assert [] == sent(sender.courier.child)
    sender.courier.look(START_NS + int(SILENCE_MAX_S * NS_PER_S) + 1)
    assert [signal.SIGABRT] == sent(sender.courier.child)


def test_its_start_may_take_longer(sender: Sender) -> None:
    """Importing the QUIC stack on a slow card is no hang."""
    sender.courier.spawn(START_NS)
    sender.courier.look(START_NS + int(START_PATIENCE_S * NS_PER_S))
    assert [] == sent(sender.courier.child)
    sender.courier.look(START_NS + int(START_PATIENCE_S * NS_PER_S) + 1)
    assert [signal.SIGABRT] == sent(sender.courier.child)


def test_restarts_leak_no_descriptor(sender: Sender) -> None:
    """Every incarnation's channel is closed with it."""
    sender.courier.spawn(START_NS)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        sender.courier.gone(killed(sender.courier.child), START_NS)
        sender.courier.spawn(START_NS)
    assert before >= set(os.listdir("/proc/self/fd"))
