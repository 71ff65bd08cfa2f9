"""Every kind of interface: how each direction is attached, why not better, and that its packets are counted exactly."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf import interfaces, layout, libbpf, objects, surroundings
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError
from kon_agent.linux import tc, xdp
from tests.support import foreign

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

FRAMES = 30
NO_DRIVER = "EOPNOTSUPP: Operation not supported"
TUNSETIFF, IFF_TUN, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x1, 0x2, 0x1000
MNT_DETACH = 2
NATIVE, GENERIC = libbpf.XDP_FLAGS_DRV_MODE, libbpf.XDP_FLAGS_SKB_MODE
Eventually = Callable[[Callable[[], bool]], bool]

# A whole IPv4 packet, checksum and all: where the kernel has br_netfilter, a bridge lets nothing less through.
PACKET = bytes.fromhex("4500003c00000000401166150a4d00020a4d0001") + bytes(40)
BROADCAST = bytes.fromhex("ffffffffffff0200000000990800") + PACKET

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def sees_namespace(link: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have /sys read as it is in this namespace."""
    root = str(tmp_path)
    (tmp_path / "sys").mkdir()
    place = os.fsencode(tmp_path / "sys")
    assert 0 == _libc.mount(b"sysfs", place, b"sysfs", 0, None), os.strerror(ctypes.get_errno())
    try:
        for function in (interfaces.read, interfaces.above, interfaces.is_bond):
            monkeypatch.setattr(interfaces, function.__name__, lambda name, _="", call=function: call(name, root))
        yield
    finally:
        _libc.umount2(place, MNT_DETACH)


@pytest.fixture
def counters(sees_namespace: None) -> Iterator[NetCounters]:
    """Return loaded counters that see this namespace."""
    with closing(NetCounters.load()) as loaded:
        yield loaded


@pytest.fixture
def without_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel answer as those before 6.6 do."""
    link = libbpf.Library.link

    def refuse(self: libbpf.Library, program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        if attach_type == libbpf.BPF_TCX_EGRESS:
            raise BpfError("cannot attach", errno.EINVAL)
        return link(self, program_fd, ifindex, attach_type, flags)

    monkeypatch.setattr(libbpf.Library, "link", refuse)


class Device:
    """One interface in this namespace, up, and how to make frames come in; frames go out through a raw socket."""

    def __init__(self, name: str, receive: Callable[[], object] | None = None, *, is_raw_ip: bool = False) -> None:
        self.name = name
        self.receive = receive
        self.is_raw_ip = is_raw_ip
        ip("link", "set", name, "up")

    @property
    def ifindex(self) -> int:
        return socket.if_nametoindex(self.name)

    def send(self, times: int = FRAMES) -> None:
        """Send frames out."""
        transmit(self.name, PACKET if self.is_raw_ip else BROADCAST, times)


def ip(*command: str) -> str:
    """Run `ip` in this namespace; skip where the kernel has no such device."""
    done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
    if "Unknown device type" in done.stderr:
        kind = command[command.index("type") + 1]
        # Not every kernel that runs our CI has these; the test says so, and CI need not fail for it.
        (pytest.xfail if kind in ("bond", "dummy", "vlan") else pytest.skip)(f"needs the kernel's device type {kind}")
    assert 0 == done.returncode, f"ip {' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def transmit(name: str, frame: bytes, times: int = FRAMES) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((name, 0x0800))
        for _ in range(times):
            raw.send(frame)


def veth(link: Any, cleanup: ExitStack, mtu: int = 1500) -> Device:
    for end in (link.here, link.there):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", str(mtu)], check=True)
    return Device("kon0", lambda: link.there.send(BROADCAST, FRAMES))


def jumbo_veth(link: Any, cleanup: ExitStack) -> Device:
    return veth(link, cleanup, 9000)


def loopback(link: Any, cleanup: ExitStack) -> Device:
    return Device("lo", lambda: None)  # what it sends it receives


def bridge(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "name", "konbr", "type", "bridge")
    ip("link", "set", "kon0", "master", "konbr")
    return Device("konbr", lambda: link.there.send(BROADCAST, FRAMES))


def macvlan(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "konmac", "link", "kon0", "type", "macvlan", "mode", "bridge")
    return Device("konmac", lambda: link.there.send(BROADCAST, FRAMES))


def vlan(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "konvlan", "link", "kon0", "type", "vlan", "id", "5")
    tagged = BROADCAST[:12] + bytes.fromhex("81000005") + BROADCAST[12:]
    return Device("konvlan", lambda: link.there.send(tagged, FRAMES))


def bond(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "konbond", "type", "bond")
    ip("link", "set", "kon0", "down")
    ip("link", "set", "kon0", "master", "konbond")
    return Device("konbond", lambda: link.there.send(BROADCAST, FRAMES))


def ifb(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "konifb", "type", "ifb")
    return Device("konifb")


def dummy(link: Any, cleanup: ExitStack) -> Device:
    ip("link", "add", "kondummy", "type", "dummy")
    return Device("kondummy")


def tun(link: Any, cleanup: ExitStack) -> Device:
    return _tuntap(cleanup, IFF_TUN, PACKET)


def tap(link: Any, cleanup: ExitStack) -> Device:
    return _tuntap(cleanup, IFF_TAP, BROADCAST)


def _tuntap(cleanup: ExitStack, kind: int, frame: bytes) -> Device:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    cleanup.callback(os.close, fd)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14x", b"kontun", kind | IFF_NO_PI))
    return Device("kontun", lambda: [os.write(fd, frame) for _ in range(FRAMES)], is_raw_ip=kind == IFF_TUN)


KINDS: list[tuple[Callable[[Any, ExitStack], Device], str, str]] = [
    (veth, "native", ""),
    (jumbo_veth, "native", ""),
    (loopback, "generic", NO_DRIVER),
    (bridge, "generic", NO_DRIVER),
    (macvlan, "generic", NO_DRIVER),
    (vlan, "generic", NO_DRIVER),
    (bond, "generic", "a bond: its ports have native programs"),
    (ifb, "generic", NO_DRIVER),
    (dummy, "generic", NO_DRIVER),
    (tun, "generic", NO_DRIVER),
    (tap, "native", ""),
]


def udp(counters: NetCounters, at: Interface, direction: str) -> tuple[int, int]:
    packets, size_bytes = layout.read_slot(counters.counters(), at.slot, counters.cpus, at.base)[direction, "udp"]
    return packets, size_bytes


def leftovers(ifindex: int) -> object:
    return xdp.programs(ifindex), tc.qdisc_kind(ifindex)


@pytest.mark.parametrize("egress", ["tcx", "clsact"])
@pytest.mark.parametrize(("make", "mode", "reason"), KINDS, ids=[make.__name__ for make, _, _ in KINDS])
def test_matrix(
    link: Any,
    counters: NetCounters,
    eventually: Eventually,
    request: pytest.FixtureRequest,
    make: Callable[[Any, ExitStack], Device],
    mode: str,
    reason: str,
    egress: str,
) -> None:
    """Mode and reason of both directions are what this kind of interface allows; N frames each way are N and their
    bytes; nothing is attached afterwards."""
    if egress == "clsact":
        request.getfixturevalue("without_tcx")
    with ExitStack() as cleanup:
        device = make(link, cleanup)
        at = counters.attach(device.ifindex, device.name)
        assert (mode, reason) == (at.ingress_mode, at.ingress_reason)
        assert (egress, "" if egress == "tcx" else "EINVAL: TCX needs kernel 6.6") == (
            at.egress_mode, at.egress_reason
        )  # fmt: skip
        size = len(PACKET if device.is_raw_ip else BROADCAST)
        device.send()
        if device.receive is not None:
            device.receive()
            assert eventually(lambda: udp(counters, at, "ingress") == (FRAMES, FRAMES * size))
        assert (FRAMES, FRAMES * size) == udp(counters, at, "egress")
        counters.detach(device.ifindex)
        assert ({}, "") == leftovers(device.ifindex)


def test_jumbo_frames_are_counted_whole(link: Any, counters: NetCounters, eventually: Eventually) -> None:
    """In native mode, where a frame of 8,914 bytes comes in several pieces."""
    device = jumbo_veth(link, ExitStack())
    at = counters.attach(device.ifindex, device.name)
    frame = BROADCAST[:14] + bytes.fromhex("450022c4000000004011448d0a4d00020a4d0001") + bytes(8880)
    link.there.send(frame, FRAMES)
    transmit(device.name, frame)
    wanted = (FRAMES, FRAMES * 8914)
    assert eventually(lambda: udp(counters, at, "ingress") == wanted)
    assert wanted == udp(counters, at, "egress")


def test_a_counted_interface_hinders_no_larger_mtu(link: Any, counters: NetCounters) -> None:
    """A program for frames in one piece would limit the other end of a veth to a page."""
    counters.attach(link.here.ifindex(), "kon0")
    for end in (link.there, link.here):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", "9000"], check=True)


# ── somebody else is there ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "by_link"), [(NATIVE, True), (GENERIC, True), (NATIVE, False), (GENERIC, False)],
    ids=["native-link", "generic-link", "native-netlink", "generic-netlink"],
)  # fmt: skip
def test_a_foreign_program_stays_and_is_named(link: Any, counters: NetCounters, flags: int, by_link: bool) -> None:
    """In either mode, however attached: it is what it was, the reason says which program it is, and when it leaves
    the way in is counted, in the same slot."""
    ifindex = link.here.ifindex()
    program = foreign.load()
    if by_link:
        held = foreign.link_xdp(ifindex, flags)
    else:
        foreign.set_xdp(ifindex, flags, program)
    before = xdp.programs(ifindex)
    at = counters.attach(ifindex, "kon0")
    assert ("none", "tcx") == (at.ingress_mode, at.egress_mode)
    ((mode, number),) = before.items()
    assert at.ingress_reason.startswith(f"busy: {mode} program {number} {foreign.NAME} is attached, E")
    assert before == xdp.programs(ifindex)
    assert not counters.mend(ifindex, is_thorough=True)
    if by_link:
        os.close(held)
    else:
        foreign.set_xdp(ifindex, flags, -1)
    os.close(program)
    assert counters.mend(ifindex, is_thorough=False)
    (now,) = counters.attachments()
    assert (at.slot, "native", "") == (now.slot, now.ingress_mode, now.ingress_reason)
    assert at.created_ns == now.created_ns


def test_another_agent_keeps_its_interface(link: Any, counters: NetCounters) -> None:
    """A second one on the same interface finds it busy in both directions where there is one way out only."""
    ifindex = link.here.ifindex()
    counters.attach(ifindex, "kon0")
    with closing(NetCounters.load()) as second:
        at = second.attach(ifindex, "kon0")
        assert "none" == at.ingress_mode
        assert " kon_xdp_frags is attached, EBUSY" in at.ingress_reason
    link.there.send(BROADCAST, FRAMES)
    (first,) = counters.attachments()
    assert FRAMES == udp(counters, first, "ingress")[0]


def test_another_agents_filter_is_left_alone(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """Without TCX the second one says so, and the first one's filter goes on counting."""
    ifindex = link.here.ifindex()
    first = counters.attach(ifindex, "kon0")
    with closing(NetCounters.load()) as second:
        assert "busy: another kon-agent counts this interface" == second.attach(ifindex, "kon0").egress_reason
    transmit("kon0", BROADCAST)
    assert FRAMES == udp(counters, first, "egress")[0]


def test_a_device_below_is_counted_as_well(link: Any, counters: NetCounters) -> None:
    """The kernel lets no program onto a device whose bridge has one: ours on the bridge makes room and comes back."""
    ip("link", "add", "name", "konbr", "type", "bridge")
    ip("link", "set", "konbr", "up")
    bridge_index = socket.if_nametoindex("konbr")
    before = counters.attach(bridge_index, "konbr")
    ip("link", "set", "kon0", "master", "konbr")
    at = counters.attach(link.here.ifindex(), "kon0")
    assert ("native", "") == (at.ingress_mode, at.ingress_reason)
    assert before == counters.attachments()[0]
    link.there.send(BROADCAST, FRAMES)
    assert (FRAMES, FRAMES) == (udp(counters, at, "ingress")[0], udp(counters, before, "ingress")[0])


def test_a_foreign_program_above_is_left_alone(link: Any, counters: NetCounters) -> None:
    """Then the device below is not counted on its way in, and says why."""
    ip("link", "add", "name", "konbr", "type", "bridge")
    held = foreign.link_xdp(socket.if_nametoindex("konbr"), GENERIC)
    ip("link", "set", "kon0", "master", "konbr")
    at = counters.attach(link.here.ifindex(), "kon0")
    assert ("none", "busy: a device above has a program, EEXIST: File exists") == (at.ingress_mode, at.ingress_reason)
    assert ["generic"] == list(xdp.programs(socket.if_nametoindex("konbr")))
    os.close(held)
    assert counters.mend(link.here.ifindex(), is_thorough=False)
    assert "native" == counters.attachments()[0].ingress_mode


def test_nothing_yields_where_that_is_in_vain(link: Any, counters: NetCounters) -> None:
    """Of two macvlans in sight one has a foreign program: ours on the other keeps its link, and misses no packet."""
    for name in ("konmac", "konfar"):
        ip("link", "add", name, "link", "kon0", "type", "macvlan", "mode", "bridge")
    held = foreign.link_xdp(socket.if_nametoindex("konfar"), GENERIC)
    counters.attach(socket.if_nametoindex("konmac"), "konmac")
    before = objects.link_of(counters.capture().watched[0].link_fds[0])
    assert "none" == counters.attach(link.here.ifindex(), "kon0").ingress_mode
    assert not counters.mend(link.here.ifindex(), is_thorough=True)
    assert before == objects.link_of(counters.capture().watched[0].link_fds[0])
    os.close(held)


def test_what_is_above_and_out_of_sight(link: Any, counters: NetCounters) -> None:
    """A macvlan in another namespace has a foreign program: ours on the one in sight yields in vain, comes back, and
    does not yield again because some link has changed."""
    for name in ("konmac", "konfar"):
        ip("link", "add", name, "link", "kon0", "type", "macvlan", "mode", "bridge")
    ip("link", "set", "konfar", "netns", link.there.name)
    with link.there.entered():
        held = foreign.link_xdp(socket.if_nametoindex("konfar"), GENERIC)
    ours = counters.attach(socket.if_nametoindex("konmac"), "konmac")
    at = counters.attach(link.here.ifindex(), "kon0")
    assert ("none", "busy: a device above has a program, EEXIST: File exists") == (at.ingress_mode, at.ingress_reason)
    assert ours == counters.attachments()[0]
    before = xdp.programs(ours.ifindex)
    assert ["generic"] == list(before)
    assert not counters.mend(link.here.ifindex(), is_thorough=False)
    os.close(held)
    assert counters.mend(link.here.ifindex(), is_thorough=True)
    assert "native" == counters.attachments()[1].ingress_mode


# ── our own, left behind ──────────────────────────────────────────────────────────────────────────────────────────


def orphan_holding(fd: int, title: str) -> int:
    """Start a process of that title, whose parent is gone and which holds a descriptor; return its pid."""
    told_read, told_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.write(told_write, str(os.getpid()).encode())
            os.set_inheritable(fd, True)
            os.execv("/bin/sleep", [title, "60"])  # noqa: S606
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(told_write)
    with open(told_read, "rb") as told:
        return int(told.read())  # to its end: that is when sleep has taken over


def test_what_an_orphan_holds_is_replaced(link: Any, counters: NetCounters) -> None:
    """A child of a dead agent that still has the link open keeps the program attached; the next agent takes it away."""
    ifindex = link.here.ifindex()
    stale = foreign.link_xdp(ifindex, NATIVE, "kon_xdp_ingress")
    orphan = orphan_holding(stale, "kon-agent: worker cpu")
    try:
        os.close(stale)
        at = counters.attach(ifindex, "kon0")
        assert ("native", "") == (at.ingress_mode, at.ingress_reason)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_what_a_stranger_holds_is_not(link: Any, counters: NetCounters) -> None:
    """Our name on a program is not enough: whoever holds it is not known to be dead."""
    ifindex = link.here.ifindex()
    held = foreign.link_xdp(ifindex, NATIVE, "kon_xdp_ingress")
    stranger = orphan_holding(held, "sleep")
    try:
        os.close(held)
        assert " kon_xdp_ingress is attached" in counters.attach(ifindex, "kon0").ingress_reason
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_the_filter_of_a_killed_agent_is_replaced(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """A filter outlives its agent; the next one takes its place, once, and takes it away in the end."""
    ifindex = link.here.ifindex()
    pid = os.fork()
    if pid == 0:
        NetCounters.load().attach(ifindex, "kon0")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    left = [each.program_id for each in tc.filters(ifindex) if each.name]
    assert 1 == len(left)
    at = counters.attach(ifindex, "kon0")
    now = [each.program_id for each in tc.filters(ifindex) if each.name]
    assert (1, "clsact") == (len(now), at.egress_mode)
    assert left != now
    transmit("kon0", BROADCAST)
    assert FRAMES == udp(counters, at, "egress")[0]
    counters.close()
    assert [] == tc.filters(ifindex)


def test_foreign_filters_and_qdiscs_stay(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """Ours goes beside them, sees what they see, and only ours is taken away."""
    ifindex = link.here.ifindex()
    assert tc.add_clsact(ifindex)
    program = foreign.load(foreign.SCHED_CLS)
    tc.set_filter(ifindex, 1, 1, program, foreign.NAME)
    os.close(program)
    before = tc.filters(ifindex)
    at = counters.attach(ifindex, "kon0")
    transmit("kon0", BROADCAST)
    assert FRAMES == udp(counters, at, "egress")[0]
    counters.detach(ifindex)
    assert (before, "clsact") == (tc.filters(ifindex), tc.qdisc_kind(ifindex))


def test_a_qdisc_that_got_a_foreign_filter_stays(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """We added clsact, somebody else has put a filter into it since: theirs is not taken away with ours."""
    ifindex = link.here.ifindex()
    counters.attach(ifindex, "kon0")
    program = foreign.load(foreign.SCHED_CLS)
    tc.set_filter(ifindex, 9, 1, program, foreign.NAME)
    os.close(program)
    counters.detach(ifindex)
    assert [foreign.NAME] == [each.name for each in tc.filters(ifindex) if each.name]


def test_an_ingress_qdisc_is_not_mistaken_for_clsact(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """It would run a filter for the way out on the way in: the way out is not counted, and says why."""
    subprocess.run(["tc", "qdisc", "add", "dev", "kon0", "ingress"], check=True)
    at = counters.attach(link.here.ifindex(), "kon0")
    assert ("none", "busy") == (at.egress_mode, at.egress_reason[:4])
    assert [] == tc.filters(link.here.ifindex(), tc.INGRESS)


def test_a_filter_taken_away_comes_back(link: Any, counters: NetCounters, without_tcx: None) -> None:
    """Somebody deletes the qdisc, and ours with it: mending puts both back."""
    ifindex = link.here.ifindex()
    counters.attach(ifindex, "kon0")
    tc.delete_clsact(ifindex)
    assert counters.mend(ifindex, is_thorough=True)
    transmit("kon0", BROADCAST)
    assert FRAMES == udp(counters, counters.attachments()[0], "egress")[0]


# ── interfaces come and go ────────────────────────────────────────────────────────────────────────────────────────


def test_a_filter_of_ours_is_exchanged_without_asking_whose_it_is(
    link: Any, counters: NetCounters, without_tcx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look through all descriptors of a large machine takes seconds, for each interface."""
    before = counters.attach(link.here.ifindex(), "kon0")
    asked: list[str] = []

    def nobody(line: str) -> list[Any]:
        asked.append(line)
        return []

    monkeypatch.setattr(surroundings, "holders", nobody)
    counters.run(None)
    assert ([], [before], "clsact") == (asked, counters.attachments(), before.egress_mode)
    transmit("kon0", BROADCAST)
    assert FRAMES == udp(counters, before, "egress")[0]


def test_recreated_with_the_same_number_and_name(link: Any, counters: NetCounters) -> None:
    """The new interface looks like the old one, but has no program: mending sees that, and attaches."""
    ip("link", "add", "konnew", "index", "777", "type", "veth", "peer", "name", "konpeer")
    counters.attach(777, "konnew")
    ip("link", "delete", "konnew")
    ip("link", "add", "konnew", "index", "777", "type", "veth", "peer", "name", "konpeer")
    assert {} == xdp.programs(777)
    assert counters.mend(777, is_thorough=False)
    assert ["native"] == list(xdp.programs(777))
    assert not counters.mend(777, is_thorough=True)


def test_removed_under_load(link: Any, counters: NetCounters, eventually: Eventually) -> None:
    """Frames are on their way when the interface is deleted: detaching succeeds, and its slot counts for another."""
    ip("link", "add", "konload", "type", "veth", "peer", "name", "konpeer")
    for name in ("konload", "konpeer"):
        ip("link", "set", name, "up")
    ifindex = socket.if_nametoindex("konload")
    at = counters.attach(ifindex, "konload")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("konpeer", 0x0800))

        def load() -> None:
            with suppress(OSError):  # the device went away
                while True:
                    raw.send(BROADCAST)

        sender = threading.Thread(target=load)
        sender.start()
        assert eventually(lambda: udp(counters, at, "ingress")[0] > FRAMES)
        ip("link", "delete", "konload")
        sender.join(10)
    assert not sender.is_alive()
    counters.detach(ifindex)
    ip("link", "add", "konload", "index", str(ifindex), "type", "veth", "peer", "name", "konpeer")
    again = counters.attach(ifindex, "konload")
    assert (at.slot, "native") == (again.slot, again.ingress_mode)
