"""The `tcp` plugin's programs against the real kernel: every count exact, and of the own network namespace alone.

What happens elsewhere on the machine goes on meanwhile, the other end of the link included: the programs are told to
count the namespace the test runs in.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from kon_agent.bpf import libbpf, tcp
from kon_agent.bpf.probe import Probe
from kon_agent.config.schema import TcpConfig
from kon_agent.errors import BpfError
from kon_agent.linux.memory import map_memory
from kon_agent.plugins import netstat
from kon_agent.plugins.context import Context
from kon_agent.plugins.tcp import Tcp
from tests.support.dropper import dropper, drops

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

TCP_USER_TIMEOUT = 18  # linux/tcp.h; the socket module names it only since Python 3.6 on some systems
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 s
NOTHING = dict.fromkeys(tcp.FAILURES, 0), dict.fromkeys(tcp.ABORTS, 0)
CLOSED_PORT = 9
IPPROTO_MPTCP = 262
CLOSE_WAIT = 8  # linux/tcp_states.h

Eventually = Callable[[Callable[[], bool]], bool]


@contextmanager
def loaded(config: TcpConfig) -> Iterator[Probe]:
    try:
        probe = Probe.load(tcp.SPEC, config)
    except BpfError as err:
        if err.errno in (errno.EPERM, errno.ENOSYS):
            pytest.skip(f"needs BPF: {err}")
        raise
    with closing(probe):
        yield probe


@pytest.fixture
def counts(link: Any) -> Iterator[Callable[[], tcp.Counts]]:
    """Return what reads the counts of the namespace at this end, which begin at zero."""
    with loaded(TcpConfig(namespaces="own")) as probe:
        rows = probe.map_rows()
        yield lambda: tcp.read(rows)


def listener(end: Any) -> socket.socket:
    with end.entered():
        return socket.create_server((end.address, 0), backlog=64)


def connected(end: Any, to: socket.socket) -> socket.socket:
    """Return a connection from an end to a listener, not yet accepted there."""
    with end.entered():
        return socket.create_connection(to.getsockname())


def test_connections_are_opened_accepted_and_closed(link: Any, counts: Any, eventually: Eventually) -> None:
    """Seven connections from here and four to here are seven opened, four accepted, and eleven closed at their end."""
    with ExitStack() as sockets:
        here, there = (sockets.enter_context(listener(end)) for end in (link.here, link.there))
        began = time.monotonic()
        outgoing = [sockets.enter_context(connected(link.here, there)) for _ in range(7)]
        took = time.monotonic() - began
        incoming = [sockets.enter_context(connected(link.there, here)) for _ in range(4)]
        accepted = [here.accept()[0] for _ in range(4)] + [there.accept()[0] for _ in range(7)]
        seen = counts()
        assert (7, 4, 0) == (seen.opened, seen.accepted, seen.closed)
        for each in outgoing + incoming + accepted:
            each.close()
        assert eventually(lambda: counts().closed == 11)
    seen = counts()
    assert (7, 4, 11) == (seen.opened, seen.accepted, seen.closed)
    assert NOTHING == (seen.failed, seen.aborted)
    assert {"syn": 0, "data": 0} == seen.retransmits
    assert (0, 0) == (seen.resets_sent, seen.resets_received)
    assert 7 == sum(seen.connect.counts)
    assert 0 < seen.connect.total_s <= took
    assert 22 == sum(seen.rtt.counts), "each at its beginning and at its end"


def test_a_refused_connection_is_refused(link: Any, counts: Any) -> None:
    """Five attempts at a port nobody listens on are five refusals and five received resets, and no connection."""
    for _ in range(5):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((link.there.address, CLOSED_PORT))
    seen = counts()
    assert {**NOTHING[0], "refused": 5} == seen.failed
    assert (0, 0, 0) == (seen.opened, seen.accepted, seen.closed)
    assert (0, 5) == (seen.resets_sent, seen.resets_received)
    assert 0 == sum(seen.connect.counts)


def test_refusing_sends_a_reset(link: Any, counts: Any) -> None:
    """Three attempts at a closed port of ours are three resets we have sent, and no failure of ours."""
    with link.there.entered():
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((link.here.address, CLOSED_PORT))
    seen = counts()
    assert (3, 0) == (seen.resets_sent, seen.resets_received)
    assert NOTHING == (seen.failed, seen.aborted)


def test_an_unanswered_connection_times_out(link: Any, counts: Any) -> None:
    """An attempt into a black hole is one timeout; every SYN but the first is a retransmission."""
    with listener(link.there) as there, dropper(link.there.name, link.there.interface), socket.socket() as attempt:
        attempt.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
        with pytest.raises(TimeoutError):
            attempt.connect(there.getsockname())
        lost = drops(link.there.name, link.there.interface)
    seen = counts()
    assert {**NOTHING[0], "timeout": 1} == seen.failed
    assert {"syn": lost - 1, "data": 0} == seen.retransmits
    assert 0 < lost - 1


def test_an_unreachable_host_is_unreachable(link: Any, counts: Any) -> None:
    """ICMP's word that there is no way to a host is the failure's reason."""
    with link.there.entered(), open("/proc/sys/net/ipv4/ip_forward", "w", encoding="ascii") as file:
        file.write("1")
    for end, route in (
        (link.there, ("unreachable", "10.78.0.0/24")),
        (link.here, ("10.78.0.0/24", "via", "10.77.0.2")),
    ):
        subprocess.run(["ip", "-n", end.name, "route", "add", *route], check=True)
    with pytest.raises(OSError, match="No route to host"):
        socket.create_connection(("10.78.0.1", CLOSED_PORT))
    assert {**NOTHING[0], "unreachable": 1} == counts().failed


def test_an_attempt_its_program_gives_up_is_abandoned(link: Any, counts: Any) -> None:
    """Closing a socket before there was an answer is told from the kernel's own timeout."""
    with listener(link.there) as there, dropper(link.there.name, link.there.interface), socket.socket() as attempt:
        attempt.setblocking(False)
        assert errno.EINPROGRESS == attempt.connect_ex(there.getsockname())
    assert {**NOTHING[0], "abandoned": 1} == counts().failed


def test_an_attempt_begun_before_the_load_is_opened(link: Any, eventually: Eventually) -> None:
    """It is no connection that somebody else has opened; only its latency is not known."""
    with ExitStack() as stack, listener(link.there) as there, socket.socket() as attempt:
        attempt.setblocking(False)
        with dropper(link.there.name, link.there.interface):
            assert errno.EINPROGRESS == attempt.connect_ex(there.getsockname())
            rows = stack.enter_context(loaded(TcpConfig(namespaces="own"))).map_rows()
        assert eventually(lambda: tcp.read(rows).opened == 1)
        seen = tcp.read(rows)
        assert (0, 0) == (seen.accepted, sum(seen.connect.counts))


def test_both_at_once_is_one_opened_connection(counts: Any, eventually: Eventually) -> None:
    """A socket that connects to itself, whose SYN meets itself, has been opened once and accepted by nobody."""
    with socket.socket() as itself:
        itself.bind(("127.0.0.1", 0))
        itself.connect(itself.getsockname())
        seen = counts()
        assert (1, 0, 0) == (seen.opened, seen.accepted, seen.closed)
    assert eventually(lambda: counts().closed == 1)


def test_a_lost_syn_shows_in_the_latency(link: Any, counts: Any, eventually: Eventually) -> None:
    """A connection whose first SYN was lost has the second until the next in its latency."""
    with listener(link.there) as there, socket.socket() as attempt:
        attempt.setblocking(False)
        with dropper(link.there.name, link.there.interface):
            attempt.connect_ex(there.getsockname())
            assert eventually(lambda: drops(link.there.name, link.there.interface) == 1)
        assert eventually(lambda: counts().opened == 1)
        seen = counts()
    assert {"syn": 1, "data": 0} == seen.retransmits
    assert 1.0 <= seen.connect.total_s
    under_a_second = sum(1 for bound in tcp.BOUNDS_S if bound < 1)
    assert (0, 1) == (sum(seen.connect.counts[:under_a_second]), sum(seen.connect.counts))


def test_every_lost_segment_is_a_retransmission(link: Any, counts: Any, eventually: Eventually) -> None:
    """A segment dropped on its way four times or more is sent again as often, and arrives in the end."""
    with (
        listener(link.there) as there,
        connected(link.here, there) as sender,
        there.accept()[0] as receiver,
    ):
        with dropper(link.there.name, link.there.interface):
            sender.send(b"x")
            assert eventually(lambda: drops(link.there.name, link.there.interface) >= 4)
            dropped = drops(link.there.name, link.there.interface)
        receiver.settimeout(10)
        assert b"x" == receiver.recv(1)
        # Between the last look and the dropper's end another may have been lost: read what the kernel itself counted.
        assert {"syn": 0, "data": retransmitted(sender)} == counts().retransmits
        assert dropped <= counts().retransmits["data"] <= dropped + 1


def retransmitted(connection: socket.socket) -> int:
    """Return how many segments a connection has sent again: tcpi_total_retrans of TCP_INFO (linux/tcp.h)."""
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", information, 100)[0])


def test_a_lost_answer_is_a_retransmission_of_a_syn(link: Any, counts: Any, eventually: Eventually) -> None:
    """A SYN+ACK of ours that is sent again counts as the kernel itself counts it, and is no failure of ours."""
    with link.there.entered():
        attempt = socket.socket()
    with listener(link.here) as here, attempt, dropper(link.there.name, link.there.interface):
        attempt.setblocking(False)
        attempt.connect_ex((link.here.address, here.getsockname()[1]))
        assert eventually(lambda: counts().retransmits["syn"] >= 2)
        seen = counts()
        assert netstat.read(Context())["TcpExtTCPSynRetrans"] - seen.retransmits["syn"] in (0, 1)  # not read at once
    assert (0, NOTHING) == (seen.retransmits["data"], (seen.failed, seen.aborted))


def test_the_round_trip_time_is_the_kernels(link: Any, counts: Any) -> None:
    """What is observed at the beginning of a connection is its smoothed round trip time, as TCP_INFO has it."""
    with listener(link.there) as there, connected(link.here, there) as ours:
        (rtt_us,) = struct.unpack_from("=I", ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 68)
        seen = counts().rtt
    assert (1, rtt_us) == (sum(seen.counts), round(seen.total_s * 1e6))


def test_a_reset_from_the_peer_aborts(link: Any, counts: Any, eventually: Eventually) -> None:
    """A peer that closes with a reset: one closed connection, aborted by a reset that was received."""
    with listener(link.there) as there, connected(link.here, there), there.accept()[0] as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        peer.close()
        assert eventually(lambda: counts().closed == 1)
        seen = counts()
    assert {**NOTHING[1], "reset": 1} == seen.aborted
    assert (0, 1) == (seen.resets_sent, seen.resets_received)
    assert NOTHING[0] == seen.failed


def test_our_own_reset_is_local(link: Any, counts: Any, eventually: Eventually) -> None:
    """Closing with linger time 0 is told from a reset of the peer's."""
    with listener(link.there) as there, connected(link.here, there) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        ours.close()
        assert eventually(lambda: counts().closed == 1)
    seen = counts()
    assert {**NOTHING[1], "local": 1} == seen.aborted
    assert (1, 0) == (seen.resets_sent, seen.resets_received)


def test_closing_with_data_unread_is_local_also_after_the_peer(link: Any, counts: Any, eventually: Eventually) -> None:
    """A peer that has sent and closed in order is reset where what it sent is never read: that is our doing."""
    with listener(link.there) as there, connected(link.here, there) as ours, there.accept()[0] as peer:
        peer.send(b"x")
        peer.shutdown(socket.SHUT_WR)
        assert eventually(lambda: state(ours) == CLOSE_WAIT)
        ours.close()
        assert eventually(lambda: counts().closed == 1)
    assert {**NOTHING[1], "local": 1} == counts().aborted


def test_a_reset_after_the_peers_end_is_the_peers(link: Any, counts: Any, eventually: Eventually) -> None:
    """A peer that has closed answers what is sent to it by a reset: EPIPE, and the peer's all the same."""
    with listener(link.there) as there, connected(link.here, there) as ours:
        there.accept()[0].close()
        assert eventually(lambda: state(ours) == CLOSE_WAIT)
        ours.send(b"x")
        assert eventually(lambda: counts().closed == 1)
    assert {**NOTHING[1], "reset": 1} == counts().aborted


def state(connection: socket.socket) -> int:
    """Return a connection's state: tcpi_state of TCP_INFO (linux/tcp.h)."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def test_multipath_counts_its_one_path(counts: Any, eventually: Eventually) -> None:
    """An MPTCP connection is the TCP connections below it; what is above them is none itself."""
    try:
        server, client = (socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) for _ in range(2))
    except OSError as err:
        pytest.skip(f"needs MPTCP: {err}")
    with server, client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        with server.accept()[0]:
            seen = counts()
            assert (1, 1, 0) == (seen.opened, seen.accepted, seen.closed)
        client.close()
        assert eventually(lambda: counts().closed == 2)
    assert NOTHING == (counts().failed, counts().aborted)


def test_nobody_but_the_kernel_can_change_the_rows(link: Any) -> None:
    """Neither by bpf(2) nor by a writable mapping, not even with the descriptor that only the supervisor has."""
    with loaded(TcpConfig()) as probe:
        rows = probe.maps["kon_tcp.rows"]
        with pytest.raises(BpfError) as refused:
            libbpf.library().update(rows, "rows", 0, bytes(tcp.ROW_BYTES))
        assert errno.EPERM == refused.value.errno
        with pytest.raises(PermissionError):
            map_memory(rows, tcp.ROW_BYTES, writable=True)


def test_a_silent_peer_is_a_timeout(link: Any, counts: Any, eventually: Eventually) -> None:
    """A connection whose data nobody acknowledges ends as aborted by timeout."""
    with (
        listener(link.there) as there,
        connected(link.here, there) as ours,
        dropper(link.there.name, link.there.interface),
    ):
        ours.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 300)
        ours.send(b"x")
        assert eventually(lambda: counts().closed == 1)
    seen = counts()
    assert {**NOTHING[1], "timeout": 1} == seen.aborted
    assert 0 < seen.retransmits["data"]


def test_connections_over_ipv6_count_alike(counts: Any, eventually: Eventually) -> None:
    """A connection over IPv6 to this very host is opened once, accepted once and closed twice."""
    with open("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "w", encoding="ascii") as file:
        file.write("0")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        with socket.create_connection(server.getsockname()[:2]), server.accept()[0]:
            assert (1, 1) == (counts().opened, counts().accepted)
        assert eventually(lambda: counts().closed == 2)


def test_all_namespaces_count_where_asked_for(link: Any) -> None:
    """By default a connection counts at both ends, whatever namespaces they are in."""
    with loaded(TcpConfig()) as probe, listener(link.there) as there:
        rows = probe.map_rows()
        before = tcp.read(rows)
        with connected(link.here, there):
            seen = tcp.read(rows)
    assert before.opened + 1 <= seen.opened  # others on this machine may connect meanwhile
    assert before.accepted + 1 <= seen.accepted


def test_the_plugin_exports_what_procfs_has_and_more(link: Any) -> None:
    """Whatever there is without BPF has the same name with it."""
    with loaded(TcpConfig(namespaces="own")) as probe:
        with_bpf = {metric.name for metric in Tcp(TcpConfig(), Context(grants=probe.grants())).collect()}
    without = {metric.name for metric in Tcp(TcpConfig(), Context()).collect()}
    assert set() == without - with_bpf
    assert {"tcp_connections_opened_total", "tcp_retransmits_total", "tcp_sockets", "ebpf_source"} <= without


def test_a_program_without_its_tracepoint_is_left_out(link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that lacks one of the optional ones: the others count, and what would lie is not exported."""
    has_tracepoint = libbpf.Library.has_tracepoint
    lacking = "tcp_receive_reset"
    monkeypatch.setattr(
        libbpf.Library, "has_tracepoint", lambda self, name: name != lacking and has_tracepoint(self, name)
    )
    with loaded(TcpConfig(namespaces="own")) as probe:
        assert [tcp.RECEIVED_RESETS] == probe.origin.left_out
        assert tcp.RECEIVED_RESETS not in probe.programs
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((link.there.address, CLOSED_PORT))
        found = {each.name: each.value for each in Tcp(TcpConfig(), Context(grants=probe.grants())).collect()}
        assert 1 == tcp.read(probe.map_rows()).failed["refused"]
    assert "tcp_resets_received_total" not in found
    assert "tcp_resets_sent_total" in found


@pytest.mark.parametrize("choice", ["pylibbpf", "system"])
def test_either_libbpf_loads_it(link: Any, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """The object loads through pylibbpf's libbpf and through the system's."""
    monkeypatch.setenv(libbpf.CHOICE_VARIABLE, choice)
    libbpf.library.cache_clear()
    try:
        libbpf.library()
    except BpfError as err:
        pytest.skip(f"needs the libbpf of {choice}: {err}")
    else:
        with loaded(TcpConfig()) as probe:
            assert [] == probe.origin.left_out
    finally:
        monkeypatch.undo()
        libbpf.library.cache_clear()
