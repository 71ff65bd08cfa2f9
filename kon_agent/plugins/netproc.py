"""What procfs knows of the network, under the `ebpf` plugin's names and with the label `source="procfs"`.

It stands in for BPF: for everything where no program could be loaded, and for one direction of an interface whose
program could not be attached. Its mode is always "none": nothing of ours is attached.

* Per interface, from /proc/net/dev (proc(5)): frames and bytes as the driver counts them, all protocols in one; and the
  multicast frames received, where the driver tells them apart.
* Of the whole network namespace, as `interface="all"`, from /proc/net/snmp, /proc/net/snmp6 and /proc/net/netstat
  (Documentation/networking/snmp_counter.rst): what the protocols of the stack have seen, not what crossed a wire.
  Forwarded packets never reach them, segments that GRO has merged are one, a UDP_SEGMENT batch is one.

Whatever this kernel or this /proc does not have is left out. What BPF alone can know has no counterpart here: packet
sizes, an interface's protocols, ARP, TCP's flags but for the resets sent.

These are the kernel's counters: one of an interface begins at zero with the interface, and nothing says when that was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kon_agent.bpf import interfaces, layout
from kon_agent.bpf.interfaces import NetInterface
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import netstat, procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.netstat import Counters

SOURCE = {"mode": "none", "source": "procfs"}
"""Labels of everything here."""

HOST = "all"
"""The `interface` of what is of the whole network namespace."""

MAX_LOOKED_AT = 4 * layout.MAX_LISTED  # interfaces whose state is read each cycle, at three files each
_DEV_COLUMNS = 16
LOOPBACK = "lo"  # the kernel names it so in every namespace

_PACKETS, _BYTES = "network_packets_total", "network_bytes_total"
_CAST, _MALFORMED = "network_cast_packets_total", "network_malformed_packets_total"
_FLAGS = "network_tcp_flags_total"

HOST_COUNTS: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    # OutSegs has no retransmission (RFC 1213); a repeated SYN-ACK is in both, and so counts twice.
    (_PACKETS, {"direction": "ingress", "protocol": "tcp"}, ("TcpInSegs",)),
    (_PACKETS, {"direction": "egress", "protocol": "tcp"}, ("TcpOutSegs", "TcpRetransSegs")),
    # InDatagrams are those an application has read; the others are those that none will.
    (
        _PACKETS,
        {"direction": "ingress", "protocol": "udp"},
        (
            *("UdpInDatagrams", "UdpNoPorts", "UdpInErrors", "UdpIgnoredMulti"),
            *("Udp6InDatagrams", "Udp6NoPorts", "Udp6InErrors", "Udp6IgnoredMulti"),
        ),
    ),
    (_PACKETS, {"direction": "egress", "protocol": "udp"}, ("UdpOutDatagrams", "Udp6OutDatagrams")),
    (_PACKETS, {"direction": "ingress", "protocol": "icmp"}, ("IcmpInMsgs",)),
    (_PACKETS, {"direction": "egress", "protocol": "icmp"}, ("IcmpOutMsgs",)),
    (_PACKETS, {"direction": "ingress", "protocol": "icmpv6"}, ("Icmp6InMsgs",)),
    (_PACKETS, {"direction": "egress", "protocol": "icmpv6"}, ("Icmp6OutMsgs",)),
    (_CAST, {"direction": "ingress", "cast": "multicast"}, ("IpExtInMcastPkts", "Ip6InMcastPkts")),
    (_CAST, {"direction": "egress", "cast": "multicast"}, ("IpExtOutMcastPkts", "Ip6OutMcastPkts")),
    (_CAST, {"direction": "ingress", "cast": "broadcast"}, ("IpExtInBcastPkts",)),
    (_CAST, {"direction": "egress", "cast": "broadcast"}, ("IpExtOutBcastPkts",)),
    # InCsumErrors are among InHdrErrors (ip_rcv_core), truncated packets are not.
    (
        _MALFORMED,
        {"direction": "ingress"},
        ("IpInHdrErrors", "IpExtInTruncatedPkts", "Ip6InHdrErrors", "Ip6InTruncatedPkts"),
    ),
    (_FLAGS, {"direction": "egress", "flag": "rst"}, ("TcpOutRsts",)),
)
"""Metric, labels, and the kernel's counters (as nstat(8) calls them) whose sum it is."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """One interface's line of /proc/net/dev.

    Attributes:
        counted: direction to (packets, bytes).
        multicast: multicast frames received.
    """

    counted: Mapping[str, tuple[int, int]]
    multicast: int


class NetProc:
    """Read procfs in the place of BPF.

    Args:
        config: which interfaces.
        context: where the files are.
    """

    def __init__(self, config: EbpfConfig, context: Context) -> None:
        self._config = config
        self._context = context

    def table(self, reason: str) -> layout.Table:
        """Return the interfaces the supervisor would watch, none of them attached for `reason`."""
        names = self._read_dev()
        found = self._choose(NetInterface(0, name, True, name == LOOPBACK) for name in names)
        omitted = max(0, len(found) - MAX_LOOKED_AT)
        if os.path.isdir(self._context.path("/sys/class/net")):  # a container may have none
            looked_at = (interfaces.read(each.name, self._context.root) for each in found[:MAX_LOOKED_AT])
            found = self._choose(each for each in looked_at if each)
        why = reason[: layout.MAX_REASON_CHARS]
        rows = [layout.Interface(-1, each.ifindex, printable(each.name), "none", why, "none", why) for each in found]
        table = layout.make_table(1, rows[:MAX_LOOKED_AT])
        return layout.Table(table.cpus, table.interfaces, table.omitted + omitted)

    def interfaces(self, table: layout.Table) -> Iterator[Metric]:
        """Yield the traffic of every direction in the table that no program counts; without one, nothing is read."""
        if all("none" not in (each.ingress_mode, each.egress_mode) for each in table.interfaces):
            return
        traffic = {printable(name): row for name, row in self._read_dev().items()}
        for interface in table.interfaces:
            modes = {"ingress": interface.ingress_mode, "egress": interface.egress_mode}
            row = traffic.get(interface.name)
            for direction, mode in modes.items():
                if row and mode == "none":
                    yield from _interface_metrics(interface.name, direction, row)

    def host(self) -> Iterator[Metric]:
        """Yield what the protocols of this network namespace have seen."""
        yield from _host_metrics(netstat.read(self._context))

    def _choose(self, found: Iterable[NetInterface]) -> list[NetInterface]:
        return interfaces.choose(found, self._config.interfaces, self._config.exclude)

    def _read_dev(self) -> dict[str, Traffic]:
        try:
            return _parse_dev(procfs.read(self._context, "/proc/net/dev"))
        except (NoData, OSError):  # `subset=pid`, or a profile that forbids it: the rest is still worth having
            return {}


def printable(name: str) -> str:
    """Return an interface's name as a label: one may hold any bytes (dev_valid_name), a label must be UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _interface_metrics(name: str, direction: str, traffic: Traffic) -> Iterator[Metric]:
    packets, size_bytes = traffic.counted[direction]
    labels = {"interface": name, "direction": direction, "protocol": "all", **SOURCE}
    yield Metric(_PACKETS, float(packets), labels, MetricType.NETWORK_PACKETS)
    yield Metric(_BYTES, float(size_bytes), labels, MetricType.NETWORK_PACKETS)
    if direction == "ingress":
        labels = {"interface": name, "direction": direction, "cast": "multicast", **SOURCE}
        yield Metric(_CAST, float(traffic.multicast), labels, MetricType.NETWORK_PACKETS)


def _host_metrics(counters: Counters) -> Iterator[Metric]:
    for name, labels, terms in HOST_COUNTS:
        count = netstat.total(counters, terms)
        if count is not None:
            yield Metric(name, float(count), {"interface": HOST, **labels, **SOURCE}, MetricType.NETWORK_PACKETS)


def _parse_dev(text: bytes) -> dict[str, Traffic]:
    """Return every interface's traffic, in the kernel's order; undecodable bytes of a name as surrogates."""
    found: dict[str, Traffic] = {}
    for line in text.decode("utf-8", "surrogateescape").split("\n")[2:]:
        # No name has a colon or a blank (dev_valid_name), and old kernels print no blank after the colon.
        name, colon, rest = line.partition(":")
        columns = [int(column) for column in rest.split()]
        if colon and len(columns) >= _DEV_COLUMNS:
            counted = {"ingress": (columns[1], columns[0]), "egress": (columns[9], columns[8])}
            found[name.strip()] = Traffic(counted, columns[7])
    return found
