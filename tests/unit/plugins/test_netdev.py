"""The netdev collector's promises."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from kon_agent.config.schema import NetdevConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.netdev import COUNTERS, Netdev

HEADER = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
"""  # noqa: E501  as the kernel prints it
LO = "    lo: 35874692   36555    0    0    0     0          0         0 35874692   36555    0    0    0     0       0          0\n"  # noqa: E501
ETH0 = "  eth0: 1 2 3 4 5 6 7 8 11 12 13 14 15 16 17 18\n"
WG0 = "   wg0:7240270863 166218 0 0 0 0 0 0 8091248 97350 0 0 0 0 0 0\n"
VETH = "veth1a2b3c4: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n"

LINKS = {
    "lo": {"operstate": "unknown", "carrier": "1", "carrier_changes": "0", "mtu": "65536"},
    "eth0": {"operstate": "up", "carrier": "1", "carrier_changes": "2", "mtu": "1400", "speed": "10000"},
    "wg0": {"operstate": "unknown", "carrier": "1", "carrier_changes": "0", "mtu": "1420", "speed": "-1"},
    "veth1a2b3c4": {"operstate": "down", "carrier_changes": "1", "mtu": "1500", "speed": "4294967295"},
}


@pytest.fixture
def net(host: Path) -> Path:
    """Return the host's /sys/class/net; /proc/net/dev has the same four interfaces."""
    (host / "proc/net").mkdir()
    (host / "proc/net/dev").write_text(HEADER + LO + ETH0 + WG0 + VETH)
    net = host / "sys/class/net"
    for name, files in LINKS.items():
        (net / name).mkdir(parents=True)
        for file, content in files.items():
            (net / name / file).write_text(content + "\n")
    return net


def collect(context: Context, interfaces: Sequence[str] = ("*",), exclude: Sequence[str] = ("lo",)) -> list[Metric]:
    """Collect once, by default with the section's defaults."""
    config = NetdevConfig(interfaces=list(interfaces), exclude=list(exclude))
    return list(Netdev(config, context).collect())


def values(context: Context, interface: str) -> dict[str, float]:
    """Collect with the defaults; return one interface's values by name."""
    return {metric.name: metric.value for metric in collect(context) if metric.labels["interface"] == interface}


def names(metrics: list[Metric]) -> set[str]:
    """Return the interfaces reported."""
    return {metric.labels["interface"] for metric in metrics}


def test_every_column_has_its_metric(net: Path, context: Context) -> None:
    """The sixteen counters go to the metrics of their columns, and the link is in base units."""
    assert {
        "netdev_receive_bytes_total": 1.0,
        "netdev_receive_packets_total": 2.0,
        "netdev_receive_errs_total": 3.0,
        "netdev_receive_drop_total": 4.0,
        "netdev_receive_fifo_total": 5.0,
        "netdev_receive_frame_total": 6.0,
        "netdev_receive_compressed_total": 7.0,
        "netdev_receive_multicast_total": 8.0,
        "netdev_transmit_bytes_total": 11.0,
        "netdev_transmit_packets_total": 12.0,
        "netdev_transmit_errs_total": 13.0,
        "netdev_transmit_drop_total": 14.0,
        "netdev_transmit_fifo_total": 15.0,
        "netdev_transmit_colls_total": 16.0,
        "netdev_transmit_carrier_total": 17.0,
        "netdev_transmit_compressed_total": 18.0,
        "netdev_up": 1.0,
        "netdev_carrier": 1.0,
        "netdev_carrier_changes_total": 2.0,
        "netdev_mtu_bytes": 1400.0,
        "netdev_speed_bytes": 1_250_000_000.0,
    } == values(context, "eth0")


def test_values_are_floats(net: Path, context: Context) -> None:
    """Also a counter is one."""
    assert {float} == {type(metric.value) for metric in collect(context)}


def test_a_name_may_touch_its_counters(net: Path, context: Context) -> None:
    """An old kernel prints no blank after the colon."""
    assert 7240270863.0 == values(context, "wg0")["netdev_receive_bytes_total"]


def test_a_driver_that_cannot_tell_is_up(net: Path, context: Context) -> None:
    """A tunnel's operstate is `unknown`, and it carries packets."""
    assert 1.0 == values(context, "wg0")["netdev_up"]


def test_an_interface_that_is_down_is_reported_as_such(net: Path, context: Context) -> None:
    """It is not up, and its carrier, which the kernel does not tell, is left out."""
    collected = values(context, "veth1a2b3c4")
    assert (0.0, False) == (collected["netdev_up"], "netdev_carrier" in collected)


@pytest.mark.parametrize("interface", ["wg0", "veth1a2b3c4"])
def test_an_unknown_speed_is_left_out(net: Path, context: Context, interface: str) -> None:
    """The kernel's SPEED_UNKNOWN, signed or unsigned, is no speed."""
    assert "netdev_speed_bytes" not in values(context, interface)


def test_loopback_is_left_out_by_default(net: Path, context: Context) -> None:
    """The defaults report every interface but lo."""
    assert {"eth0", "wg0", "veth1a2b3c4"} == names(list(Netdev(NetdevConfig(), context).collect()))


def test_loopback_is_reported_where_it_is_named(net: Path, context: Context) -> None:
    """A pattern other than a bare `*` includes it; the bare one does not, whatever is excluded."""
    assert {"lo"} == names(collect(context, interfaces=["lo"], exclude=[]))
    assert "lo" not in names(collect(context, interfaces=["*"], exclude=[]))


def test_patterns_choose(net: Path, context: Context) -> None:
    """Reported is what matches `interfaces` and not `exclude`."""
    assert {"eth0"} == names(collect(context, interfaces=["eth*", "veth*"], exclude=["veth*"]))


def test_no_interface_is_no_data(net: Path, context: Context) -> None:
    """Where nothing matches there is nothing to collect, and the reason names the keys."""
    with pytest.raises(NoData, match="interfaces and not exclude"):
        collect(context, interfaces=["wlan*"])


def test_a_kernel_without_network_is_no_data(net: Path, host: Path, context: Context) -> None:
    """Without /proc/net/dev there is nothing to collect."""
    (host / "proc/net/dev").unlink()
    with pytest.raises(NoData, match="proc/net/dev"):
        collect(context)


def test_an_interface_that_vanishes_is_skipped(net: Path, context: Context) -> None:
    """One that is gone when its link is looked at is left out of the cycle; the others are reported."""
    shutil.rmtree(net / "veth1a2b3c4")
    assert {"eth0", "wg0"} == names(collect(context))


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL])
def test_an_interface_that_vanishes_meanwhile_is_skipped(
    net: Path, context: Context, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also one that is unregistered while its files are read, with whatever error that shows itself."""
    read = procfs.read

    def failing(context: Context, path: str) -> bytes:
        if path.endswith(("/veth1a2b3c4/speed", "/veth1a2b3c4/mtu")):
            raise OSError(number, os.strerror(number), path)
        return read(context, path)

    monkeypatch.setattr(procfs, "read", failing)
    assert {"eth0", "wg0"} == names(collect(context))


def test_a_container_without_sysfs_has_counters(net: Path, host: Path, context: Context) -> None:
    """The counters do not need /sys."""
    shutil.rmtree(host / "sys")
    assert set(COUNTERS) == {
        metric.name.removeprefix("netdev_").removesuffix("_total")
        for metric in collect(context)
        if metric.labels["interface"] == "eth0"
    }


def test_a_name_in_any_bytes_is_printable(net: Path, host: Path, context: Context) -> None:
    """An interface's name need not be UTF-8; its label is, and its link is found."""
    (host / "proc/net/dev").write_bytes(HEADER.encode() + b"  e\xff0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n")
    shutil.copytree(net / "eth0", net / os.fsdecode(b"e\xff0"))
    metrics = collect(context)
    assert {"e\ufffd0"} == names(metrics)
    assert "netdev_mtu_bytes" in {metric.name for metric in metrics}


def test_counters_are_network_packets(net: Path, context: Context) -> None:
    """What counts traffic carries the wire's NETWORK_PACKETS type, the link's state OTHER."""
    types = {metric.name: metric.type for metric in collect(context)}
    assert (MetricType.NETWORK_PACKETS, MetricType.OTHER) == (
        types["netdev_receive_bytes_total"],
        types["netdev_mtu_bytes"],
    )


@pytest.mark.skipif(not os.path.exists("/sys/class/net/lo"), reason="this machine has no sysfs of its network")
def test_this_machine_agrees_with_sysfs() -> None:
    """On the real kernel, loopback's counter lies between two readings of the same one in sysfs."""
    file = Path("/sys/class/net/lo/statistics/rx_bytes")
    before = int(file.read_text())
    collected = {metric.name: metric.value for metric in collect(Context(), interfaces=["lo"], exclude=[])}
    assert before <= collected["netdev_receive_bytes_total"] <= int(file.read_text())
