"""kon_agent.supervisor.network: when interfaces are looked at, and how much is done at a time."""

from __future__ import annotations

import itertools
import selectors
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from kon_agent import clock
from kon_agent.bpf import interfaces, layout
from kon_agent.bpf.flowcount import FlowCount
from kon_agent.bpf.interfaces import NetInterface
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.bpf.origin import origin_of
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import EbpfConfig, FlowsConfig, Size
from kon_agent.errors import BpfError
from kon_agent.linux import netlink
from kon_agent.supervisor import network
from kon_agent.supervisor.network import NEVER_NS, Flowing, NetworkWatch

ATTACH_NS = 16 * NS_PER_S // 1000


class World:
    """The interfaces there are, the counters attached to them, and the clock; all links take their time."""

    def __init__(self) -> None:
        self.now_ns = 1000 * NS_PER_S
        self.names: dict[int, str] = {}
        self.busy: set[int] = set()
        self.attached: dict[int, Interface] = {}
        self.mended: list[tuple[int, bool]] = []
        self.moved: set[int] = set()
        self.story: list[str] = []
        self.error: Exception | None = None

    def scan(self) -> list[NetInterface]:
        return [NetInterface(number, name, is_up=True, is_loopback=False) for number, name in self.names.items()]

    def watched(self) -> dict[int, str]:
        return {number: each.name for number, each in self.attached.items()}

    def attachments(self) -> list[Interface]:
        return list(self.attached.values())

    def attachment(self, ifindex: int) -> Interface:
        return self.attached[ifindex]

    def attach(self, ifindex: int, name: str) -> Interface:
        self.now_ns += ATTACH_NS
        mode, reason = ("none", "busy: …") if ifindex in self.busy else ("native", "")
        self.attached[ifindex] = Interface(ifindex, ifindex, name, mode, reason, "tcx", "")  # type: ignore[arg-type]
        return self.attached[ifindex]

    def detach(self, ifindex: int) -> None:
        self.now_ns += ATTACH_NS
        del self.attached[ifindex]

    def restrict(self, patterns: Sequence[str]) -> None:
        self.generic = list(patterns)

    def mend(self, ifindex: int, *, is_thorough: bool) -> bool:
        if self.error is not None:
            raise self.error
        self.mended.append((ifindex, is_thorough))
        if ifindex in self.moved:
            self.moved.remove(ifindex)
            self.attach(ifindex, self.names[ifindex])
            return True
        if not is_thorough or ifindex in self.busy or self.attached[ifindex].ingress_mode != "none":
            return False
        self.attach(ifindex, self.names[ifindex])
        return True

    def table(self, *costs: Any) -> bytes:
        return layout.encode(layout.make_table(1, self.attachments()))

    def program_fds(self) -> dict[str, int]:
        return {}

    @property
    def shared_maps(self) -> dict[str, int]:
        return {}

    def run(self, programs: Mapping[str, int] | None) -> None:
        self.story.append("plain" if programs is None else f"flows {programs['size']}")

    def close(self) -> None:
        self.attached.clear()
        self.story.append("all closed")


class Silent:
    """A herald whom nobody hears."""

    def warn(self, text: str) -> None:
        pass

    def withdraw(self, text: str) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Return one without interfaces."""
    world = World()
    monkeypatch.setattr(NetCounters, "load", lambda: world)
    monkeypatch.setattr(interfaces, "scan", world.scan)
    monkeypatch.setattr(clock, "now_ns", lambda: world.now_ns)
    return world


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return the end at which the kernel says that a link has changed."""
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    monkeypatch.setattr(netlink, "open_link_monitor", lambda: ours)
    with kernels:
        yield kernels


@pytest.fixture
def watch(world: World, links: socket.socket) -> Iterator[NetworkWatch]:
    """Return one that is in use."""
    with selectors.DefaultSelector() as selector:
        watch = NetworkWatch(EbpfConfig(interfaces=["*"], exclude=[]), Silent(), selector, list)
        assert NEVER_NS == watch.due_ns
        watch.use("ebpf")
        links_selector = selector
        watch.select = lambda: [key.data() for key, _ in links_selector.select(0)]  # type: ignore[attr-defined]
        yield watch
        watch.close()


def changed(watch: Any, links: socket.socket) -> None:
    """Have the loop hear of a change."""
    links.send(b"a link has changed")
    watch.select()


def test_a_burst_is_taken_in_pieces(world: World, watch: NetworkWatch, links: socket.socket) -> None:
    """200 interfaces keep the loop for a tenth of a second at a time, and it comes back at once until all are done."""
    world.names = {number: f"veth{number}" for number in range(1, 201)}
    changed(watch, links)
    passes, longest_ns = 1, 0
    while watch.due_ns <= world.now_ns:
        before_ns = world.now_ns
        watch.tick(world.now_ns)
        longest_ns = max(longest_ns, world.now_ns - before_ns)
        passes += 1
    assert world.names == world.watched()
    assert 200 * ATTACH_NS // network.ATTACH_BUDGET_NS >= passes - 3
    assert longest_ns <= network.ATTACH_BUDGET_NS + ATTACH_NS


def test_one_look_a_pass(world: World, watch: NetworkWatch, links: socket.socket) -> None:
    """Changes that go on while a burst is taken in pieces cost no look of their own; the next one sees them."""
    world.names = {number: f"veth{number}" for number in range(1, 50)}
    changed(watch, links)
    before_ns = world.now_ns
    world.names[50] = "veth50"
    changed(watch, links)
    assert before_ns == world.now_ns
    while watch.due_ns <= world.now_ns:
        watch.tick(world.now_ns)
    assert world.names == world.watched()


def test_many_that_go_are_let_go_in_pieces(world: World, watch: NetworkWatch, links: socket.socket) -> None:
    """That takes time as well."""
    world.names = {1: "veth1"}
    changed(watch, links)
    world.attached = dict.fromkeys(range(1, 100), world.attached[1])
    before_ns = world.now_ns
    changed(watch, links)
    assert world.now_ns - before_ns <= network.ATTACH_BUDGET_NS + ATTACH_NS
    assert watch.due_ns <= world.now_ns


def test_many_to_be_attached_anew_are_taken_in_pieces(world: World, watch: NetworkWatch) -> None:
    """A change of `generic` that concerns all 200 interfaces does not keep the loop for as long as they take."""
    world.names = {number: f"veth{number}" for number in range(1, 201)}
    for number, name in world.names.items():
        world.attach(number, name)
    world.moved = set(world.names)
    before_ns = world.now_ns
    watch.refresh()
    longest_ns = world.now_ns - before_ns
    while watch.due_ns <= world.now_ns:
        before_ns = world.now_ns
        watch.tick(world.now_ns)
        longest_ns = max(longest_ns, world.now_ns - before_ns)
    assert set() == world.moved
    assert longest_ns <= network.ATTACH_BUDGET_NS + ATTACH_NS


def test_what_failed_is_tried_less_and_less_often(world: World, watch: NetworkWatch, links: socket.socket) -> None:
    """After one second, two, four … and then every half minute."""
    world.names, world.busy = {1: "eth0"}, {1}
    changed(watch, links)
    waits = []
    for _ in range(8):
        waits.append((watch.due_ns - world.now_ns) / NS_PER_S)
        world.now_ns = watch.due_ns
        watch.tick(world.now_ns)
    assert all(later >= earlier for earlier, later in itertools.pairwise(waits))
    assert waits[0] <= network.FIRST_RETRY_S
    assert network.LOOK_INTERVAL_S == waits[-1]
    assert all(is_thorough for _, is_thorough in world.mended[-7:])
    world.busy = set()
    world.now_ns = watch.due_ns
    watch.tick(world.now_ns)
    assert "native" == watch.attachments()[0].ingress_mode


def test_nothing_is_done_before_it_is_due(world: World, watch: NetworkWatch, links: socket.socket) -> None:
    """With everything attached, half a minute passes between two looks."""
    world.names = {1: "eth0"}
    changed(watch, links)
    mended = len(world.mended)
    watch.tick(watch.due_ns - 1)
    assert mended == len(world.mended)
    assert network.LOOK_INTERVAL_S - 1 <= (watch.due_ns - world.now_ns) / NS_PER_S <= network.LOOK_INTERVAL_S


@pytest.mark.parametrize("error", [BpfError("the kernel does not say"), OSError("nor does rtnetlink")])
def test_an_error_is_no_end(world: World, watch: NetworkWatch, links: socket.socket, error: Exception) -> None:
    """It is logged, and looked at again when that is due; the loop does not spin."""
    world.names, world.error = {1: "eth0"}, error
    changed(watch, links)
    assert watch.due_ns > world.now_ns
    world.error = None
    world.now_ns = watch.due_ns
    watch.tick(world.now_ns)
    assert [(1, True)] == world.mended


def test_half_a_watch_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there can be no monitor, nothing stays loaded or due; the worker is told why, the next use tries anew."""

    def refuse() -> socket.socket:
        raise OSError(24, "Too many open files")

    with selectors.DefaultSelector() as selector, socket.socket() as monitor:
        watch = NetworkWatch(EbpfConfig(), Silent(), selector, list)
        monkeypatch.setattr(netlink, "open_link_monitor", refuse)
        watch.use("ebpf")
        assert (NEVER_NS, {"origin"}) == (watch.due_ns, set(watch.grants()))
        assert "Too many open files" in origin_of(watch.grants()).reason
        world.names = {1: "eth0"}
        monkeypatch.setattr(netlink, "open_link_monitor", lambda: monitor)
        watch.use("ebpf")
        assert ("", ["eth0"]) == (watch.obstacle, [each.name for each in watch.attachments()])
        watch.close()


class Table:
    """A loaded object that counts flows."""

    def __init__(self, world: World, size: int) -> None:
        self._world = world
        self._size = size
        self.substitutes = {"size": size}

    def close(self) -> None:
        self._world.story.append(f"{self._size} closed")


def test_flows_come_and_go(world: World, watch: NetworkWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain programs are back before a table goes, another size is another table, and one that is there stays;
    the last user of the watch ends it."""
    monkeypatch.setattr(FlowCount, "load", lambda shared, size: Table(world, size))
    flowing = Flowing(watch, Silent())
    for size in (1000, 1000, 2000):
        flowing.open(FlowsConfig(memory=Size(size)))
    assert ["flows 1000", "plain", "1000 closed", "flows 2000"] == world.story
    watch.leave("ebpf")
    watch.use("ebpf")
    flowing.close()
    assert ["plain", "2000 closed"] == world.story[4:]
    watch.leave("ebpf")
    assert "all closed" == world.story[-1]
