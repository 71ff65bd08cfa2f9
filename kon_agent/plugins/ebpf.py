"""Packets and bytes per interface, direction and protocol, counted in the kernel by ebpf/kon_net.bpf.c.

The supervisor attaches the programs and hands this worker two pieces of shared memory: the counters, which
the kernel writes, and the table of interfaces, which the supervisor publishes. A cycle reads both: no
system call, no privilege.

    network_packets_total    {interface, direction, protocol, mode}
    network_bytes_total      {interface, direction, protocol, mode}    whole frames: Ethernet header and VLAN tags
    ebpf_attach              {interface, direction, mode, reason}      1, or 0 where that direction is not counted
    ebpf_interfaces_omitted                                            interfaces the table had no room for, if any

tcp, udp and icmp are always there, so that a rate can be taken from the first packet on; the other
protocols (icmpv6, ip, arp, other) appear with their first packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kon_agent.bpf import layout
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageReader
from kon_agent.plugins.context import Context

ALWAYS = frozenset({"tcp", "udp", "icmp"})


class Ebpf:
    """The collector.

    Args:
        config: not needed here: the supervisor chooses the interfaces.
        context: with the grants `counters` and `interfaces`; without them there is no data.
    """

    def __init__(self, config: EbpfConfig, context: Context) -> None:
        self._counters = context.grants.get("counters")
        page = context.grants.get("interfaces")
        self._page = PageReader(page) if page is not None else None

    def collect(self) -> Iterable[Metric]:
        """Return every watched interface's counters and how it is attached.

        Raises:
            NoData: the supervisor could load no BPF object, or watches no interface.
            BpfError: the table is not what a supervisor publishes.
        """
        payload = self._page.read() if self._page else None
        if self._counters is None or payload is None:
            raise NoData("the supervisor has loaded no BPF object; its log says why")
        table = layout.decode(payload)
        if not table.interfaces:
            raise NoData("no interface is watched; see plugins.ebpf.interfaces and exclude")
        return list(_metrics(table, self._counters))


def _metrics(table: layout.Table, counters: memoryview) -> Iterator[Metric]:
    for interface in table.interfaces:
        yield from _attach_metrics(interface)
        if interface.slot >= 0:
            counts = layout.read_slot(counters, interface.slot, table.cpus, interface.base)
            yield from _count_metrics(interface, counts)
    if table.omitted:
        yield Metric("ebpf_interfaces_omitted", table.omitted, type=MetricType.AGENT_TELEMETRY)


def _attach_metrics(interface: layout.Interface) -> Iterator[Metric]:
    for direction, mode, reason in (
        ("ingress", interface.ingress_mode, interface.ingress_reason),
        ("egress", interface.egress_mode, interface.egress_reason),
    ):
        labels = {"interface": interface.name, "direction": direction, "mode": mode, "reason": reason}
        yield Metric("ebpf_attach", float(mode != "none"), labels, MetricType.AGENT_TELEMETRY)


def _count_metrics(interface: layout.Interface, counts: layout.Counts) -> Iterator[Metric]:
    modes = {"ingress": interface.ingress_mode, "egress": interface.egress_mode}
    for (direction, protocol), (packets, size_bytes) in counts.items():
        mode = modes[direction]
        if mode == "none" or not (packets or protocol in ALWAYS):
            continue
        labels = {"interface": interface.name, "direction": direction, "protocol": protocol, "mode": mode}
        yield Metric("network_packets_total", float(packets), labels, MetricType.NETWORK_PACKETS)
        yield Metric("network_bytes_total", float(size_bytes), labels, MetricType.NETWORK_PACKETS)
