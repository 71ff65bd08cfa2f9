"""Regulation's promises: what the governor says is done to the units, the heartbeat plugin never touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import LimitsConfig, PluginConfig, Share, Size
from kon_agent.lifecycle import State
from kon_agent.linux import procfs
from kon_agent.linux.cgroup import Delegated
from kon_agent.supervisor.regulation import INTERVAL_NS, WATCHING_INTERVAL_NS, Regulation
from kon_agent.supervisor.unit import Unit
from tests.unit.supervisor.fakes import START_NS, Plugin, make_plugin

MIB = 1 << 20
LIMITS = LimitsConfig(cpu=Share(0.02), memory=Size(1 << 40))


class Tree:
    """Two plugins whose workers are not there, and what /proc says of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limits: LimitsConfig = LIMITS) -> None:
        self.now_ns = START_NS
        self.plugins: dict[str, Plugin] = {}
        for name in ("agent", "hog"):
            self.plugins[name] = make_plugin(monkeypatch, name, PluginConfig(memory_limit=Size(64 * MIB)))
            self.plugins[name].start(START_NS)
        self.cpu_s: dict[int, float] = dict.fromkeys(self.pids(), 0.0) | {os.getpid(): 0.0}
        self.pss_bytes: dict[int, int] = dict.fromkeys(self.cpu_s, 8 * MIB)
        monkeypatch.setattr(procfs, "read_cpu_seconds", lambda pid: self.cpu_s[pid])
        monkeypatch.setattr(procfs, "read_resident_bytes", lambda pid: self.pss_bytes[pid])
        monkeypatch.setattr(procfs, "read_pss_bytes", lambda pid: (self.pss_bytes[pid], "pss"))
        self.regulation = Regulation(limits, START_NS)

    @property
    def units(self) -> dict[str, Unit]:
        return {name: plugin.unit for name, plugin in self.plugins.items()}

    def pids(self) -> list[int]:
        return [plugin.unit.pid for plugin in self.plugins.values() if plugin.unit.pid is not None]

    def run(self, seconds: int, burning: str = "") -> None:
        """Let seconds pass, in which one plugin's worker uses a whole core."""
        for _ in range(seconds):
            self.now_ns += NS_PER_S
            if burning and (pid := self.units[burning].pid) is not None:
                self.cpu_s[pid] += 1.0
            sender = cast(Any, SimpleNamespace(pid=None, name="sender"))
            self.regulation.tick(self.units, [], sender, self.now_ns)


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    made = Tree(monkeypatch)
    yield made
    for plugin in made.plugins.values():
        plugin.release()


def test_a_busy_worker_is_stopped(tree: Tree) -> None:
    """It is asked to end, does not come back by itself, and the plugin's detail says why."""
    tree.run(16, burning="hog")  # the start's grace, and the reading after it
    unit = tree.units["hog"]
    assert State.STOPPING is unit.lifecycle.state
    assert unit.pause_reason.startswith("paused by the governor: ")
    assert "20.0 % by it; the limit is 2.0 %" in unit.pause_reason
    status = tree.regulation.status(tree.now_ns)
    assert ("paused", "paused: hog") == (status.level, status.detail)
    assert [("pause", "hog")] == [(step.step, step.plugin) for step in status.steps]
    assert (3, ["hog"], 1) == (lambda s: (s.level, s.paused, s.steps["pause"]))(tree.regulation.sample())


def test_the_heartbeat_plugin_is_never_touched(tree: Tree) -> None:
    """Whatever it uses, it keeps its period and its worker."""
    tree.run(120, burning="agent")
    unit = tree.units["agent"]
    assert (State.RUNNING, float(unit.config.period)) == (unit.lifecycle.state, unit.period_s)
    assert "" != tree.units["hog"].pause_reason


def test_a_worker_above_its_own_limit_is_replaced(tree: Tree) -> None:
    """The reason names what it uses and the limit; the others stay."""
    unit = tree.units["hog"]
    tree.run(1)
    tree.pss_bytes[unit.pid or 0] = 70 * MIB + MIB // 10
    tree.run(1)
    assert unit.child is not None
    assert [signal.SIGABRT] == cast(Any, unit.child.pidfd).sent
    tree.plugins["hog"].die(tree.now_ns)
    assert "killed by SIGKILL: uses 70.1 MiB of its memory_limit 64 MiB" == unit.last_exit
    assert State.RUNNING is tree.units["agent"].lifecycle.state


def test_it_looks_once_a_second(tree: Tree) -> None:
    """Between its turns nothing is read."""
    tree.run(1)
    assert tree.now_ns + INTERVAL_NS == tree.regulation.due_ns
    assert WATCHING_INTERVAL_NS < INTERVAL_NS


def test_the_kernel_is_given_limits_where_the_group_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers are moved there, except the heartbeat's; the bound is far enough up for a worker to start."""
    (tmp_path / "workers").mkdir()
    tree = Tree(monkeypatch)
    tree.regulation = Regulation(LIMITS, START_NS, Delegated(str(tmp_path)))
    tree.run(1)
    assert "250000 1000000" == (tmp_path / "workers" / "cpu.max").read_text()
    assert str(tree.units["hog"].pid) == (tmp_path / "workers" / "cgroup.procs").read_text()
    tree.regulation.set_limits(LimitsConfig(cpu=Share(0.5), memory=Size(MIB)))
    assert "1000000 1000000" == (tmp_path / "workers" / "cpu.max").read_text()
    for plugin in tree.plugins.values():
        plugin.release()


def test_a_group_that_is_lost_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, and the governor goes on alone."""
    tree = Tree(monkeypatch)
    tree.regulation = Regulation(LIMITS, START_NS, Delegated(str(tmp_path / "gone")))
    tree.run(30, burning="hog")
    assert "" != tree.units["hog"].pause_reason
    assert 1 == sum("control group" in record.message for record in caplog.records)
    for plugin in tree.plugins.values():
        plugin.release()
