"""The `drops` plugin against the real kernel: drops of many kinds, each under its reason and counted exactly.

The program is told to count the namespace the test runs in; what the rest of the machine drops meanwhile is not there.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from kon_agent.bpf import drops
from kon_agent.bpf.probe import Probe
from kon_agent.config.schema import DropsConfig
from kon_agent.errors import BpfError
from kon_agent.plugins.context import Context
from kon_agent.plugins.drops import METRIC, Drops
from tests.support.dropper import dropper

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

DISCARD = 9

NETLINK_NETFILTER = 12  # linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 0x1, 0x4, 0x400
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11  # linux/netfilter/nfnetlink.h
NFNL_SUBSYS_NFTABLES, NFPROTO_IPV4 = 10, 2
NFT_MSG_NEWTABLE, NFT_MSG_NEWCHAIN = 0, 3  # linux/netfilter/nf_tables.h
NLA_F_NESTED = 0x8000

Dropped = Callable[[int], dict[str, float]]
Eventually = Callable[[Callable[[], bool]], bool]


def by_reason(context: Context) -> dict[str, float]:
    """Collect; return the packets of every reason that has any."""
    metrics = Drops(DropsConfig(), context).collect()
    return {each.labels["reason"]: each.value for each in metrics if each.name == METRIC and each.value}


@pytest.fixture
def dropped(link: Any, eventually: Eventually) -> Iterator[Dropped]:
    """Return what waits for that many drops in the namespace at this end, and says them by their reasons."""
    try:
        probe = Probe.load(drops.SPEC, DropsConfig(namespaces="own"))
    except BpfError as err:
        if err.errno in (errno.EPERM, errno.ENOSYS):
            pytest.skip(f"needs BPF: {err}")
        raise
    with closing(probe):
        context = Context(grants=probe.grants())

        def wait(packets: int) -> dict[str, float]:
            eventually(lambda: sum(by_reason(context).values()) >= packets)
            return by_reason(context)

        yield wait


def send(end: Any, address: str, times: int, port: int = DISCARD, size: int = 100, ttl: int = 64) -> None:
    """Send datagrams from an end; answers by ICMP do not stop it."""
    with end.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        for _ in range(times):
            udp.sendto(bytes(size), (address, port))


def test_a_port_without_a_socket(link: Any, dropped: Dropped) -> None:
    """Datagrams to a port nobody has open are no_socket, to the packet, and nothing else."""
    send(link.there, link.here.address, times=50)
    assert {"no_socket": 50} == dropped(50)


def test_a_connection_nobody_listens_for(link: Any, dropped: Dropped) -> None:
    """A SYN to a closed port is no_socket as well."""
    with link.there.entered():
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((link.here.address, DISCARD))
    assert {"no_socket": 3} == dropped(3)


def test_a_full_receive_buffer(link: Any, dropped: Dropped, eventually: Eventually) -> None:
    """What a socket has no room for is socket_rcvbuff: all that was sent and cannot be read."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        udp.bind((link.here.address, 0))
        udp.setblocking(False)
        send(link.there, link.here.address, times=100, port=udp.getsockname()[1], size=1000)
        arrived = 0

        def is_complete() -> bool:
            nonlocal arrived
            while received(udp):
                arrived += 1
            return arrived + sum(dropped(0).values()) == 100

        assert eventually(is_complete)
    assert 0 < arrived < 100
    assert {"socket_rcvbuff": 100 - arrived} == dropped(0)


def received(udp: socket.socket) -> bytes:
    """Return the next datagram, or nothing where there is none."""
    try:
        return udp.recv(2000)
    except BlockingIOError:
        return b""


def test_a_firewall(link: Any, dropped: Dropped) -> None:
    """What a netfilter chain drops is netfilter_drop."""
    drop_all_input()
    send(link.there, link.here.address, times=20)
    assert {"netfilter_drop": 20} == dropped(20)


@pytest.mark.parametrize("hook", ["ingress", "egress"])
def test_a_program_at_tc(link: Any, dropped: Dropped, hook: str) -> None:
    """What a tc-bpf program drops is tc_ingress on its way in, and tc_egress on its way out."""
    sender, address = (link.there, link.here.address) if hook == "ingress" else (link.here, link.there.address)
    with dropper(link.here.name, link.here.interface, hook):
        send(sender, address, times=20)
    assert {f"tc_{hook}": 20} == dropped(20)


def test_a_packet_that_may_go_no_further(link: Any, dropped: Dropped) -> None:
    """What arrives with a time to live of one and should be passed on is ip_inhdr."""
    with open("/proc/sys/net/ipv4/ip_forward", "w", encoding="ascii") as file:
        file.write("1")
    for end, way in ((link.here, ("dev", "kon0")), (link.there, ("via", link.here.address))):
        subprocess.run(["ip", "-n", end.name, "route", "add", "10.78.0.0/24", *way], check=True)
    send(link.there, "10.78.0.1", times=7, ttl=1)
    assert {"ip_inhdr": 7} == dropped(7)


def test_a_frame_for_another_host(link: Any, dropped: Dropped) -> None:
    """A packet in a frame that is not addressed to us is otherhost."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, b"\x0a\x4d\0\x02", b"\x0a\x4d\0\x01") + bytes(8)
    link.there.send(bytes.fromhex("020000000099" + link.there.mac.replace(":", "") + "0800") + ip, times=5)
    assert {"otherhost": 5} == dropped(5)


def test_drops_of_another_namespace_are_not_ours(link: Any, dropped: Dropped) -> None:
    """What the other end drops is not counted here; what we drop after it is."""
    send(link.here, link.there.address, times=10)
    send(link.there, link.here.address, times=2)
    assert {"no_socket": 2} == dropped(2)


def test_procfs_says_the_same(link: Any, dropped: Dropped, eventually: Eventually) -> None:
    """Where procfs has a counter for a reason, it counts the same drops under the same name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        udp.bind((link.here.address, 0))
        send(link.there, link.here.address, times=30, port=udp.getsockname()[1], size=1000)
        send(link.there, link.here.address, times=10)
        assert eventually(lambda: dropped(0).get("no_socket") == 10)
    from_procfs = by_reason(Context())
    from_procfs.pop("cpu_backlog", None)  # the whole machine's
    assert {"no_socket", "socket_rcvbuff"} == from_procfs.keys()
    assert from_procfs == dropped(0)


def drop_all_input() -> None:
    """Give this namespace a netfilter table whose input chain drops everything: what nft(8) would say by netlink."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        hook = attribute(1, struct.pack("!I", 1)) + attribute(2, struct.pack("!i", 0))  # LOCAL_IN, priority
        table = attribute(1, b"kon\0")  # NFTA_TABLE_NAME
        chain = (
            *(attribute(1, b"kon\0"), attribute(3, b"input\0")),  # NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
            attribute(4 | NLA_F_NESTED, hook),  # NFTA_CHAIN_HOOK
            *(attribute(5, struct.pack("!I", 0)), attribute(7, b"filter\0")),  # NFTA_CHAIN_POLICY: NF_DROP; _TYPE
        )
        kind = NFNL_SUBSYS_NFTABLES << 8
        create = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK
        netlink.send(
            message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES)
            + message(kind | NFT_MSG_NEWTABLE, create, NFPROTO_IPV4, 0, table)
            + message(kind | NFT_MSG_NEWCHAIN, create, NFPROTO_IPV4, 0, b"".join(chain))
            + message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES)
        )
        netlink.settimeout(10)
        for _ in range(2):
            (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)  # struct nlmsgerr
            if code:
                pytest.skip(f"needs nf_tables: {errno.errorcode[-code]}")


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, flags: int, family: int, resource: int, payload: bytes = b"") -> bytes:
    body = struct.pack("!BBH", family, 0, resource) + payload
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body
