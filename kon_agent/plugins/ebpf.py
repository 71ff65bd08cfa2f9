"""What crosses each interface, per direction and protocol, counted in the kernel by ebpf/kon_net.bpf.c.

The supervisor attaches the programs and hands this worker two pieces of shared memory: the counters, which
the kernel writes, and the table of interfaces, which the supervisor publishes. A cycle reads both: no
system call, no privilege.

Where nothing is counted, procfs has less of it, under the same names and with the label `source="procfs"` (see
`netproc`): of everything where there is no BPF, and otherwise of each direction that could not be attached.

    network_packets_total              {interface, direction, mode, protocol}
    network_bytes_total                {interface, direction, mode, protocol}   whole frames, VLAN tags included
    network_packet_size_bytes          {interface, direction, mode}             histogram: _bucket{le}, _sum, _count
    network_tcp_flags_total            {interface, direction, mode, flag}       packets with syn (SYN-ACK too), fin, rst
    network_malformed_packets_total    {interface, direction, mode}             headers that contradict the frame
    network_cast_packets_total         {interface, direction, mode, cast}       broadcast, multicast: by MAC address
    network_counters_created_seconds   {interface}                              UNIX time when all of these were zero
    ebpf_attach              {interface, direction, mode, reason}      1, or 0 where that direction is not counted
    ebpf_interfaces_omitted                                            interfaces the table had no room for, if any
    ebpf_program_run_seconds_total, ebpf_program_runs_total {program}  what the programs cost, while `stats` is on
    ebpf_map_bytes           {map}                                     the kernel's memory

tcp, udp and icmp are always there, so that a rate can be taken from the first packet on; the other
protocols (icmpv6, other-ip, arp, other) appear with their first packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kon_agent.bpf import layout
from kon_agent.bpf.origin import origin_of
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageReader
from kon_agent.plugins.context import Context
from kon_agent.plugins.netproc import NetProc
from kon_agent.plugins.probed import histogram, origin_metrics

ALWAYS = frozenset({"tcp", "udp", "icmp"})
EVENT_METRICS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("network_tcp_flags_total", {"flag": "syn"}, "tcp_syn"),
    ("network_tcp_flags_total", {"flag": "fin"}, "tcp_fin"),
    ("network_tcp_flags_total", {"flag": "rst"}, "tcp_rst"),
    ("network_malformed_packets_total", {}, "malformed"),
    ("network_cast_packets_total", {"cast": "broadcast"}, "broadcast"),
    ("network_cast_packets_total", {"cast": "multicast"}, "multicast"),
)
"""Metric, its further labels, and the event it counts."""


class Ebpf:
    """The collector.

    Args:
        config: which interfaces to report where the supervisor has no BPF to choose them for.
        context: with the grants `counters`, `interfaces` and `origin`; without `counters` everything is procfs's.
    """

    def __init__(self, config: EbpfConfig, context: Context) -> None:
        self._counters = context.grants.get("counters")
        page = context.grants.get("interfaces")
        self._page = PageReader(page) if page is not None else None
        self._origin = origin_of(context.grants)
        self._procfs = NetProc(config, context)

    def collect(self) -> Iterable[Metric]:
        """Return every watched interface's counters and how it is attached; what BPF does not count is procfs's.

        Raises:
            NoData: the supervisor has not published the interfaces yet.
            BpfError: the table is not what a supervisor publishes.
        """
        metrics = list(origin_metrics("ebpf", self._origin))
        if self._counters is None:
            table = self._procfs.table(self._origin.reason)
            metrics += self._procfs.host()
        else:
            payload = self._page.read() if self._page else None
            if payload is None:
                raise NoData("the supervisor has not published the interfaces yet")
            table = layout.decode(payload)
        return [*metrics, *_metrics(table, self._counters), *self._procfs.interfaces(table)]


def _metrics(table: layout.Table, counters: memoryview | None) -> Iterator[Metric]:
    for interface in table.interfaces:
        yield from _attach_metrics(interface)
        if counters is not None and interface.slot >= 0:
            traffic = layout.read_traffic(counters, interface.slot, table.cpus, interface.base)
            yield from _traffic_metrics(interface, traffic)
    if table.omitted:
        yield Metric("ebpf_interfaces_omitted", table.omitted, type=MetricType.AGENT_TELEMETRY)
    yield from _cost_metrics(table)


def _attach_metrics(interface: layout.Interface) -> Iterator[Metric]:
    for direction, mode, reason in (
        ("ingress", interface.ingress_mode, interface.ingress_reason),
        ("egress", interface.egress_mode, interface.egress_reason),
    ):
        labels = {"interface": interface.name, "direction": direction, "mode": mode, "reason": reason}
        yield Metric("ebpf_attach", float(mode != "none"), labels, MetricType.AGENT_TELEMETRY)


def _cost_metrics(table: layout.Table) -> Iterator[Metric]:
    for program in table.programs:
        labels = {"program": program.name}
        seconds = program.run_time_ns / NS_PER_S
        yield Metric("ebpf_program_run_seconds_total", seconds, labels, MetricType.AGENT_TELEMETRY)
        yield Metric("ebpf_program_runs_total", float(program.run_cnt), labels, MetricType.AGENT_TELEMETRY)
    for bpf_map in table.maps:
        yield Metric("ebpf_map_bytes", float(bpf_map.bytes), {"map": bpf_map.name}, MetricType.AGENT_TELEMETRY)


def _traffic_metrics(interface: layout.Interface, traffic: Mapping[str, layout.Traffic]) -> Iterator[Metric]:
    modes = {"ingress": interface.ingress_mode, "egress": interface.egress_mode}
    for direction, counted in traffic.items():
        if modes[direction] != "none":
            labels = {"interface": interface.name, "direction": direction, "mode": modes[direction]}
            yield from _protocol_metrics(counted, labels)
            yield from histogram(
                "network_packet_size_bytes",
                layout.SIZE_BOUNDS,
                counted.packets_by_size(),
                float(sum(counted.bytes.values())),
                labels,
                MetricType.NETWORK_PACKETS,
            )
            yield from _event_metrics(counted.events, labels)
    if interface.created_ns:
        created_s = interface.created_ns / NS_PER_S
        labels = {"interface": interface.name}
        yield Metric("network_counters_created_seconds", created_s, labels, MetricType.NETWORK_PACKETS)


def _protocol_metrics(counted: layout.Traffic, labels: dict[str, str]) -> Iterator[Metric]:
    for protocol in layout.PROTOCOLS:
        packets = counted.packets(protocol)
        if packets or protocol in ALWAYS:
            of_it = {"interface": "", "direction": "", "protocol": protocol, **labels}
            yield Metric("network_packets_total", float(packets), of_it, MetricType.NETWORK_PACKETS)
            yield Metric("network_bytes_total", float(counted.bytes[protocol]), of_it, MetricType.NETWORK_PACKETS)


def _event_metrics(events: Mapping[str, int], labels: dict[str, str]) -> Iterator[Metric]:
    for name, more, event in EVENT_METRICS:
        yield Metric(name, float(events[event]), {**labels, **more}, MetricType.NETWORK_PACKETS)
