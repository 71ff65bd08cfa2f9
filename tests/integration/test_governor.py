"""The governor on the real processes: a storm is met, every step can be seen, and what was paused comes back."""

from __future__ import annotations

import json

import pytest

from kon_agent.control_protocol import PluginStatus, ResourceStatus
from tests.integration.conftest import StartAgent
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

SPIN = {"type": "exec", "mode": "stream", "command": ["/bin/sh", "-c", "while :; do :; done"], "priority": 90}
GROW = "a=x; i=0; while [ $i -lt 26 ]; do a=$a$a; i=$((i+1)); done; while :; do :; done"  # to 64 MiB
LEAK = {"type": "exec", "mode": "stream", "command": ["/bin/sh", "-c", GROW]}
PATIENCE_S = 60.0  # the grace of a start, and the meter's turns, on a slow machine
QUIET = {"period": "5s"}
TIGHT = {"limits": {"cpu": "3%", "memory": "1GiB"}}


def resources(agent: Agent) -> ResourceStatus:
    """Return what the agent tells of its resources."""
    return agent.status().resources


def test_a_busy_loop_is_paused_and_the_others_go_on(start_agent: StartAgent, receiver: Receiver) -> None:
    """Whoever burns a core is paused, at any priority; status, log and receiver have the step; a reload ends it."""
    calm = {"agent": {"period": "1s"}, "cpu": QUIET}
    agent = start_agent({**calm, "loop": SPIN}, sections=TIGHT)
    wait_for(lambda: resources(agent).level == "paused", "the loop is paused", PATIENCE_S)
    paused = agent.plugin("loop")
    assert "paused by the governor" in paused.detail
    wait_for(lambda: agent.plugin("loop").pid is None, "it has ended")
    used = resources(agent)
    assert ("pause", "loop") == (used.steps[-1].step, used.steps[-1].plugin)
    assert "paused: loop" in used.detail
    assert (3.0, 1 << 30) == (used.cpu_limit_percent, used.memory_limit_bytes)
    assert "governor: pause loop: " in agent.log()
    assert "paused: loop" in agent.control("status").stdout
    assert ["RUNNING", "RUNNING"] == [agent.plugin(name).state for name in calm]

    def reported() -> dict[str, float]:
        return {record.name: record.value for record in receiver.query("agent") if "governor_level" in record.name}

    wait_for(lambda: reported().get("agent_governor_level") == 3.0, "the level is at the receiver")
    agent.configure(calm)
    assert 0 == agent.control("reload").returncode
    wait_for(lambda: resources(agent).level == "normal", "nothing is paused any more")


def test_new_limits_are_gone_by_at_once(start_agent: StartAgent) -> None:
    """A reload of `limits` restarts nobody."""
    agent = start_agent({"agent": QUIET, "cpu": QUIET})
    agent.wait_until_running()
    before = agent.children()
    config = json.loads(agent.config_path.read_text())
    config["limits"] = {"cpu": "50%", "memory": "512MiB"}
    agent.config_path.write_text(json.dumps(config))
    assert 0 == agent.control("reload").returncode
    assert (50.0, 512 << 20) == (resources(agent).cpu_limit_percent, resources(agent).memory_limit_bytes)
    assert before == agent.children()


@pytest.mark.root  # whoever may not read the worker's PSS knows its resident set only, which is larger
def test_a_worker_above_its_memory_limit_is_replaced(start_agent: StartAgent) -> None:
    """Its programs count with it, and the reason is its last exit."""
    agent = start_agent({"agent": QUIET, "big": {**LEAK, "memory_limit": "40MiB"}})

    def plugin() -> PluginStatus:
        return agent.plugin("big")

    wait_for(lambda: "of its memory_limit 40 MiB" in (plugin().last_exit or ""), "it is replaced", PATIENCE_S)
    assert 1 <= wait_for(lambda: plugin().restarts, "it runs again")
