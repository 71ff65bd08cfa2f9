"""The drops collector's promises."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import drops
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import DropsConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.drops import ALWAYS, METRIC, Drops

NAMES = (
    *("SKB_NOT_DROPPED_YET", "SKB_CONSUMED", "SKB_DROP_REASON_NOT_SPECIFIED"),
    *("SKB_DROP_REASON_NO_SOCKET", "SKB_DROP_REASON_TCP_CSUM"),
)
SNMP = """\
Ip: InHdrErrors InAddrErrors OutNoRoutes
Ip: 9 0 15
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors
Udp: 54692 847 0 55663 12
"""
NETSTAT = """\
TcpExt: ListenOverflows TCPBacklogDrop
TcpExt: 2 0
IpExt: InNoRoutes InCsumErrors
IpExt: 0 4
"""


def write_btf(host: Path) -> None:
    """Give the host a kernel whose BTF has the reasons of NAMES."""
    strings = b"\0skb_drop_reason\0"
    values = b""
    for number, name in enumerate(NAMES):
        values += struct.pack("=II", len(strings), number)
        strings += name.encode() + b"\0"
    types = struct.pack("=III", 1, 6 << 24 | len(NAMES), 4) + values
    path = host / "sys/kernel/btf/vmlinux"
    path.parent.mkdir(parents=True)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    path.write_bytes(header + types + strings)


def with_bpf(host: Path, packets: dict[int, int]) -> Context:
    """Return the context of a plugin whose rows hold these packets by column, of one CPU."""
    row = [packets.get(column, 0) for column in range(drops.COLUMNS)]
    grants = {"rows": memoryview(struct.pack(f"={drops.COLUMNS}Q", *row)), **Origin("bpf", created_ns=1).grant()}
    return Context(root=str(host), grants=grants)


def by_reason(metrics: list[Metric]) -> dict[str, float]:
    """Return the packets of each reason."""
    return {each.labels["reason"]: each.value for each in metrics if each.name == METRIC}


def collect(context: Context) -> list[Metric]:
    """Collect once."""
    return list(Drops(DropsConfig(), context).collect())


def test_drops_bear_the_kernel_s_names(host: Path) -> None:
    """Reasons seen are there by name, some always as far as the kernel knows them, and what is no drop is not."""
    write_btf(host)
    metrics = collect(with_bpf(host, {0: 9, 1: 9, 4: 3, 255: 1}))
    assert {"tcp_csum": 3, "other": 1, "not_specified": 0, "no_socket": 0} == by_reason(metrics)
    assert {MetricType.EBPF_RAW} == {each.type for each in metrics if each.name == METRIC}
    assert "source" not in next(each.labels for each in metrics if each.name == METRIC)


@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 9])
def test_without_names_there_are_numbers(host: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel whose BTF is missing or damaged is said once; nothing that was dropped is left out."""
    if content is not None:
        (host / "sys/kernel/btf").mkdir(parents=True)
        (host / "sys/kernel/btf/vmlinux").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        plugin = Drops(DropsConfig(), with_bpf(host, {3: 5}))
        assert {"reason_3": 5} == by_reason(list(plugin.collect())) == by_reason(list(plugin.collect()))
    assert 1 == len(caplog.records)


def test_procfs_stands_in(host: Path, context: Context) -> None:
    """Without BPF the counters there are have the reasons' names, and those that count nothing are left out."""
    net = host / "proc/net"
    net.mkdir()
    (net / "snmp").write_text(SNMP)
    (net / "netstat").write_text(NETSTAT)
    (net / "snmp6").write_text("Udp6NoPorts\t3\nUdp6RcvbufErrors\t0\n")
    (net / "softnet_stat").write_text("0005b98b 0000000a 00000002\n0008c91f 00000010 00000000\n")
    metrics = collect(context)
    assert {
        "no_socket": 850,
        "socket_rcvbuff": 12,
        "ip_csum": 4,
        "ip_inhdr": 5,  # a wrong checksum is not counted twice
        "ip_outnoroutes": 15,
        "tcp_listen_overflow": 2,
        "cpu_backlog": 26,
    } == by_reason(metrics)
    assert {"procfs"} == {each.labels["source"] for each in metrics if each.name == METRIC}
    assert [("drops", "no BPF is granted here")] == [
        (each.labels["plugin"], each.labels["reason"]) for each in metrics if each.name == "ebpf_source"
    ]


def test_common_reasons_are_there_from_the_beginning(host: Path, context: Context) -> None:
    """A rate can be taken from the first drop on, with BPF and without."""
    (host / "proc/net").mkdir()
    (host / "proc/net/snmp").write_text("Udp: NoPorts RcvbufErrors InCsumErrors\nUdp: 0 0 0\n")
    assert {"no_socket": 0, "socket_rcvbuff": 0} == by_reason(collect(context))
    write_btf(host)
    assert {"not_specified": 0, "no_socket": 0} == by_reason(collect(with_bpf(host, {})))
    assert {"no_socket", "socket_rcvbuff"} < ALWAYS


def test_without_any_source_it_still_says_so(context: Context) -> None:
    """With neither BPF nor /proc/net there is the word that there is no BPF, and no error."""
    assert ["ebpf_source"] == [each.name for each in collect(context)]
