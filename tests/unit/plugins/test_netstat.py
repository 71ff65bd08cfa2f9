"""kon_agent.plugins.netstat: the network stack's counters by nstat's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.plugins import netstat
from kon_agent.plugins.context import Context


def test_every_group_and_both_families_are_read(host: Path, context: Context) -> None:
    """Names and numbers of each pair of lines belong together; snmp6 has one of each per line."""
    net = host / "proc/net"
    net.mkdir()
    (net / "snmp").write_text("Tcp: RtoMin MaxConn OutRsts\nTcp: 200 -1 277\nUdp: NoPorts\nUdp: 847\n")
    (net / "netstat").write_text("TcpExt: ListenDrops\nTcpExt: 3\n")
    (net / "snmp6").write_text("Udp6NoPorts                     \t5\n")
    assert {
        "TcpRtoMin": 200,
        "TcpMaxConn": -1,
        "TcpOutRsts": 277,
        "UdpNoPorts": 847,
        "TcpExtListenDrops": 3,
        "Udp6NoPorts": 5,
    } == netstat.read(context)


def test_what_is_not_there_takes_only_its_own_with_it(host: Path, context: Context) -> None:
    """Without IPv6, or without any of the files, the rest is still read."""
    assert {} == netstat.read(context)
    (host / "proc/net").mkdir()
    (host / "proc/net/netstat").write_text("TcpExt: ListenDrops\nTcpExt: 3\n")
    assert {"TcpExtListenDrops": 3} == netstat.read(context)


@pytest.mark.parametrize("text", ["", "Tcp: A", "Tcp: A\nUdp: 1\n", "\n\n"])
def test_lines_that_do_not_belong_together_are_passed_over(text: str) -> None:
    """A table cut short gives no counters of the wrong name."""
    assert {} == netstat.parse_table(text)


def test_a_sum_is_of_what_there_is() -> None:
    """Missing counters are left out of a sum; without any there is none."""
    assert 3 == netstat.total({"A": 1, "B": 2}, ("A", "B", "C"))
    assert netstat.total({"A": 1}, ("C",)) is None
