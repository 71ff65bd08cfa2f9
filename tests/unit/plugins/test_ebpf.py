"""kon_agent.plugins.ebpf: from a table and a mapping to metrics."""

from __future__ import annotations

import struct

import pytest

from kon_agent.bpf import layout
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins.context import Context
from kon_agent.plugins.ebpf import Ebpf

ETH0 = layout.Interface(0, 2, "eth0", "generic", "EOPNOTSUPP: Operation not supported", "none", "EINVAL: old")
ETH1 = layout.Interface(1, 3, "eth1", "native", "", "tcx", "")
BUSY = layout.Interface(-1, 4, "eth2", "none", "busy: x", "none", "busy: y")


def collect(*interfaces: layout.Interface, omitted: int = 0) -> list[Metric]:
    memory = bytearray(layout.COUNTERS_BYTES)
    struct.pack_into("=QQ", memory, 2 * 16, 1000, 98000)  # eth0 ingress icmp
    struct.pack_into("=QQ", memory, layout.ROW_BYTES + (8 + 5) * 16, 2, 84)  # eth1 egress arp
    page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
    PageWriter(page).publish(layout.encode(layout.Table(1, list(interfaces), omitted)))
    grants = {"counters": memoryview(memory).toreadonly(), "interfaces": page.toreadonly()}
    return list(Ebpf(EbpfConfig(), Context(grants=grants)).collect())


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


def test_no_interface_is_no_data() -> None:
    """A machine with nothing to watch is not a failure."""
    with pytest.raises(NoData, match="no interface"):
        collect()


def test_no_grants_are_no_data() -> None:
    """Where BPF could not be loaded the collector says where to look."""
    with pytest.raises(NoData, match="no BPF object"):
        list(Ebpf(EbpfConfig(), Context()).collect())


def test_a_page_not_yet_published_is_no_data() -> None:
    """The first cycle may come before the first publication."""
    page = memoryview(bytes(page_size(layout.TABLE_BYTES)))
    grants = {"counters": memoryview(bytes(layout.COUNTERS_BYTES)), "interfaces": page}
    with pytest.raises(NoData):
        list(Ebpf(EbpfConfig(), Context(grants=grants)).collect())
