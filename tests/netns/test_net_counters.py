"""The packet counters against the real kernel: exact, unprivileged to read, and gone with their owner."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest

from kon_agent.bpf import layout, libbpf, net
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError
from kon_agent.linux import memory

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

NOBODY = 65534
FRAMES = 50
Eventually = Callable[[Callable[[], bool]], bool]

TO_HERE = bytes.fromhex("020000000001" + "020000000002")
TO_THERE = bytes.fromhex("020000000002" + "020000000001")


def ipv4(protocol: int, size: int = 40) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + size, 0, 0, 64, protocol, 0, b"\x0a\x4d\0\x02", b"\x0a\x4d\0\x01"
    )
    return b"\x08\x00" + header + bytes(size)


def ipv6(next_header: int, payload: bytes = bytes(40)) -> bytes:
    return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(payload), next_header, 64) + bytes(32) + payload


def extension(next_header: int, units: int = 0) -> bytes:
    return bytes([next_header, units]) + bytes(6 + 8 * units)


def fragment(next_header: int, offset: int) -> bytes:
    return struct.pack("!BBHI", next_header, 0, offset << 3, 1)


def tagged(ethertype: str, rest: bytes) -> bytes:
    return bytes.fromhex(ethertype) + b"\x00\x05" + rest


PAYLOAD = bytes(40)
SHAPES = {
    # What follows the two MAC addresses, and what it must count as.
    "tcp": (ipv4(6), "tcp"),
    "udp": (ipv4(17), "udp"),
    "udp, 1400 bytes": (ipv4(17, 1380), "udp"),
    "icmp": (ipv4(1), "icmp"),
    "igmp": (ipv4(2), "ip"),
    "icmpv6's number in IPv4": (ipv4(58), "ip"),
    "IPv4 cut short": (ipv4(6)[:12], "ip"),
    "arp": (b"\x08\x06" + bytes(46), "arp"),
    "lldp": (b"\x88\xcc" + bytes(46), "other"),
    "tcp over IPv6": (ipv6(6), "tcp"),
    "udp over IPv6": (ipv6(17), "udp"),
    "icmpv6": (ipv6(58), "icmpv6"),
    "sctp over IPv6": (ipv6(132), "ip"),
    "IPv6 without next header": (ipv6(59), "ip"),
    "IPv6 cut short": (ipv6(6)[:30], "ip"),
    "hop-by-hop, then icmpv6": (ipv6(0, extension(58) + PAYLOAD), "icmpv6"),
    "long routing, then tcp": (ipv6(43, extension(6, 2) + PAYLOAD), "tcp"),
    "destination options cut short": (ipv6(60, b""), "ip"),
    "authentication, then udp": (ipv6(51, bytes([17, 4]) + bytes(22) + PAYLOAD), "udp"),
    "first fragment, options, udp": (ipv6(44, fragment(60, 0) + extension(17) + PAYLOAD), "udp"),
    "later fragment of udp": (ipv6(44, fragment(17, 100) + PAYLOAD), "udp"),
    "later fragment, payload like options": (ipv6(44, fragment(60, 100) + extension(17) + PAYLOAD), "ip"),
    "six extensions, then tcp": (ipv6(60, extension(60) * 5 + extension(6) + PAYLOAD), "tcp"),
    "seven extensions": (ipv6(60, extension(60) * 6 + extension(6) + PAYLOAD), "ip"),
    "VLAN, tcp": (tagged("8100", ipv4(6)), "tcp"),
    "VLAN, icmpv6": (tagged("8100", ipv6(58)), "icmpv6"),
    "VLAN, arp": (tagged("8100", b"\x08\x06" + bytes(46)), "arp"),
    "QinQ, udp": (tagged("88a8", tagged("8100", ipv4(17))), "udp"),
    "three tags": (tagged("88a8", tagged("8100", tagged("8100", ipv4(17)))), "other"),
    "VLAN cut short": (b"\x81\x00\x00", "other"),
}


@pytest.fixture
def counters(link: Any) -> Iterator[NetCounters]:
    try:
        loaded = NetCounters.load()
    except BpfError as err:
        if err.errno in (errno.EPERM, errno.ENOSYS) or "pylibbpf" in str(err):
            pytest.skip(f"needs BPF and pylibbpf: {err}")
        raise
    with closing(loaded):
        yield loaded


@pytest.fixture
def tcx() -> None:
    """Let a test pass by where the kernel has no TCX."""
    release = os.uname().release
    if tuple(int(number) for number in release.split(".")[:2]) < (6, 6):
        pytest.skip(f"needs TCX (kernel 6.6; this is {release})")


def counts(counters: NetCounters, at: Interface) -> layout.Counts:
    return layout.read_slot(counters.counters(), at.slot, counters.cpus, at.base)


def nonzero(counters: NetCounters, at: Interface, direction: str) -> dict[str, tuple[int, int]]:
    return {key[1]: value for key, value in counts(counters, at).items() if key[0] == direction and value[0]}


def has_counted(counters: NetCounters, at: Interface, total: int) -> bool:
    return sum(packets for packets, _ in counts(counters, at).values()) >= total


def has_xdp(interface: str) -> bool:
    shown = subprocess.run(["ip", "-j", "link", "show", interface], check=True, capture_output=True).stdout
    return "xdp" in json.loads(shown)[0]


def forked(body: Callable[[], object]) -> int:
    """Run `body` in a child that then exits; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def test_a_thousand_pings_are_a_thousand_to_an_unprivileged_child(link: Any, counters: NetCounters) -> None:
    """A child of uid 65534 without any BPF fd reads the exact numbers from a mapping it made before."""
    at = counters.attach(link.here.ifindex(), "kon0")
    assert "native" == at.ingress_mode
    go_read, go_write = os.pipe()
    result_read, result_write = os.pipe()

    def child() -> None:
        mapped = counters.map_counters()
        for fd in os.listdir("/proc/self/fd"):
            if int(fd) not in (go_read, result_write):
                try:
                    os.close(int(fd))
                except OSError:
                    continue  # the listing's own
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.write(result_write, b"ready")
        os.read(go_read, 1)
        os.write(
            result_write,
            json.dumps(layout.read_slot(mapped, at.slot, counters.cpus, at.base)["ingress", "icmp"]).encode(),
        )

    pid = forked(child)
    try:
        os.close(result_write)
        assert b"ready" == os.read(result_read, 5)
        ping = ["ip", "netns", "exec", link.there.name, "ping", "-q", "-i", "0.001", "-c", "1000", link.here.address]
        assert b" 0% packet loss" in subprocess.run(ping, check=True, capture_output=True).stdout
        os.write(go_write, b"g")
        assert [1000, 1000 * 98] == json.loads(os.read(result_read, 100))
    finally:
        os.close(go_write)
        assert (pid, 0) == os.waitpid(pid, 0)
        os.close(go_read)
        os.close(result_read)


@pytest.mark.parametrize(("mtu", "mode", "reason"), [(1500, "native", ""), (9000, "generic", "ERANGE: ")])
def test_ingress_counts_every_shape_exactly(
    link: Any, counters: NetCounters, eventually: Eventually, mtu: int, mode: str, reason: str
) -> None:
    """N frames of each protocol, tagged or not, whole or cut, are N packets and their lengths in bytes, in both modes.

    A veth whose peer has a jumbo MTU refuses native mode, so its size chooses the mode here.
    """
    for end in (link.here, link.there):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", str(mtu)], check=True)
    at = counters.attach(link.here.ifindex(), "kon0")
    assert mode == at.ingress_mode
    assert at.ingress_reason.startswith(reason)
    for name, (rest, protocol) in SHAPES.items():
        before = counts(counters, at)
        link.there.send(TO_HERE + rest, FRAMES)
        sent = FRAMES + sum(packets for packets, _ in before.values())
        assert eventually(partial(has_counted, counters, at, sent)), name
        after = counts(counters, at)
        raised = {
            key[1]: (value[0] - before[key][0], value[1] - before[key][1])
            for key, value in after.items()
            if value != before[key] and key[0] == "ingress"
        }
        assert (name, {protocol: (FRAMES, FRAMES * (12 + len(rest)))}) == (name, raised)


@pytest.mark.usefixtures("tcx")
def test_egress_counts_every_shape_exactly(link: Any, counters: NetCounters) -> None:
    """The same frames sent from here count under egress, and nothing under ingress."""
    at = counters.attach(link.here.ifindex(), "kon0")
    assert ("tcx", "") == (at.egress_mode, at.egress_reason)
    for name, (rest, protocol) in SHAPES.items():
        if len(rest) < 4 or name == "VLAN cut short":
            continue  # the packet socket itself refuses a frame its device calls too short
        before = counts(counters, at)["egress", protocol]
        link.here.send(TO_THERE + rest, FRAMES)
        after = counts(counters, at)["egress", protocol]
        assert (name, FRAMES, FRAMES * (12 + len(rest))) == (name, after[0] - before[0], after[1] - before[1])


@pytest.mark.usefixtures("tcx")
def test_headers_in_a_page_are_found(link: Any, counters: NetCounters) -> None:
    """A jumbo frame from a packet socket has nothing but its Ethernet header in the buffer itself."""
    for end in (link.here, link.there):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", "9000"], check=True)
    at = counters.attach(link.here.ifindex(), "kon0")
    frame = TO_THERE + tagged("8100", ipv6(60, extension(17) + bytes(8000)))
    link.here.send(frame, FRAMES)
    assert {"udp": (FRAMES, FRAMES * len(frame))} == nonzero(counters, at, "egress")


@pytest.mark.usefixtures("tcx")
def test_offloaded_tcp_is_counted_as_the_frames_it_becomes(link: Any, counters: NetCounters) -> None:
    """A megabyte handed to the device in super packets counts every segment and its headers."""
    at = counters.attach(link.here.ifindex(), "kon0")
    size = 1_000_000
    with link.there.entered():
        server = socket.create_server((link.there.address, 7000))
    with server, socket.create_connection((link.there.address, 7000)) as client:
        peer, _ = server.accept()
        with peer:
            received = 0
            client.setblocking(False)
            data = memoryview(bytes(size))
            while received < size:
                with suppress(BlockingIOError):
                    data = data[client.send(data) :] if data else data
                received += len(peer.recv(1 << 20))
    packets, size_bytes = counts(counters, at)["egress", "tcp"]
    assert packets >= size / 1448
    # 66 bytes of Ethernet, IP and TCP with a time stamp each; a SYN's options take 8 more.
    assert size_bytes - packets * 66 == size + 8


@pytest.mark.usefixtures("tcx")
def test_a_tag_outside_of_the_data_counts_in_the_length(
    link: Any, counters: NetCounters, eventually: Eventually
) -> None:
    """A tag the kernel took off on arrival and the device puts back on is part of the frame that leaves."""
    for command in (
        "link add br0 type bridge",
        "link add kon2 type veth peer kon3",
        "link set kon0 master br0",
        "link set kon2 master br0",
        "link set br0 up",
        "link set kon2 up",
        "link set kon3 up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    at = counters.attach(socket.if_nametoindex("kon2"), "kon2")
    frame = bytes.fromhex("0200000000ff020000000002") + tagged("8100", ipv4(17))
    link.there.send(frame, FRAMES)
    exact = {"udp": (FRAMES, FRAMES * len(frame))}
    assert eventually(lambda: nonzero(counters, at, "egress") == exact)


@pytest.mark.usefixtures("tcx")
def test_loopback_is_generic(link: Any, counters: NetCounters, eventually: Eventually) -> None:
    """lo's driver has no XDP: generic, with the driver's answer as the reason, and exact."""
    at = counters.attach(1, "lo")
    assert ("generic", "EOPNOTSUPP: Operation not supported") == (at.ingress_mode, at.ingress_reason)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        for _ in range(FRAMES):
            udp.sendto(bytes(100), udp.getsockname())
    exact = {"udp": (FRAMES, FRAMES * (14 + 20 + 8 + 100))}
    assert eventually(lambda: nonzero(counters, at, "ingress") == exact)
    assert exact == nonzero(counters, at, "egress")


RAW_IP = """
import fcntl, json, os, socket, struct, subprocess
from kon_agent.bpf import layout
from kon_agent.bpf.net import NetCounters
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH14x", b"kontun", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
subprocess.run("ip address add 10.79.0.1/24 dev kontun; ip link set kontun up", shell=True, check=True)
counters = NetCounters.load()
at = counters.attach(socket.if_nametoindex("kontun"), "kontun")
os.write(tun, bytes.fromhex("4500001c000000004001000 00a4f00020a4f0001".replace(" ", "")) + bytes(8))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.sendto(bytes(10), ("10.79.0.2", 9))
counts = layout.read_slot(counters.counters(), at.slot, counters.cpus)
print(json.dumps({"/".join(key): value for key, value in counts.items() if value[0]}))
"""


@pytest.mark.usefixtures("tcx")
def test_a_link_without_ethernet_is_read_as_ip(link: Any, counters: NetCounters) -> None:
    """A tun device's frames begin with the IP header, in both directions."""
    counters.close()  # only asked for whether BPF works here; the other process loads its own
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun")
    # `ip netns exec` mounts this namespace's sysfs, where the link type is read.
    command = ["ip", "netns", "exec", link.here.name, sys.executable, "-c", RAW_IP]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
    assert {"ingress/icmp": [1, 28], "egress/udp": [1, 38]} == json.loads(shown)


@pytest.mark.usefixtures("tcx")
def test_a_busy_interface_is_left_alone(link: Any, counters: NetCounters, eventually: Eventually) -> None:
    """Another program's hook is reported as busy; that program goes on."""
    with closing(NetCounters.load()) as other:
        theirs = other.attach(link.here.ifindex(), "kon0")
        ours = counters.attach(link.here.ifindex(), "kon0")
        assert "none" == ours.ingress_mode
        assert ours.ingress_reason.startswith("busy: ")
        assert "tcx" == ours.egress_mode  # TCX takes any number of programs
        link.there.send(TO_HERE + ipv4(17), FRAMES)
        assert eventually(lambda: counts(other, theirs)["ingress", "udp"][0] == FRAMES)
        assert (0, 0) == counts(counters, ours)["ingress", "udp"]


def test_an_interface_that_is_gone_is_not_an_error(link: Any, counters: NetCounters) -> None:
    """The reason is the kernel's."""
    at = counters.attach(4242, "gone0")
    assert (-1, "none", "none") == (at.slot, at.ingress_mode, at.egress_mode)
    assert ("EINVAL: Invalid argument", "ENODEV: No such device") == (at.ingress_reason, at.egress_reason)


def test_an_interface_removed_while_watched_detaches_cleanly(link: Any, counters: NetCounters) -> None:
    """The kernel drops the links with the device; letting go of them afterwards is no error."""
    ifindex = link.here.ifindex()
    counters.attach(ifindex, "kon0")
    subprocess.run(["ip", "link", "delete", "kon0"], check=True)
    counters.detach(ifindex)
    assert [] == counters.attachments()


def test_detached_is_not_counted_and_numbers_go_on_afterwards(
    link: Any, counters: NetCounters, eventually: Eventually
) -> None:
    """Detach ends counting at once; the same interface attached again continues its numbers."""
    ifindex = link.here.ifindex()
    at = counters.attach(ifindex, "kon0")
    link.there.send(TO_HERE + ipv4(17), FRAMES)
    assert eventually(lambda: counts(counters, at)["ingress", "udp"][0] == FRAMES)
    counters.detach(ifindex)
    assert not has_xdp("kon0")
    link.there.send(TO_HERE + ipv4(17), FRAMES)
    assert at == counters.attach(ifindex, "kon0")
    link.there.send(TO_HERE + ipv4(17), 1)
    assert eventually(lambda: counts(counters, at)["ingress", "udp"][0] >= FRAMES + 1)
    assert FRAMES + 1 == counts(counters, at)["ingress", "udp"][0]


def test_nothing_stays_attached_after_sigkill(link: Any, counters: NetCounters, eventually: Eventually) -> None:
    """The owner's death is the end of its links: the next owner finds the interface free."""
    read_end, write_end = os.pipe()

    def owner() -> None:
        NetCounters.load().attach(link.here.ifindex(), "kon0")
        os.write(write_end, b"attached")
        signal.pause()

    pid = forked(owner)
    assert b"attached" == os.read(read_end, 8)
    assert has_xdp("kon0")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read_end)
    os.close(write_end)
    assert eventually(lambda: not has_xdp("kon0"))
    assert "native" == counters.attach(link.here.ifindex(), "kon0").ingress_mode


def test_the_mapping_can_not_become_writable(link: Any, counters: NetCounters) -> None:
    """A child's mprotect is refused with EACCES: the kernel took the right to write from a frozen map's mapping."""
    c = ctypes.CDLL(None, use_errno=True)

    def child() -> None:
        address = memory._addresses[id(counters.map_counters())][0]
        refused = c.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        assert (-1, errno.EACCES) == (refused, ctypes.get_errno())

    assert counters.counters().readonly
    assert 0 == os.waitpid(forked(child), 0)[1]


def test_the_counters_are_frozen(link: Any, counters: NetCounters) -> None:
    """Even with the map's fd nobody can write a counter from user space."""
    with pytest.raises(BpfError) as refused:
        counters._library.update(counters._fds["counters"], "counters", 0, bytes(layout.ROW_BYTES))
    assert errno.EPERM == refused.value.errno


@pytest.mark.usefixtures("tcx")
def test_every_bpf_fd_is_close_on_exec(link: Any, counters: NetCounters) -> None:
    """No program started by the owner can inherit an attachment."""
    counters.attach(link.here.ifindex(), "kon0")
    fds = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}
    bpf_fds = {fd: name for fd, name in fds.items() if "bpf" in name}
    kinds = ["anon_inode:bpf-map", "anon_inode:bpf-map", "anon_inode:bpf-prog", "anon_inode:bpf-prog"]
    assert sorted([*kinds, "anon_inode:bpf_link", "anon_inode:bpf_link"]) == sorted(bpf_fds.values())
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in bpf_fds)


def test_without_privilege_loading_says_what_it_needs(link: Any) -> None:
    """EPERM names the capabilities."""
    libbpf.library()  # that user may not be able to reach the library, nor the object, by name
    held = os.open(net._default_object(), os.O_RDONLY)

    def child() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(BpfError, match="CAP_BPF") as refused:
            NetCounters.load(f"/proc/self/fd/{held}")
        assert errno.EPERM == refused.value.errno

    assert 0 == os.waitpid(forked(child), 0)[1]
    os.close(held)


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
