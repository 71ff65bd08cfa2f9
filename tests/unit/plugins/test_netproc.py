"""kon_agent.plugins.netproc: the network's figures where no BPF program counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from kon_agent.bpf import layout
from kon_agent.config.schema import EbpfConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import netproc
from kon_agent.plugins.context import Context
from kon_agent.plugins.netproc import NetProc

HOST_NET = Path(__file__).parents[2] / "fixtures" / "host_net"
WATCHED = layout.Interface(0, 4, "eth0", "native", "", "none", "EINVAL: TCX needs kernel 6.6")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a copy of the host's files: lo, eth0 and wg0 are up, wlan0 is down."""
    return Path(shutil.copytree(HOST_NET, tmp_path / "host"))


def netproc_of(root: Path, config: EbpfConfig | None = None) -> NetProc:
    """Return what reads that host."""
    return NetProc(config or EbpfConfig(), Context(root=str(root)))


def values(metrics: Iterable[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Return one metric's values by its labels, without those that all of them have."""
    return {
        tuple(value for key, value in metric.labels.items() if key not in netproc.SOURCE): metric.value
        for metric in metrics
        if metric.name == name
    }


def names(table: layout.Table) -> list[str]:
    """Return the interfaces in a table."""
    return [interface.name for interface in table.interfaces]


def test_the_table_is_what_the_supervisor_would_watch(root: Path) -> None:
    """Interfaces that are up and match the patterns, not attached for the reason given; the others are not there."""
    table = netproc_of(root).table("no libbpf")
    reason = "no libbpf"
    assert [
        layout.Interface(-1, 4, "eth0", "none", reason, "none", reason),
        layout.Interface(-1, 6, "wg0", "none", reason, "none", reason),
    ] == table.interfaces
    assert 0 == table.omitted


def test_patterns_choose_as_they_do_for_bpf(root: Path) -> None:
    """Loopback takes a pattern that names it; `exclude` wins."""
    assert ["lo"] == names(netproc_of(root, EbpfConfig(interfaces=["lo"], exclude=[])).table(""))
    assert ["eth0"] == names(netproc_of(root, EbpfConfig(interfaces=["*"], exclude=["wg*"])).table(""))


def test_a_reason_is_a_label_and_has_its_bound(root: Path) -> None:
    """A verifier's whole story is cut as it is for an interface that could not be attached."""
    interface = netproc_of(root).table("x" * 500).interfaces[0]
    assert layout.MAX_REASON_CHARS == len(interface.ingress_reason)


def test_a_container_without_sysfs_has_its_interfaces(root: Path) -> None:
    """Names are in /proc/net/dev, too; which are up cannot be told then."""
    shutil.rmtree(root / "sys")
    assert ["eth0", "wlan0", "wg0"] == names(netproc_of(root).table(""))


def test_too_many_interfaces_are_a_number(root: Path) -> None:
    """A table has its bound, and so has what is looked at each cycle; the rest is counted."""
    shutil.rmtree(root / "sys")
    lines = (root / "proc/net/dev").read_text().splitlines()[:2]
    count = netproc.MAX_LOOKED_AT + 10
    lines += [f"  d{number}: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16" for number in range(count)]
    (root / "proc/net/dev").write_text("\n".join(lines) + "\n")
    table = netproc_of(root).table("")
    assert (layout.MAX_LISTED, count - layout.MAX_LISTED) == (len(table.interfaces), table.omitted)


def test_both_directions_of_an_interface_without_bpf(root: Path) -> None:
    """Frames, bytes and received multicast, all protocols in one, labelled as not of BPF."""
    reader = netproc_of(root)
    metrics = list(reader.interfaces(reader.table("")))
    packets = values(metrics, "network_packets_total")
    assert {
        ("eth0", "ingress", "all"): 176386.0,
        ("eth0", "egress", "all"): 104122.0,
        ("wg0", "ingress", "all"): 166218.0,
        ("wg0", "egress", "all"): 97350.0,
    } == packets
    size_bytes = values(metrics, "network_bytes_total")
    assert (7625148487.0, 8860268.0) == (size_bytes["eth0", "ingress", "all"], size_bytes["eth0", "egress", "all"])
    cast = values(metrics, "network_cast_packets_total")
    assert {("eth0", "ingress", "multicast"): 57.0, ("wg0", "ingress", "multicast"): 0.0} == cast
    assert [netproc.SOURCE] * len(metrics) == [
        {key: metric.labels[key] for key in netproc.SOURCE} for metric in metrics
    ]
    assert {MetricType.NETWORK_PACKETS} == {metric.type for metric in metrics}


def test_only_the_direction_that_bpf_does_not_count(root: Path) -> None:
    """Nothing is counted twice: ingress is native here, so procfs gives egress alone."""
    table = layout.make_table(1, [WATCHED])
    assert {("eth0", "egress", "all"): 104122.0} == values(netproc_of(root).interfaces(table), "network_packets_total")


def test_nothing_is_read_where_bpf_counts_everything(tmp_path: Path) -> None:
    """With every direction attached the cycle makes no system call."""
    attached = layout.Interface(0, 4, "eth0", "native", "", "tcx", "")
    assert [] == list(NetProc(EbpfConfig(), Context(root="/nowhere")).interfaces(layout.make_table(1, [attached])))


def test_an_interface_that_has_just_gone_is_left_out(root: Path) -> None:
    """The table may still have what /proc/net/dev no longer has."""
    gone = layout.Interface(-1, 9, "gone0", "none", "busy", "none", "busy")
    assert [] == list(netproc_of(root).interfaces(layout.make_table(1, [gone])))


def test_protocols_of_the_whole_host(root: Path) -> None:
    """TCP counts both families by itself and retransmissions apart; UDP is the sum of two, read or refused."""
    assert {
        ("all", "ingress", "tcp"): 176464.0,
        ("all", "egress", "tcp"): 104194.0 + 6,
        ("all", "ingress", "udp"): 54692.0 + 847 + 20 + 4 + 9749 + 3 + 2 + 1,
        ("all", "egress", "udp"): 55663.0 + 9750,
        ("all", "ingress", "icmp"): 2862.0,
        ("all", "egress", "icmp"): 2859.0,
        ("all", "ingress", "icmpv6"): 7.0,
        ("all", "egress", "icmpv6"): 46.0,
    } == values(netproc_of(root).host(), "network_packets_total")


def test_casts_malformed_packets_and_resets_of_the_whole_host(root: Path) -> None:
    """Header errors have the checksum errors among them, truncated packets are besides; both families are summed."""
    metrics = list(netproc_of(root).host())
    assert {
        ("all", "ingress", "multicast"): 80.0,
        ("all", "egress", "multicast"): 99.0,
        ("all", "ingress", "broadcast"): 7.0,
        ("all", "egress", "broadcast"): 8.0,
    } == values(metrics, "network_cast_packets_total")
    assert {("all", "ingress"): 11.0 + 2 + 100 + 1000} == values(metrics, "network_malformed_packets_total")
    assert {("all", "egress", "rst"): 277.0} == values(metrics, "network_tcp_flags_total")


def test_a_kernel_without_ipv6_has_the_rest(root: Path) -> None:
    """Without /proc/net/snmp6 there is no ICMPv6, and UDP is version 4's alone."""
    (root / "proc/net/snmp6").unlink()
    packets = values(netproc_of(root).host(), "network_packets_total")
    assert ("all", "ingress", "icmpv6") not in packets
    assert 55663.0 == packets["all", "egress", "udp"]


def test_a_proc_without_network_is_nothing(tmp_path: Path) -> None:
    """Mounted with `subset=pid`, procfs has none of the files: no metric, and no failure."""
    reader = netproc_of(tmp_path)
    table = reader.table("")
    assert ([], [], []) == (table.interfaces, list(reader.interfaces(table)), list(reader.host()))


def test_a_name_in_any_bytes_is_printable(root: Path) -> None:
    """Its label is as the supervisor writes it, so that the table and /proc/net/dev meet."""
    (root / "proc/net/dev").write_bytes(b"\n\n  e\xff0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n")
    shutil.rmtree(root / "sys")
    reader = netproc_of(root)
    assert {("e\\udcff0", "ingress", "all"): 2.0, ("e\\udcff0", "egress", "all"): 10.0} == values(
        reader.interfaces(reader.table("")), "network_packets_total"
    )


def test_this_machine_has_its_protocols() -> None:
    """The real kernel's files have what the table of counters names."""
    reader = NetProc(EbpfConfig(), Context())
    packets = values(reader.host(), "network_packets_total")
    assert {("all", d, p) for d in layout.DIRECTIONS for p in ("tcp", "udp", "icmp")} <= packets.keys()
