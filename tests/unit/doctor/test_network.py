"""How interfaces are counted, or would be, judged from facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.bpf.hooks import ASKED
from kon_agent.bpf.interfaces import NetInterface
from kon_agent.control_protocol import InterfaceStatus
from kon_agent.doctor import network
from kon_agent.doctor.network import Device, judge_attached, judge_choice, judge_device, judge_untold
from kon_agent.linux import xdp

NEW, OLD = "6.12.0", "6.1.0"


@pytest.mark.parametrize(
    ("ingress", "egress", "reason", "verdict"),
    [
        ("native", "tcx", "", "ok"),
        ("native", "clsact", "EINVAL: TCX needs kernel 6.6", "ok"),
        ("generic", "tcx", "EOPNOTSUPP: Operation not supported", "warn"),
        ("native", "none", "EINVAL: TCX needs kernel 6.6", "warn"),
        ("none", "tcx", "busy: another program is attached, EBUSY", "fail"),
        ("none", "none", "EPERM: Operation not permitted", "fail"),
    ],
)
def test_the_running_agents_word_counts(ingress: str, egress: str, reason: str, verdict: str) -> None:
    """Its modes and reasons are told as they are; a foreign program in the way is a failure."""
    told = InterfaceStatus(name="eth0", ingress_mode=ingress, ingress_reason=reason, egress_mode=egress)
    found = judge_attached(told)
    assert ("interface:eth0", verdict) == (found.check, found.verdict)
    assert f"ingress {ingress}" in found.found
    assert reason in found.found
    assert ("ip link show dev eth0" in found.advice) == reason.startswith("busy")


def test_a_free_interface_with_native_xdp_is_well() -> None:
    """Egress is by TCX where the kernel has it."""
    device = Device("eth0", 1500, {}, {}, features=43)
    assert ("ok", True) == (judge_device(device, NEW).verdict, "TCX" in judge_device(device, NEW).found)
    assert "clsact" in judge_device(device, OLD).found


def test_what_a_driver_cannot_do_is_said() -> None:
    """No native XDP, or none with this MTU: generic then; unknown where the kernel does not tell."""
    assert ("ok", True) == _told(Device("dummy0", 1500, {}, {}, features=0), "no native XDP")
    assert ("warn", True) == _told(Device("eth0", 9000, {}, {}, features=11), "MTU 9000")
    assert ("ok", True) == _told(Device("eth0", 9000, {}, {}, features=11 | 32), "native XDP")
    assert ("ok", True) == _told(Device("eth0", 9000, {}, {}, features=None), "only by trying")


def test_a_foreign_program_is_a_conflict() -> None:
    """Ours leaves it alone; it is named, with its number."""
    device = Device("eth0", 1500, {"native": 7}, {7: "xdp_filter"}, features=43)
    assert ("fail", True) == _told(device, "native xdp_filter (id 7)")
    assert "exclude" in judge_device(device, NEW).advice


def test_a_program_of_ours_is_none() -> None:
    """An agent that does not answer here has it, or a dead one."""
    device = Device("eth0", 1500, {"generic": 7}, {7: "kon_xdp_ingress"}, features=43)
    assert ("warn", True) == _told(device, "of a kon-agent")


def test_an_unnamed_program_cannot_be_told() -> None:
    """Without CAP_SYS_ADMIN a program has a number only."""
    assert ("warn", True) == _told(Device("eth0", 1500, {"native": 7}, {7: ""}, features=43), "cannot be told")


def test_what_the_running_agent_does_not_count_is_said() -> None:
    """However free the kernel says it is; a conflict stays one."""
    free = judge_untold(judge_device(Device("eth0", 1500, {}, {}, features=43), NEW))
    assert ("warn", True) == (free.verdict, "not counted by the agent" in free.found)
    busy = judge_untold(judge_device(Device("eth0", 1500, {"native": 7}, {7: "xdp_filter"}, features=43), NEW))
    assert ("fail", True) == (busy.verdict, "ip link show dev eth0" in busy.advice)


def test_patterns_that_choose_nothing_are_said_with_all_there_is() -> None:
    """So that the right one can be read off."""
    found = judge_choice(["lo", "enp1s0"])
    assert ("warn", True) == (found.verdict, "enp1s0, lo" in found.found)


def test_a_device_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its MTU from sysfs, its programs from rtnetlink; one that vanishes meanwhile has no MTU."""
    monkeypatch.setattr(xdp, "programs", lambda ifindex: {})
    interface = NetInterface(3, "eth0", is_up=True, is_loopback=False)
    assert Device("eth0", 0, {}, {}, 1) == network._read_device(interface, {3: 1}, str(tmp_path))
    (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
    (tmp_path / "sys/class/net/eth0/mtu").write_text("9000\n")
    assert Device("eth0", 9000, {}, {}, None) == network._read_device(interface, {}, str(tmp_path))


def _told(device: Device, words: str) -> tuple[str, bool]:
    found = judge_device(device, NEW)
    return found.verdict, words in found.found


def test_what_is_asked_for_is_no_fault() -> None:
    """An interface that plugins.ebpf.generic names is generic as it should be, with an agent and without."""
    device = Device("veth0", 1500, {}, {}, features=43)
    found = judge_device(device, NEW, ["veth*"])
    assert ("ok", True) == (found.verdict, "plugins.ebpf.generic" in found.found)
    told = InterfaceStatus(name="veth0", ingress_mode="generic", ingress_reason=ASKED, egress_mode="tcx")
    assert "ok" == judge_attached(told).verdict
