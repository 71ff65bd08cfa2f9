"""Every frame that crosses an interface is counted once, for what it is: protocol, length, size, flags, casts, faults.

Frames are sent with a packet socket over a veth pair, and all that has been counted in their direction is compared: a
frame that also counted elsewhere would show. Generic XDP is what a driver without XDP gets: here the kernel's refusal
is played to the attaching side, and everything after it is real.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from kon_agent.bpf import layout, libbpf
from kon_agent.bpf.layout import Interface, Traffic
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError
from tests.support import ethernet
from tests.support.ethernet import extension, fragment, ipv4, ipv6, tcp, udp

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

N = 25
MTU = 2000
UDP_SEGMENT = 103  # linux/udp.h
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
Eventually = Callable[[Callable[[], bool]], bool]


@dataclass(frozen=True)
class Case:
    """What follows the two MAC addresses, and what it must count as."""

    rest: bytes
    protocol: str
    events: tuple[str, ...] = ()
    destination: bytes | None = None  # the other end, if not said


def each_protocol(ip: str) -> dict[str, Case]:
    upper: dict[str, tuple[Callable[[int, bytes], bytes], int]] = {"IPv4": (ipv4, 1), "IPv6": (ipv6, 58)}
    make, icmp_number = upper[ip]
    return {
        f"tcp over {ip}": Case(make(6, tcp(payload=bytes(10))), "tcp"),
        f"udp over {ip}": Case(make(17, udp()), "udp"),
        f"icmp over {ip}": Case(make(icmp_number, ethernet.icmp()), "icmp" if ip == "IPv4" else "icmpv6"),
        f"sctp over {ip}": Case(make(132, bytes(30)), "other-ip"),
    }


UNTAGGED = {
    **each_protocol("IPv4"),
    **each_protocol("IPv6"),
    "arp": Case(ethernet.arp(), "arp"),
    "lldp": Case(b"\x88\xcc" + bytes(46), "other"),
}
PROTOCOLS = {
    **UNTAGGED,
    **{f"{name}, VLAN": Case(ethernet.tagged(each.rest), each.protocol) for name, each in UNTAGGED.items()},
    **{f"{name}, QinQ": Case(ethernet.double_tagged(each.rest), each.protocol) for name, each in UNTAGGED.items()},
    "three tags": Case(ethernet.tagged(ethernet.double_tagged(ipv4(17, udp()))), "other"),
}
SIZES = {
    f"{length} bytes": Case(ipv4(17, udp(bytes(length - 42))), "udp")
    for bound in layout.SIZE_BOUNDS
    for length in (bound, bound + 1)
}
EVENTS = {
    "syn": Case(ipv4(6, tcp(ethernet.SYN)), "tcp", ("tcp_syn",)),
    "syn-ack over IPv6": Case(ipv6(6, tcp(ethernet.SYN | ethernet.ACK)), "tcp", ("tcp_syn",)),
    "fin-ack, tagged": Case(ethernet.tagged(ipv4(6, tcp(ethernet.FIN | ethernet.ACK))), "tcp", ("tcp_fin",)),
    "rst": Case(ipv4(6, tcp(ethernet.RST)), "tcp", ("tcp_rst",)),
    "all three": Case(ipv4(6, tcp(7)), "tcp", ("tcp_syn", "tcp_fin", "tcp_rst")),
    "syn behind options": Case(ipv4(6, tcp(ethernet.SYN), version_ihl=0x4F), "tcp", ("tcp_syn",)),
    "syn behind extensions": Case(ipv6(60, extension(6) + tcp(ethernet.SYN)), "tcp", ("tcp_syn",)),
    "broadcast": Case(ethernet.arp(), "arp", ("broadcast",), ethernet.BROADCAST),
    "multicast": Case(ipv4(17, udp()), "udp", ("multicast",), ethernet.MULTICAST),
    "multicast of IPv6": Case(ipv6(17, udp()), "udp", ("multicast",), bytes.fromhex("333300000001")),
    "malformed broadcast": Case(ipv4(17, udp(), total=9), "udp", ("malformed", "broadcast"), ethernet.BROADCAST),
}
BAD = ("malformed",)
MALFORMED = {
    "IPv4 header cut": Case(ipv4(6, tcp())[:12], "other-ip", BAD),
    "IPv4 says version 6": Case(ipv4(6, tcp(), version_ihl=0x65), "other-ip", BAD),
    "IPv4 header of 16 bytes": Case(ipv4(6, tcp(), version_ihl=0x44), "other-ip", BAD),
    "IPv4 longer than its frame": Case(ipv4(17, udp(), total=400), "udp", BAD),
    "IPv4 shorter than its header": Case(ipv4(17, udp(), total=19), "udp", BAD),
    "IPv4 of no length": Case(ipv4(17, udp(), total=0), "udp", BAD),
    "IPv4 ends within its options": Case(ipv4(17, udp(), version_ihl=0x4F, total=40), "udp", BAD),
    "IPv6 header cut": Case(ipv6(6, tcp())[:30], "other-ip", BAD),
    "IPv6 says version 4": Case(ipv6(6, tcp(), version=4), "other-ip", BAD),
    "IPv6 longer than its frame": Case(ipv6(17, udp(), length=400), "udp", BAD),
    "IPv6 extension cut": Case(ipv6(60, extension(17)[:6]), "other-ip", BAD),
    "IPv6 extension longer than all": Case(ipv6(60, bytes([17, 40]) + bytes(46)), "other-ip", BAD),
    "TCP header cut": Case(ipv4(6, tcp()[:19]), "tcp", BAD),
    "TCP header cut, padded": Case(ipv4(6, tcp()[:12]) + bytes(20), "tcp", BAD),
    "TCP header of 16 bytes": Case(ipv4(6, tcp(data_offset=4)), "tcp", BAD),
    "TCP options beyond the end": Case(ipv6(6, tcp(data_offset=15)), "tcp", BAD),
    "UDP header cut": Case(ipv6(17, udp(b"")[:7]), "udp", BAD),
    "UDP longer than its datagram": Case(ipv4(17, udp(length=100)), "udp", BAD),
    "UDP of 7 bytes": Case(ipv4(17, udp(length=7)), "udp", BAD),
    "ICMP header cut": Case(ipv4(1, ethernet.icmp()[:7]), "icmp", BAD),
    "ICMPv6 header cut": Case(ipv6(58, ethernet.icmp()[:4]), "icmpv6", BAD),
    "VLAN tag cut": Case(b"\x81\x00\x00\x05", "other", BAD),
    "IPv4 cut behind a tag": Case(ethernet.tagged(b"\x08\x00\x45\x00"), "other-ip", BAD),
}
LEGAL = {
    "padding": Case(ipv4(17, udp(b"")) + bytes(18), "udp"),
    "padding of IPv6": Case(ipv6(6, tcp()) + bytes(4), "tcp"),
    "IPv4 with all options": Case(ipv4(17, udp(), version_ihl=0x4F), "udp"),
    "TCP with all options": Case(ipv4(6, tcp(data_offset=15, payload=bytes(40))), "tcp"),
    "UDP shorter than its datagram": Case(ipv4(17, udp(bytes(20), length=18)), "udp"),
    "first fragment, eight bytes": Case(ipv4(6, tcp()[:8], fragment=ethernet.MORE_FRAGMENTS), "tcp"),
    "first fragment of longer UDP": Case(ipv4(17, udp(length=999), fragment=ethernet.MORE_FRAGMENTS), "udp"),
    "later fragment": Case(ipv4(6, b"\xff" * 16, fragment=100), "tcp"),
    "first fragment, flags": Case(ipv4(6, tcp(ethernet.SYN), fragment=ethernet.MORE_FRAGMENTS), "tcp", ("tcp_syn",)),
    "IPv6 first fragment": Case(ipv6(44, fragment(17, 0, more=1) + udp(length=999)), "udp"),
    "IPv6 later fragment": Case(ipv6(44, fragment(6, 100) + b"\xff" * 16), "tcp"),
    "IPv6 later fragment, payload like options": Case(
        ipv6(44, fragment(60, 100) + extension(17) + bytes(40)), "other-ip"
    ),
    "IPv6 first fragment, options, UDP": Case(ipv6(44, fragment(60, 0) + extension(17) + udp()), "udp"),
    "IPv6 without next header": Case(ipv6(59, b""), "other-ip"),
    "IPv6 of no length, options": Case(ipv6(0, extension(17) + udp(), length=0), "udp"),
    "IPv6 authentication": Case(ipv6(51, bytes([17, 4]) + bytes(22) + udp()), "udp"),
    "IPv6 long routing header": Case(ipv6(43, extension(6, 2) + tcp()), "tcp"),
    "IPv6 six extensions": Case(ipv6(60, extension(60) * 5 + extension(6) + tcp()), "tcp"),
    "IPv6 seven extensions": Case(ipv6(60, extension(60) * 6 + extension(6) + tcp()), "other-ip"),
    "ESP": Case(ipv6(50, bytes(40)), "other-ip"),
    "802.3 length": Case(b"\x00\x26" + bytes(46), "other"),
}
GROUPS = {"protocols": PROTOCOLS, "sizes": SIZES, "events": EVENTS, "malformed": MALFORMED, "legal": LEGAL}


@pytest.fixture
def counters(link: Any) -> Iterator[NetCounters]:
    for end in (link.here, link.there):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", str(MTU)], check=True)
    try:
        loaded = NetCounters.load()
    except BpfError as err:
        if err.errno in (errno.EPERM, errno.ENOSYS) or "no libbpf" in str(err):
            pytest.skip(f"needs BPF: {err}")
        raise
    with closing(loaded):
        yield loaded


@pytest.fixture
def refuse_native(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes every driver one without XDP."""
    link = libbpf.Library.link

    def refusing(self: libbpf.Library, program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        if flags == libbpf.XDP_FLAGS_DRV_MODE:
            raise BpfError("played by a test", errno.EOPNOTSUPP)
        return link(self, program_fd, ifindex, attach_type, flags)

    return lambda: monkeypatch.setattr(libbpf.Library, "link", refusing)


def traffic(counters: NetCounters, at: Interface, direction: str) -> Traffic:
    return layout.read_traffic(counters.counters(), at.slot, counters.cpus, at.base)[direction]


def flat(counted: Traffic) -> Counter[str]:
    """Return everything counted, under names of its own."""
    return Counter(
        {
            **{f"{protocol} bytes": number for protocol, number in counted.bytes.items()},
            **{
                f"{protocol} size {size}": number
                for protocol, sizes in counted.sizes.items()
                for size, number in enumerate(sizes)
            },
            **counted.events,
        }
    )


def expected(case: Case) -> Counter[str]:
    length = 12 + len(case.rest)
    size = bisect_left(layout.SIZE_BOUNDS, length)
    wanted = Counter({f"{case.protocol} bytes": N * length, f"{case.protocol} size {size}": N})
    wanted.update(dict.fromkeys(case.events, N))
    return wanted


def frame(case: Case, destination: bytes, source: bytes) -> bytes:
    return (case.destination or destination) + source + case.rest


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_what_arrives_is_counted_exactly(
    link: Any, counters: NetCounters, refuse_native: Callable[[], None], eventually: Eventually, mode: str, group: str
) -> None:
    """N frames of each kind raise exactly the counts they must, by N and their lengths, and no other."""
    if mode == "generic":
        refuse_native()
    at = counters.attach(link.here.ifindex(), "kon0")
    assert mode == at.ingress_mode
    for name, case in GROUPS[group].items():
        before = flat(traffic(counters, at, "ingress"))
        link.there.send(frame(case, ethernet.HERE, ethernet.THERE), N)

        def raised(before: Counter[str] = before) -> Counter[str]:
            return +(flat(traffic(counters, at, "ingress")) - before)

        assert eventually(lambda: sum(v for key, v in raised().items() if " size " in key) >= N), name
        assert (name, dict(expected(case))) == (name, dict(raised()))


@pytest.mark.parametrize("group", GROUPS)
def test_what_leaves_is_counted_exactly(link: Any, counters: NetCounters, group: str) -> None:
    """The same for frames sent from here; they have been counted when the socket returns."""
    at = counters.attach(link.here.ifindex(), "kon0")
    if at.egress_mode == "none":
        pytest.skip(f"needs egress: {at.egress_reason}")
    for name, case in GROUPS[group].items():
        before = flat(traffic(counters, at, "egress"))
        link.here.send(frame(case, ethernet.THERE, ethernet.HERE), N)
        raised = +(flat(traffic(counters, at, "egress")) - before)
        assert (name, dict(expected(case))) == (name, dict(raised))


@pytest.fixture
def both(link: Any, counters: NetCounters) -> Iterator[tuple[Callable[[], Traffic], Callable[[], Traffic]]]:
    """Count at both ends; what has left here, and what has arrived there.

    A native program at the far end makes this end's device take no super packets: the kernel cuts them after our
    program has seen them whole, and the far one sees what came of it.
    """
    with link.there.entered(), closing(NetCounters.load()) as there:
        far = there.attach(link.there.ifindex(), "kon1")
        assert "native" == far.ingress_mode
        with link.here.entered():
            near = counters.attach(link.here.ifindex(), "kon0")
            if near.egress_mode == "none":
                pytest.skip(f"needs egress: {near.egress_reason}")
            yield lambda: traffic(counters, near, "egress"), lambda: traffic(there, far, "ingress")


def test_super_packets_of_tcp_are_the_frames_they_become(
    link: Any, both: tuple[Callable[[], Traffic], Callable[[], Traffic]], eventually: Eventually
) -> None:
    """Two megabytes over one connection: packets of each size, bytes and flags here are those at the other end."""
    left, arrived = both
    size = 2_000_000
    with link.there.entered():
        server = socket.create_server((link.there.address, 7000))
    with server, socket.create_connection((link.there.address, 7000)) as client:
        peer, _ = server.accept()
        client.setblocking(False)
        with peer:
            data, received = memoryview(bytes(size)), 0
            while received < size:
                with suppress(BlockingIOError):
                    data = data[client.send(data) :] if data else data
                received += len(peer.recv(1 << 20))
    assert eventually(lambda: arrived().events["tcp_fin"] == 1)
    assert flat(left()) == flat(arrived())
    assert left().packets("tcp") > size / MTU
    assert {"tcp_syn": 1, "tcp_fin": 1} == {key: n for key, n in left().events.items() if n}


def test_super_packets_of_udp_are_the_frames_they_become(
    link: Any, both: tuple[Callable[[], Traffic], Callable[[], Traffic]], eventually: Eventually
) -> None:
    """One send of 9,500 bytes in segments of 1,000 is nine whole frames and a shorter one, here and there."""
    left, arrived = both
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        client.sendto(bytes(9500), (link.there.address, 9))
    assert eventually(lambda: arrived().packets("udp") == 10)
    assert [0, 0, 0, 0, 1, 9, 0] == left().sizes["udp"]
    assert 9500 + 10 * 42 == left().bytes["udp"]
    assert flat(left())["udp bytes"] == flat(arrived())["udp bytes"]
    assert left().sizes["udp"] == arrived().sizes["udp"]


@pytest.mark.parametrize("options", [0, 12, 40])
@pytest.mark.parametrize("ip", ["IPv4", "IPv6"])
def test_super_packets_of_a_guest_are_the_frames_they_become(
    link: Any, counters: NetCounters, ip: str, options: int
) -> None:
    """A packet socket, as a virtual machine's tap, hands one over without saying how many frames it is."""
    at = counters.attach(link.here.ifindex(), "kon0")
    if at.egress_mode == "none":
        pytest.skip(f"needs egress: {at.egress_reason}")
    make, kind, network = (ipv4, 1, 20) if ip == "IPv4" else (ipv6, 4, 40)
    headers = 14 + network + 20 + options
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        raw.bind(("kon0", 0))
        for last in (1, 17, 959, 960, 983, 984, 999, 1000):
            before = traffic(counters, at, "egress")
            rest = make(6, tcp(data_offset=5 + options // 4, payload=bytes(options + 2000 + last)))
            offload = struct.pack("=BBHHHH", 1, kind, headers, 1000, 14 + network, 16)  # struct virtio_net_hdr
            raw.send(offload + ethernet.THERE + ethernet.HERE + rest)
            after = traffic(counters, at, "egress")
            grown = after.packets("tcp") - before.packets("tcp"), after.bytes["tcp"] - before.bytes["tcp"]
            assert (last, (3, 2000 + last + 3 * headers)) == (last, grown)
