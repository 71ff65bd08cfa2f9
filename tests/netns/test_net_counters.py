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
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from kon_agent.bpf import layout, libbpf, loader
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError
from kon_agent.linux import memory
from tests.support import ethernet
from tests.support.forking import forked

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

NOBODY = 65534
FRAMES = 50
Eventually = Callable[[Callable[[], bool]], bool]

TO_HERE = bytes.fromhex("020000000001" + "020000000002")
TO_THERE = bytes.fromhex("020000000002" + "020000000001")
UDP = ethernet.ipv4(17, ethernet.udp())


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


@pytest.mark.usefixtures("tcx")
def test_headers_in_a_page_are_found(link: Any, counters: NetCounters) -> None:
    """A jumbo frame from a packet socket has nothing but its Ethernet header in the buffer itself."""
    for end in (link.here, link.there):
        subprocess.run(["ip", "-n", end.name, "link", "set", end.interface, "mtu", "9000"], check=True)
    at = counters.attach(link.here.ifindex(), "kon0")
    frame = TO_THERE + ethernet.tagged(ethernet.ipv6(60, ethernet.extension(17) + ethernet.udp(bytes(8000))))
    link.here.send(frame, FRAMES)
    assert {"udp": (FRAMES, FRAMES * len(frame))} == nonzero(counters, at, "egress")
    events = layout.read_traffic(counters.counters(), at.slot, counters.cpus, at.base)["egress"].events
    assert {0} == set(events.values())


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
    frame = bytes.fromhex("0200000000ff020000000002") + ethernet.tagged(UDP)
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
        link.there.send(TO_HERE + UDP, FRAMES)
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
    link.there.send(TO_HERE + UDP, FRAMES)
    assert eventually(lambda: counts(counters, at)["ingress", "udp"][0] == FRAMES)
    counters.detach(ifindex)
    assert not has_xdp("kon0")
    link.there.send(TO_HERE + UDP, FRAMES)
    assert at == counters.attach(ifindex, "kon0")
    link.there.send(TO_HERE + UDP, 1)
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
    kinds = ["anon_inode:bpf-map"] * 2 + ["anon_inode:bpf-prog"] * 3
    assert sorted([*kinds, "anon_inode:bpf_link", "anon_inode:bpf_link"]) == sorted(bpf_fds.values())
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in bpf_fds)


def test_without_privilege_loading_says_what_it_needs(link: Any) -> None:
    """The kernel's word is told; what to do about it depends on what else is missing, and is told by who asked."""
    libbpf.library()  # that user may not be able to reach the library, nor the object, by name
    held = os.open(loader.object_path("kon_net"), os.O_RDONLY)

    def child() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(BpfError, match="EPERM") as refused:
            NetCounters.load(f"/proc/self/fd/{held}")
        assert errno.EPERM == refused.value.errno

    assert 0 == os.waitpid(forked(child), 0)[1]
    os.close(held)


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
