"""kon_agent.plugins.ebpf: from a table and a mapping to metrics."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kon_agent.bpf import layout
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins.context import Context
from kon_agent.plugins.ebpf import Ebpf

HOST_NET = Path(__file__).parents[2] / "fixtures" / "host_net"
ETH0 = layout.Interface(0, 2, "eth0", "generic", "EOPNOTSUPP: Operation not supported", "none", "EINVAL: old")
ETH1 = layout.Interface(1, 3, "eth1", "native", "", "tcx", "")
BUSY = layout.Interface(-1, 4, "eth2", "none", "busy: x", "none", "busy: y")


def collect(*interfaces: layout.Interface, omitted: int = 0, root: str = "/nowhere") -> list[Metric]:
    memory = bytearray(layout.COUNTERS_BYTES)
    struct.pack_into("=QQQ", memory, 2 * layout.LINE_BYTES, 98000, 0, 1000)  # eth0 ingress icmp
    struct.pack_into("=QQ", memory, layout.ROW_BYTES + (8 + 5) * layout.LINE_BYTES, 84, 2)  # eth1 egress arp
    struct.pack_into("=6Q", memory, 7 * layout.LINE_BYTES, 1, 2, 3, 4, 5, 6)  # eth0 ingress events
    page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
    PageWriter(page).publish(layout.encode(layout.Table(1, list(interfaces), omitted)))
    grants = {"counters": memoryview(memory).toreadonly(), "interfaces": page.toreadonly()}
    return list(Ebpf(EbpfConfig(), Context(root=root, grants=grants)).collect())


def values(metrics: list[Metric], name: str) -> dict[tuple[str, ...], float]:
    return {tuple(metric.labels.values()): metric.value for metric in metrics if metric.name == name}


def test_counts_carry_interface_direction_protocol_and_mode() -> None:
    """tcp, udp and icmp always, others once they count; a direction not attached is not reported."""
    metrics = collect(ETH0)
    assert {
        ("eth0", "ingress", "tcp", "generic"): 0.0,
        ("eth0", "ingress", "udp", "generic"): 0.0,
        ("eth0", "ingress", "icmp", "generic"): 1000.0,
    } == values(metrics, "network_packets_total")
    assert 98000.0 == values(metrics, "network_bytes_total")["eth0", "ingress", "icmp", "generic"]
    counts = [metric for metric in metrics if metric.name.startswith("network_")]
    assert {MetricType.NETWORK_PACKETS} == {metric.type for metric in counts}
    assert ["interface", "direction", "protocol", "mode"] == list(counts[0].labels)


def test_a_rarer_protocol_appears_with_its_first_packet() -> None:
    """Egress arrives under mode tcx."""
    packets = values(collect(ETH1), "network_packets_total")
    assert 2.0 == packets["eth1", "egress", "arp", "tcx"]
    assert ("eth1", "ingress", "arp", "native") not in packets


def test_sizes_are_a_histogram_over_all_protocols() -> None:
    """A thousand frames of 98 bytes: cumulative buckets, their bytes, their number; per direction that is counted."""
    metrics = collect(ETH0)
    buckets = values(metrics, "network_packet_size_bytes_bucket")
    key = ("eth0", "ingress", "generic")
    assert [0.0, 1000.0, 1000.0] == [buckets[(*key, le)] for le in ("64", "128", "+Inf")]
    assert {key: 98000.0} == values(metrics, "network_packet_size_bytes_sum")
    assert {key: 1000.0} == values(metrics, "network_packet_size_bytes_count")


def test_events_are_counters_from_the_start() -> None:
    """TCP flags, malformed packets, broadcast and multicast, whether there were any or not."""
    key = ("eth0", "ingress", "generic")
    metrics = collect(ETH0)
    flags = {(*key, "fin"): 1.0, (*key, "syn"): 2.0, (*key, "rst"): 3.0}
    assert flags == values(metrics, "network_tcp_flags_total")
    assert {key: 4.0} == values(metrics, "network_malformed_packets_total")
    casts = {(*key, "broadcast"): 5.0, (*key, "multicast"): 6.0}
    assert casts == values(metrics, "network_cast_packets_total")
    assert 0.0 == values(collect(ETH1), "network_malformed_packets_total")["eth1", "egress", "tcx"]


def test_a_reset_shows_as_another_time_of_creation() -> None:
    """The wall time when the counters were at zero is there where it is known."""
    known = layout.Interface(1, 3, "eth1", "native", "", "tcx", "", [], 1_700_000_000_500_000_000)
    assert {("eth1",): 1_700_000_000.5} == values(collect(known), "network_counters_created_seconds")
    assert {} == values(collect(ETH1), "network_counters_created_seconds")


def test_every_attachment_is_reported_with_its_reason() -> None:
    """1 where a direction is counted, 0 where it is not."""
    metrics = collect(ETH0, BUSY)
    assert {
        ("eth0", "ingress", "generic", "EOPNOTSUPP: Operation not supported"): 1.0,
        ("eth0", "egress", "none", "EINVAL: old"): 0.0,
        ("eth2", "ingress", "none", "busy: x"): 0.0,
        ("eth2", "egress", "none", "busy: y"): 0.0,
    } == values(metrics, "ebpf_attach")
    assert not [key for key in values(metrics, "network_packets_total") if key[0] == "eth2"]


def test_interfaces_left_out_of_the_table_are_a_number() -> None:
    """Nothing is lost silently."""
    assert {(): 3.0} == values(collect(ETH0, omitted=3), "ebpf_interfaces_omitted")
    assert {} == values(collect(ETH0), "ebpf_interfaces_omitted")


def test_no_interface_still_says_where_figures_come_from() -> None:
    """A machine with nothing to watch is not a failure, and not silent."""
    assert ["ebpf_source"] == [metric.name for metric in collect()]


def test_without_bpf_procfs_has_the_same_names() -> None:
    """Without grants the interfaces and the protocols come from /proc/net, and the reason is told."""
    grants = Origin("procfs", "CAP_BPF is missing").grant()
    metrics = list(Ebpf(EbpfConfig(), Context(root=str(HOST_NET), grants=grants)).collect())
    assert {("ebpf", "procfs", "CAP_BPF is missing"): 1.0} == values(metrics, "ebpf_source")
    assert 0.0 == values(metrics, "ebpf_attach")["eth0", "ingress", "none", "CAP_BPF is missing"]
    packets = values(metrics, "network_packets_total")
    assert 176386.0 == packets["eth0", "ingress", "all", "none", "procfs"]
    assert 176464.0 == packets["all", "ingress", "tcp", "none", "procfs"]
    assert {"procfs"} == {metric.labels["source"] for metric in metrics if metric.name.startswith("network_")}


def test_a_direction_without_a_program_is_procfs_alone() -> None:
    """Ingress is counted by BPF, egress by the driver; the host's protocols are left to BPF."""
    packets = values(collect(ETH0, root=str(HOST_NET)), "network_packets_total")
    assert 104122.0 == packets["eth0", "egress", "all", "none", "procfs"]
    assert ("eth0", "ingress", "all", "none", "procfs") not in packets
    assert {"eth0"} == {key[0] for key in packets}


def test_a_page_not_yet_published_is_no_data() -> None:
    """The first cycle may come before the first publication."""
    page = memoryview(bytes(page_size(layout.TABLE_BYTES)))
    grants = {"counters": memoryview(bytes(layout.COUNTERS_BYTES)), "interfaces": page}
    with pytest.raises(NoData):
        list(Ebpf(EbpfConfig(), Context(grants=grants)).collect())
