"""The agent under command, and plugins that die: what changes, how fast, and what is left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kon_agent.cli.agent import main
from kon_agent.control_protocol import Op, PluginStatus, Status
from tests.support import law
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

NOBODY = 65534
CALM = {"period": "200ms"}  # so that a busy machine alone makes nobody miss a tick
SOME = {"cpu": CALM, "memory": CALM, "disk": CALM}

StartAgent = Callable[..., Agent]


@pytest.fixture
def agent(start_agent: StartAgent) -> Agent:
    """Return an agent that runs some plugins."""
    agent = start_agent(SOME)
    agent.wait_until_running()
    return agent


def listed(agent: Agent) -> dict[str, dict[str, Any]]:
    """Return what `plugins list --json` prints, by plugin."""
    shown = agent.control("plugins", "list", "--json")
    assert 0 == shown.returncode, shown.stderr
    return {plugin["name"]: plugin for plugin in json.loads(shown.stdout)}


def by_name(agent: Agent) -> dict[str, PluginStatus]:
    return {plugin.name: plugin for plugin in agent.status().plugins}


def assert_undisturbed(before: Mapping[str, PluginStatus], agent: Agent, *others: str) -> None:
    """Assert that these plugins have the same worker as before, and have kept every tick."""
    agent.wait_for_acks(*others, more=10)
    after = by_name(agent)
    for name in others:
        assert (before[name].pid, 0, 0, "RUNNING") == (
            after[name].pid,
            after[name].restarts,
            after[name].missed_ticks - before[name].missed_ticks,
            after[name].state,
        )


# ── workers that die ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_worker_is_replaced(agent: Agent, receiver: Receiver) -> None:
    """`plugins list` shows the death and the new process within 2 s; the others miss no tick; nothing is missing."""
    agent.wait_for_acks()
    before = by_name(agent)
    killed_s = time.monotonic()
    os.kill(agent.worker("cpu"), signal.SIGKILL)

    def is_replaced() -> bool:
        now = agent.plugin("cpu")
        return now.pid not in (None, before["cpu"].pid) and now.state == "RUNNING"

    wait_for(is_replaced, "cpu has a new worker", deadline_s=2)
    shown = listed(agent)["cpu"]
    assert time.monotonic() - killed_s < 2
    assert ("killed by SIGKILL", 1) == (shown["last_exit"], shown["restarts"])
    assert_undisturbed(before, agent, "memory", "disk")
    agent.change(Op.PLUGIN_DISABLE, "cpu")
    wait_for(lambda: not agent.plugin("cpu").in_ring + agent.plugin("cpu").in_flight, "the rings of cpu are drained")
    cpu, rows = agent.plugin("cpu"), [row for row in receiver.ledger() if row.plugin == "cpu"]
    law.conservation(cpu)
    law.gapless(rows)
    assert (2, cpu.acked) == (len(rows), sum(row.stored for row in rows))
    assert sum(cpu.dropped.values()) <= 1  # the one record being written


def test_a_stopped_worker_is_killed_and_replaced(start_agent: StartAgent) -> None:
    """A worker that no longer runs is found hung after its deadline, killed and replaced; the others never notice."""
    agent = start_agent({"cpu": {"deadline": "1s"}, "memory": CALM})
    agent.wait_until_running()
    before = by_name(agent)
    os.kill(agent.worker("cpu"), signal.SIGSTOP)
    wait_for(lambda: agent.plugin("cpu").restarts, "cpu is replaced", deadline_s=6)
    wait_for(lambda: agent.plugin("cpu").state == "RUNNING", "cpu runs again")
    now = agent.plugin("cpu")
    assert now.pid != before["cpu"].pid
    assert now.last_exit is not None and now.last_exit.startswith("killed by SIGKILL: hung: silent for ")
    assert_undisturbed(before, agent, "memory")


def test_a_plugin_that_cannot_be_imported_fails_alone(start_agent: StartAgent, folder: Path) -> None:
    """It is tried again with growing waits, then left to rest; its reason is listed; the others run as ever."""
    shadow = folder / "shadow"
    shadow.mkdir()
    shadow.joinpath("sitecustomize.py").write_text('import sys\nsys.modules["kon_agent.plugins.memory"] = None\n')
    agent = start_agent({"cpu": CALM, "memory": CALM}, environment={"PYTHONPATH": str(shadow)})
    wait_for(lambda: agent.plugin("memory").state == "BACKOFF", "memory waits for its next try")
    agent.wait_until_running("cpu")
    before = by_name(agent)
    wait_for(lambda: agent.plugin("memory").state == "FAILED", "memory is left to rest")
    shown = listed(agent)["memory"]
    assert ("FAILED", "open", None, True) == (shown["state"], shown["breaker"], shown["pid"], shown["enabled"])
    assert "ModuleNotFoundError: import of kon_agent.plugins.memory halted" in shown["last_exit"]
    assert "next try in" in shown["detail"]
    assert_undisturbed(before, agent, "cpu")


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_disable_and_enable(agent: Agent) -> None:
    """`disable` ends the worker within 500 ms, `enable` brings one back; both are visible in `list --json`."""
    before = by_name(agent)
    asked_s = time.monotonic()
    agent.change(Op.PLUGIN_DISABLE, "cpu")
    assert not Path(f"/proc/{before['cpu'].pid}").exists()
    assert time.monotonic() - asked_s < 0.5
    shown = listed(agent)["cpu"]
    assert (False, "STOPPED", None) == (shown["enabled"], shown["state"], shown["pid"])
    enabled = agent.change(Op.PLUGIN_ENABLE, "cpu")
    assert enabled.pid is not None and Path(f"/proc/{enabled.pid}").exists()
    agent.wait_until_running()
    shown = listed(agent)["cpu"]
    assert (True, "RUNNING", enabled.pid) == (shown["enabled"], shown["state"], shown["pid"])
    assert_undisturbed(before, agent, "memory", "disk")


def test_restart_replaces_the_worker(agent: Agent) -> None:
    """`restart` answers with the new process; that is no death."""
    before = by_name(agent)
    after = agent.change(Op.PLUGIN_RESTART, "cpu")
    assert after.pid not in (None, before["cpu"].pid)
    assert after.last_exit is None
    assert_undisturbed(before, agent, "memory", "disk")


def test_an_unknown_plugin_gets_a_suggestion(agent: Agent) -> None:
    """A misspelt name ends with an error, the right name and a non-zero exit code."""
    refused = agent.control("plugins", "disable", "memroy")
    assert refused.returncode != 0
    assert "there is no plugin 'memroy'" in refused.stderr
    assert "did you mean 'memory'?" in refused.stderr


@contextmanager
def another_user() -> Iterator[None]:
    """Be nobody for a while, in no group."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the test becomes another user")
def test_others_may_look_but_not_touch(agent: Agent) -> None:
    """A user who is neither root nor in the socket's group sees the status and can change nothing."""
    before = by_name(agent)
    to = ["--socket", str(agent.socket)]
    with another_user():
        seen = CliRunner().invoke(main, ["status", "--json", *to])
        refused = [
            CliRunner().invoke(main, [*command, *to])
            for command in (["plugins", "disable", "cpu"], ["plugins", "restart", "cpu"], ["reload"], ["shutdown"])
        ]
    assert 0 == seen.exit_code
    assert agent.pid == json.loads(seen.output)["pid"]
    for result in refused:
        assert result.exit_code != 0
        assert "only root and the group of" in result.output
    assert_undisturbed(before, agent, *SOME)


def test_status_for_programs_and_people(agent: Agent) -> None:
    """`status --json` is what the socket answers; `status` and `plugins list` name every plugin."""
    shown = agent.control("status", "--json")
    assert set(Status.__struct_fields__) == json.loads(shown.stdout).keys()
    for command in (["status"], ["plugins", "list"]):
        assert all(name in agent.control(*command).stdout for name in SOME)


# ── reload ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["command", "SIGHUP"])
def test_reload_touches_what_changed(agent: Agent, way: str) -> None:
    """A new period of one plugin replaces that plugin's worker and nothing else."""
    before, children = by_name(agent), agent.children()
    agent.configure({**SOME, "cpu": {"period": "100ms"}})
    if way == "command":
        assert "changed: plugins.cpu\n" == agent.control("reload").stdout
    else:
        agent.signal(signal.SIGHUP)
    wait_for(lambda: agent.plugin("cpu").period_s == 0.1, "the new period is there")
    wait_for(lambda: agent.plugin("cpu").state == "RUNNING", "cpu runs again")
    assert agent.plugin("cpu").pid != before["cpu"].pid
    assert children["kon-agent: sender"] == agent.sender()
    assert_undisturbed(before, agent, "memory", "disk")


def test_an_invalid_file_changes_nothing(agent: Agent) -> None:
    """`reload` names the mistake and its place, exits with an error, and everything runs as before."""
    before, children = by_name(agent), agent.children()
    agent.configure({"cpu": {"period": "10ms"}})
    refused = agent.control("reload")
    assert refused.returncode != 0
    assert f"{agent.config_path}:" in refused.stderr
    assert "10ms is too short" in refused.stderr
    assert_undisturbed(before, agent, *SOME)
    assert children == agent.children()
