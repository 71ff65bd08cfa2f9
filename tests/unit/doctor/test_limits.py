"""Limits of control groups against what the agent may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.bpf import libbpf
from kon_agent.config.schema import (
    Config,
    EbpfConfig,
    LimitsConfig,
    PluginsConfig,
    RunqlatConfig,
    Share,
    Size,
    TcpConfig,
)
from kon_agent.doctor.limits import GroupLimits, check_maps, judge_group, judge_maps, read_group
from kon_agent.doctor.patient import Patient

MIB = 1024 * 1024
LIMITS = LimitsConfig(cpu=Share(0.02), memory=Size(64 * MIB))


def test_room_enough_is_well() -> None:
    """No limit, or one beyond `limits`."""
    assert "ok" == judge_group(GroupLimits(), LIMITS, "the agent").verdict
    assert "ok" == judge_group(GroupLimits(128 * MIB, 0.5, 512), LIMITS, "the agent").verdict


def test_a_group_narrower_than_limits_is_said() -> None:
    """The kernel would kill before the governor acts; both numbers are told."""
    found = judge_group(GroupLimits(32 * MIB, 0.01), LIMITS, "the agent")
    assert "warn" == found.verdict
    assert "memory.max 32.0 MiB < limits.memory 64.0 MiB" in found.found
    assert "cpu.max 0.01 cores < limits.cpu 0.02" in found.found


def test_maps_are_added_up() -> None:
    """In MiB, by plugin."""
    found = judge_maps({"ebpf": MIB, "flows": 4 * MIB}, None, LIMITS, False)
    assert "BPF maps would take 5.0 MiB of kernel memory (ebpf 1.0 MiB, flows 4.0 MiB)" == found.found


def test_the_enabled_plugins_maps_are_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every CPU, and the tables its programs keep: `runqlat` has half a MiB of them."""
    monkeypatch.setattr(libbpf, "library", lambda: Machine())
    plugins = PluginsConfig(
        ebpf=EbpfConfig(enable=False), runqlat=RunqlatConfig(enable=True), tcp=TcpConfig(enable=True)
    )
    (found,) = check_maps(Patient(Config(plugins=plugins)))
    assert "(tcp 3 KiB, runqlat 513 KiB)" in found.found  # 4 * 512 + 8 bytes; 4 * 192 + 8 * 65536


class Machine:
    """A libbpf that has counted four CPUs."""

    def possible_cpus(self) -> int:
        return 4


def test_maps_need_room_beside_the_limit() -> None:
    """BPF memory is the control group's, too."""
    assert "warn" == judge_maps({"flows": 4 * MIB}, 66 * MIB, LIMITS, True).verdict
    assert "ok" == judge_maps({"flows": 4 * MIB}, 68 * MIB, LIMITS, True).verdict


def test_the_narrowest_limit_above_counts(tmp_path: Path) -> None:
    """A group is bound by every group above it; `max` is no limit."""
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text("0::/system.slice/kon-agent.service\n")
    slice_ = tmp_path / "sys/fs/cgroup/system.slice"
    service = slice_ / "kon-agent.service"
    service.mkdir(parents=True)
    (service / "memory.max").write_text("max\n")
    (service / "cpu.max").write_text("50000 100000\n")
    (service / "pids.max").write_text("512\n")
    (slice_ / "memory.max").write_text(f"{100 * MIB}\n")
    (slice_ / "cpu.max").write_text("max 100000\n")
    assert GroupLimits(100 * MIB, 0.5, 512) == read_group(7, str(tmp_path))


def test_the_memory_of_version_1_counts(tmp_path: Path) -> None:
    """Its way to say "no limit" is a number nobody has."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("9:name=systemd:/\n4:memory:/box\n0::/\nnonsense\n")
    folder = tmp_path / "sys/fs/cgroup/memory"
    (folder / "box").mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert GroupLimits() == read_group("self", str(tmp_path))
    (folder / "box/memory.limit_in_bytes").write_text(f"{50 * MIB}\n")
    assert GroupLimits(50 * MIB) == read_group("self", str(tmp_path))


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    """Neither has one whose /proc is hidden."""
    assert GroupLimits() == read_group(1, str(tmp_path))
