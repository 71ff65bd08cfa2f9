"""The tcp collector's promises."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kon_agent.bpf import tcp
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import TcpConfig
from kon_agent.errors import BpfError
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.tcp import Tcp

SNMP = """\
Tcp: RtoAlgorithm ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs RetransSegs InErrs OutRsts
Tcp: 1 193 21 3 4 5 176464 104194 12 0 277
"""
Series = dict[tuple[str, str], float]


@pytest.fixture
def net(host: Path) -> Path:
    """Return the host's /proc/net, with what the kernel has on TCP."""
    net = host / "proc/net"
    net.mkdir()
    (net / "snmp").write_text(SNMP)
    (net / "netstat").write_text("TcpExt: TCPSynRetrans\nTcpExt: 7\n")
    (net / "sockstat").write_text("sockets: used 15\nTCP: inuse 4 orphan 1 tw 2 alloc 9 mem 247\nUDP: inuse 3 mem 1\n")
    (net / "sockstat6").write_text("TCP6: inuse 6\nUDP6: inuse 2\n")
    return net


def with_bpf(host: Path, left_out: tuple[str, ...] = (), **columns: int) -> Context:
    """Return the context of a plugin whose rows hold these numbers in these columns, of one CPU."""
    row = [0] * tcp.COLUMNS
    for column, value in columns.items():
        row[int(column.removeprefix("c"))] = value
    origin = Origin("bpf", created_ns=1_700_000_000_000_000_000, left_out=list(left_out))
    rows = memoryview(struct.pack(f"={tcp.COLUMNS}Q", *row))
    return Context(root=str(host), grants={"rows": rows, **origin.grant()})


def series(context: Context) -> Series:
    """Collect once; return the values by name and the labels that tell them apart."""
    metrics = Tcp(TcpConfig(), context).collect()
    return {
        (each.name, ",".join(value for label, value in each.labels.items() if label not in ("source", "plugin"))): (
            each.value
        )
        for each in metrics
    }


def test_the_kernel_s_counts_are_exported(net: Path, host: Path) -> None:
    """Each column has its metric; every reason is there, whether it has been seen or not."""
    found = series(with_bpf(host, c0=7, c1=4, c2=11, c3=5, c9=2, c14=1, c15=3, c16=6, c17=8))
    assert 7 == found["tcp_connections_opened_total", ""]
    assert 4 == found["tcp_connections_accepted_total", ""]
    assert 11 == found["tcp_connections_closed_total", ""]
    assert [5, 0, 0, 0, 0, 0] == [found["tcp_connections_failed_total", reason] for reason in tcp.FAILURES]
    assert [2, 0, 0, 0, 0] == [found["tcp_connections_aborted_total", reason] for reason in tcp.ABORTS]
    assert (1, 3) == (found["tcp_retransmits_total", "syn"], found["tcp_retransmits_total", "data"])
    assert (6, 8) == (found["tcp_resets_sent_total", ""], found["tcp_resets_received_total", ""])
    assert 1 == found["ebpf_source", ""]
    assert 1_700_000_000 == found["ebpf_counters_created_seconds", ""]


def test_histograms_are_cumulative_and_in_seconds(net: Path, host: Path) -> None:
    """Buckets of two connections, of 64 µs at most and of more than any bound; their sum is in seconds."""
    found = series(with_bpf(host, c18=2_000_000_000, c19=1, c40=1, c41=500_000))
    name = "tcp_connect_latency_seconds"
    buckets = {float(bound): value for (each, bound), value in found.items() if each == f"{name}_bucket"}
    assert pytest.approx([*tcp.BOUNDS_S, float("inf")]) == list(buckets)
    assert [1.0] * len(tcp.BOUNDS_S) + [2.0] == list(buckets.values())
    assert (2, 2.0) == (found[f"{name}_count", ""], found[f"{name}_sum", ""])
    assert (0, 0.5) == (found["tcp_rtt_seconds_count", ""], found["tcp_rtt_seconds_sum", ""])


def test_what_no_program_counts_is_left_out(net: Path, host: Path) -> None:
    """On a kernel without a tracepoint there is no metric that stays zero."""
    names = {name for name, _ in series(with_bpf(host, left_out=("kon_tcp_rst_tx",)))}
    assert "tcp_resets_sent_total" not in names
    assert "tcp_resets_received_total" in names


def test_procfs_stands_in(net: Path, context: Context) -> None:
    """Without BPF the same names come from procfs, say so, and add nothing up twice."""
    metrics = [each for each in Tcp(TcpConfig(), context).collect() if each.name.startswith("tcp_")]
    assert {"procfs"} == {each.labels["source"] for each in metrics}
    found = series(context)
    assert 1 == found.pop(("ebpf_source", "no BPF is granted here"))
    assert {
        ("tcp_connections_opened_total", ""): 193,
        ("tcp_connections_accepted_total", ""): 21,
        ("tcp_connections_failed_total", "unknown"): 3,
        ("tcp_connections_aborted_total", "unknown"): 4,
        ("tcp_resets_sent_total", ""): 277,
        ("tcp_retransmits_total", "syn"): 7,
        ("tcp_retransmits_total", "data"): 5,
        ("tcp_sockets", "in_use"): 10,
        ("tcp_sockets", "established"): 5,
        ("tcp_sockets", "orphaned"): 1,
        ("tcp_sockets", "time_wait"): 2,
        ("tcp_sockets", "allocated"): 9,
    } == found


def test_sockets_are_there_with_bpf_too(net: Path, host: Path, context: Context) -> None:
    """How many sockets there are comes from procfs either way, as the same series."""
    with_rows, without = (
        [each for each in Tcp(TcpConfig(), each_context).collect() if each.name == "tcp_sockets"]
        for each_context in (with_bpf(host), context)
    )
    assert 5 == len(with_rows)
    assert without == with_rows


def test_a_refusal_is_explained(net: Path, host: Path) -> None:
    """Why there is no BPF is a label of ebpf_source."""
    context = Context(root=str(host), grants=Origin("procfs", "EPERM: Operation not permitted").grant())
    assert 1 == series(context)["ebpf_source", "EPERM: Operation not permitted"]


def test_without_any_source_it_still_says_so(context: Context) -> None:
    """With neither BPF nor /proc/net there is the word that there is no BPF, and no error."""
    assert {("ebpf_source", "no BPF is granted here"): 1} == series(context)


def test_types_are_the_wire_s(net: Path, host: Path) -> None:
    """What the programs count is EBPF_RAW."""
    metrics = Tcp(TcpConfig(), with_bpf(host)).collect()
    assert {MetricType.EBPF_RAW} == {
        each.type for each in metrics if each.name.startswith("tcp_") and each.name != "tcp_sockets"
    }


def test_rows_that_are_none_are_refused(net: Path, host: Path) -> None:
    """Memory of another size is an error, not a count."""
    context = Context(root=str(host), grants={"rows": memoryview(bytes(8)), **Origin("bpf").grant()})
    with pytest.raises(BpfError):
        list(Tcp(TcpConfig(), context).collect())
