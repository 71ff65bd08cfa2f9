"""The packets the kernel drops, by the reason it gives, counted in the kernel by ebpf/kon_drops.bpf.c.

    kernel_drops_total {reason}

A reason's name is the running kernel's own, in lower case and without its prefix SKB_DROP_REASON_, read from its BTF:
`no_socket`, `netfilter_drop`, `socket_rcvbuff`, …; the reasons of a subsystem (`openvswitch`, `mac80211_unusable`) are
one. A reason appears with its first packet; those of ALWAYS are there from the beginning, so that a rate can be taken
from the first packet on. Kernels before 5.17 give no reasons: all of theirs is `not_specified`.

Many drops are part of the ordinary: a duplicate, a packet for another host, the end of a connection that is reset.

Without BPF the kernel's counters in procfs stand in, with the label `source="procfs"`: only what has a counter, under
the names the same drops have with BPF, of this process's network namespace, since its making. `cpu_backlog` is the
machine's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kon_agent.bpf import btf, drops
from kon_agent.config.schema import DropsConfig
from kon_agent.errors import BpfError
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import netstat
from kon_agent.plugins.context import Context
from kon_agent.plugins.netstat import Counters
from kon_agent.plugins.probed import Probed

log = logging.getLogger(__name__)

SOFTNET_STAT = "/proc/net/softnet_stat"
METRIC = "kernel_drops_total"

ALWAYS = frozenset({drops.NOT_SPECIFIED, "no_socket", "netfilter_drop", "socket_rcvbuff", "cpu_backlog"})
"""Reasons exported before their first packet, as far as the kernel has them."""

_COUNTERS: dict[str, tuple[str, ...]] = {
    "no_socket": ("UdpNoPorts", "Udp6NoPorts"),
    "socket_rcvbuff": ("UdpRcvbufErrors", "Udp6RcvbufErrors"),
    "socket_backlog": ("TcpExtTCPBacklogDrop",),
    "proto_mem": ("UdpMemErrors", "Udp6MemErrors", "TcpExtTCPRcvQDrop"),
    "pfmemalloc": ("TcpExtPFMemallocDrop",),
    "pkt_too_small": ("IpExtInTruncatedPkts", "Ip6InTruncatedPkts"),
    "ip_csum": ("IpExtInCsumErrors",),
    "ip_inaddrerrors": ("IpInAddrErrors", "Ip6InAddrErrors"),
    "ip_innoroutes": ("IpExtInNoRoutes", "Ip6InNoRoutes"),
    "ip_outnoroutes": ("IpOutNoRoutes", "Ip6OutNoRoutes"),
    "ip_noproto": ("IpInUnknownProtos", "Ip6InUnknownProtos"),
    "ip_rpfilter": ("TcpExtIPReversePathFilter",),
    "icmp_csum": ("IcmpInCsumErrors", "Icmp6InCsumErrors"),
    "udp_csum": ("UdpInCsumErrors", "Udp6InCsumErrors"),
    "tcp_csum": ("TcpInCsumErrors",),
    "tcp_listen_overflow": ("TcpExtListenOverflows",),
    "tcp_minttl": ("TcpExtTCPMinTTLDrop",),
    "tcp_zerowindow": ("TcpExtTCPZeroWindowDrop",),
    "tcp_ofo_drop": ("TcpExtTCPOFODrop",),
    "tcp_rfc7323_paws": ("TcpExtPAWSEstab",),
    "tcp_md5notfound": ("TcpExtTCPMD5NotFound",),
    "tcp_md5unexpected": ("TcpExtTCPMD5Unexpected",),
    "tcp_md5failure": ("TcpExtTCPMD5Failure",),
}
"""Reason to the counters, as nstat(8) calls them, whose sum counts the same drops."""


class Drops(Probed):
    """The collector.

    Args:
        config: not needed here: the supervisor tells the program whose packets count.
        context: with the grants `rows` and `origin`; without them, procfs stands in.
    """

    def __init__(self, config: DropsConfig, context: Context) -> None:
        super().__init__("drops", context)
        self._names = _read_names(context) if self._rows is not None else {}

    def _from_rows(self, rows: memoryview) -> list[Metric]:
        return _metrics(drops.read(rows, self._names), {})

    def _from_procfs(self) -> list[Metric]:
        counted = _from_counters(netstat.read(self._context))
        counted |= _parse_softnet(netstat.read_text(self._context, SOFTNET_STAT))
        return _metrics(counted, {"source": "procfs"})


def _metrics(counted: Mapping[str, int], labels: Mapping[str, str]) -> list[Metric]:
    return [
        Metric(METRIC, float(packets), {"reason": reason, **labels}, MetricType.EBPF_RAW)
        for reason, packets in counted.items()
        if packets or reason in ALWAYS
    ]


def _read_names(context: Context) -> drops.Names:
    try:
        return drops.names(btf.read_enumerators([drops.REASONS, drops.SUBSYSTEMS], context.path(btf.VMLINUX)))
    except BpfError as err:
        log.warning("drops have numbers for reasons, not names: %s", err)
        return drops.numbered()


def _from_counters(counters: Counters) -> dict[str, int]:
    sums = {reason: netstat.total(counters, names) for reason, names in _COUNTERS.items()}
    found = {reason: packets for reason, packets in sums.items() if packets is not None}
    # A wrong checksum is an error of the header to the counter (ip_rcv_core), a reason of its own to the tracepoint.
    headers = netstat.total(counters, ("IpInHdrErrors", "Ip6InHdrErrors"))
    if headers is not None:
        found["ip_inhdr"] = max(0, headers - counters.get("IpExtInCsumErrors", 0))
    return found


def _parse_softnet(text: str) -> dict[str, int]:
    """Return what was dropped for a full backlog: the second column of each CPU's line, hexadecimal."""
    lines = [line.split() for line in text.splitlines()]
    dropped = [int(columns[1], 16) for columns in lines if len(columns) > 1]
    return {"cpu_backlog": sum(dropped)} if dropped else {}
