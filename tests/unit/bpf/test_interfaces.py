"""kon_agent.bpf.interfaces: what there is, and which of it is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.bpf.interfaces import NetInterface, above, choose, is_bond, read, scan

LO = NetInterface(1, "lo", is_up=True, is_loopback=True)
ETH0 = NetInterface(2, "eth0", is_up=True, is_loopback=False)
ETH1 = NetInterface(3, "eth1", is_up=False, is_loopback=False)
WG0 = NetInterface(9, "wg0", is_up=True, is_loopback=False, is_raw_ip=True)
ALL = [LO, ETH0, ETH1, WG0]


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    folder = tmp_path / "sys/class/net"
    for name, ifindex, flags, link_type in (
        ("lo", 1, "0x9", 772),
        ("wg0", 9, "0x91", 65534),
        ("eth0", 2, "0x1003", 1),
        ("eth1", 3, "0x1002", 1),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "ifindex").write_text(f"{ifindex}\n")
        (folder / name / "flags").write_text(f"{flags}\n")
        (folder / name / "type").write_text(f"{link_type}\n")
    (folder / "bonding_masters").write_text("bond0\n")
    return tmp_path


def test_scan_reads_every_interface_and_nothing_else(sysfs: Path) -> None:
    """Flags and link type are told, in order of ifindex; files beside the interfaces are passed over."""
    assert ALL == scan(str(sysfs))


def test_an_interface_vanishing_while_read_is_left_out(sysfs: Path) -> None:
    """A file gone between the listing and the reading is no error."""
    (sysfs / "sys/class/net/eth0/flags").unlink()
    assert [LO, ETH1, WG0] == scan(str(sysfs))
    assert read("eth0", str(sysfs)) is None


def test_no_sysfs_is_no_interface(tmp_path: Path) -> None:
    """A container without /sys has nothing to watch, and no error."""
    assert [] == scan(str(tmp_path))


def test_devices_above(sysfs: Path) -> None:
    """Those the kernel links to by name, as far as they are to be seen; none where the interface is gone."""
    for name in ("upper_wg0", "upper_eth0", "upper_elsewhere", "lower_eth1"):
        (sysfs / "sys/class/net/eth1" / name).mkdir()
    assert [ETH0.ifindex, WG0.ifindex] == above("eth1", str(sysfs))
    assert [] == above("gone", str(sysfs))


def test_a_bond(sysfs: Path) -> None:
    """It has settings of its own kind."""
    (sysfs / "sys/class/net/eth1/bonding").mkdir()
    assert (True, False) == (is_bond("eth1", str(sysfs)), is_bond("eth0", str(sysfs)))


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (["*"], ["lo"], [ETH0, WG0]),
        (["*"], [], [ETH0, WG0]),
        (["lo"], [], [LO]),
        (["l*"], [], [LO]),
        (["*", "lo"], [], [LO, ETH0, WG0]),
        (["lo"], ["lo"], []),
        (["eth*"], [], [ETH0]),
        (["eth1"], [], []),
        (["*"], ["wg?", "eth[0-9]"], []),
        ([], [], []),
    ],
)
def test_choice(include: list[str], exclude: list[str], chosen: list[NetInterface]) -> None:
    """Up, included, not excluded; loopback only where a pattern other than `*` names it."""
    assert chosen == choose(ALL, include, exclude)
