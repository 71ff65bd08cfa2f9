"""How TCP connections begin, fare and end, counted in the kernel by ebpf/kon_tcp.bpf.c; without BPF, from procfs.

    tcp_connections_opened_total                this side connected            procfs: ActiveOpens, failed ones included
    tcp_connections_accepted_total              the other side did             procfs: PassiveOpens
    tcp_connections_closed_total                opened or accepted ones that are no more
    tcp_connections_failed_total {reason}       attempts of this side          procfs: AttemptFails, of both sides
    tcp_connections_aborted_total {reason}      of the closed: without proper close             procfs: EstabResets
    tcp_retransmits_total {kind}                syn (SYN-ACK, too) and data    procfs: TCPSynRetrans, RetransSegs
    tcp_resets_sent_total                                                      procfs: OutRsts
    tcp_resets_received_total
    tcp_connect_latency_seconds_…               from the first SYN to the connection, of opened ones
    tcp_rtt_seconds_…                           smoothed RTT, once at the beginning and once at the end of a connection
    tcp_sockets {state, source="procfs"}        now: in_use, established, orphaned, time_wait, allocated

The kernel's counters in procfs, and the sockets, are those of this process's network namespace since its making; they
carry the label `source="procfs"`, and their reason is "unknown". What has no procfs is missing without BPF.

BPF counts a super packet (TSO) that is sent again as one, RetransSegs its segments. Connections there were before the
load are closed without having been opened. Kernels before 6.10 tell of the resets sent by sockets only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kon_agent.bpf import tcp
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import TcpConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import netstat
from kon_agent.plugins.context import Context
from kon_agent.plugins.netstat import Counters
from kon_agent.plugins.probed import Probed, histogram

SOCKSTAT, SOCKSTAT6 = "/proc/net/sockstat", "/proc/net/sockstat6"

_SOURCE = {"source": "procfs"}
_UNKNOWN = {"reason": "unknown", **_SOURCE}

_PROCFS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("tcp_connections_opened_total", _SOURCE, "TcpActiveOpens"),
    ("tcp_connections_accepted_total", _SOURCE, "TcpPassiveOpens"),
    ("tcp_connections_failed_total", _UNKNOWN, "TcpAttemptFails"),
    ("tcp_connections_aborted_total", _UNKNOWN, "TcpEstabResets"),
    ("tcp_resets_sent_total", _SOURCE, "TcpOutRsts"),
)
_SOCKETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # TIME_WAIT is not in use; a listener is. Both files count the sockets of their own protocol only as in use.
    ("in_use", ("TCPinuse", "TCP6inuse")),
    ("established", ("TcpCurrEstab",)),  # CLOSE_WAIT included (RFC 4022)
    ("orphaned", ("TCPorphan",)),
    ("time_wait", ("TCPtw",)),
    ("allocated", ("TCPalloc",)),
)


class Tcp(Probed):
    """The collector.

    Args:
        config: not needed here: the supervisor tells the programs whose connections count.
        context: with the grants `rows` and `origin`; without them, procfs stands in.
    """

    def __init__(self, config: TcpConfig, context: Context) -> None:
        super().__init__("tcp", context)

    def _from_rows(self, rows: memoryview) -> Iterator[Metric]:
        yield from _counted(tcp.read(rows), self._origin)
        yield from self._sockets(netstat.read(self._context))

    def _from_procfs(self) -> Iterator[Metric]:
        counters = netstat.read(self._context)
        yield from _from_procfs(counters)
        yield from self._sockets(counters)

    def _sockets(self, counters: Counters) -> Iterator[Metric]:
        """Yield how many sockets there are now, which only procfs tells."""
        sockets = "".join(netstat.read_text(self._context, path) for path in (SOCKSTAT, SOCKSTAT6))
        yield from _sockets(counters | _parse_sockstat(sockets))


def _counted(counts: tcp.Counts, origin: Origin) -> Iterator[Metric]:
    yield _metric("tcp_connections_opened_total", counts.opened)
    yield _metric("tcp_connections_accepted_total", counts.accepted)
    yield _metric("tcp_connections_closed_total", counts.closed)
    for reason, count in counts.failed.items():
        yield _metric("tcp_connections_failed_total", count, {"reason": reason})
    for reason, count in counts.aborted.items():
        yield _metric("tcp_connections_aborted_total", count, {"reason": reason})
    for kind, count in counts.retransmits.items():
        yield _metric("tcp_retransmits_total", count, {"kind": kind})
    if tcp.SENT_RESETS not in origin.left_out:
        yield _metric("tcp_resets_sent_total", counts.resets_sent)
    if tcp.RECEIVED_RESETS not in origin.left_out:
        yield _metric("tcp_resets_received_total", counts.resets_received)
    for name, seen in (("tcp_connect_latency_seconds", counts.connect), ("tcp_rtt_seconds", counts.rtt)):
        yield from histogram(name, tcp.BOUNDS_S, seen.counts, seen.total_s, {})


def _from_procfs(counters: Counters) -> Iterator[Metric]:
    for name, labels, counter in _PROCFS:
        if counter in counters:
            yield _metric(name, counters[counter], labels)
    segments, syns = counters.get("TcpRetransSegs"), counters.get("TcpExtTCPSynRetrans")
    if segments is not None and syns is not None:
        yield _metric("tcp_retransmits_total", syns, {"kind": "syn", **_SOURCE})
        yield _metric("tcp_retransmits_total", max(0, segments - syns), {"kind": "data", **_SOURCE})  # not read at once


def _sockets(counters: Counters) -> Iterator[Metric]:
    for state, names in _SOCKETS:
        number = netstat.total(counters, names)
        if number is not None:
            yield Metric("tcp_sockets", float(number), {"state": state, **_SOURCE})


def _parse_sockstat(text: str) -> Counters:
    """Return the numbers of `TCP: inuse 4 orphan 0 tw 0 alloc 4 mem 1`, by group and name."""
    found: Counters = {}
    for line in text.splitlines():
        group, _, rest = line.partition(":")
        fields = rest.split()
        found |= {group + name: int(number) for name, number in zip(fields[::2], fields[1::2], strict=False)}
    return found


def _metric(name: str, count: int, labels: Mapping[str, str] = {}) -> Metric:
    return Metric(name, float(count), labels, MetricType.EBPF_RAW)
