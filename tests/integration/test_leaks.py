"""Restarts leave nothing behind: no descriptor, no memory file, no mapping, however often they happen."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

import pytest

from kon_agent.cli import client
from kon_agent.control_protocol import Op, Reload, Request
from tests.support.agent import Agent
from tests.support.holdings import descriptors, rings
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a child's descriptors are hidden from its own user"),
]

RESTARTS = 25
KILLS = 3  # in a row; one more would be two from opening the breaker


def settle(agent: Agent, before: Counter[str], mapped: int) -> None:
    """Wait until supervisor and sender hold no more than they held before."""
    wait_for(lambda: not descriptors(agent.pid) - before, f"the supervisor holds no more than {dict(before)}")
    wait_for(lambda: rings(agent.sender()) == mapped, f"the sender has {mapped} rings mapped again")


def successor(processes: Callable[[], dict[str, int]], title: str, pid: int) -> None:
    """Wait until another process of that title has taken the place of `pid`."""
    wait_for(lambda: processes().get(title, pid) != pid, f"another {title} is there")


def test_workers_that_are_replaced_leave_nothing(start_agent: Callable[..., Agent]) -> None:
    """The supervisor closes a dead worker's ring and process, the sender unmaps it."""
    agent = start_agent({"cpu": {}, "memory": {}})
    agent.wait_for_acks()
    before, mapped = descriptors(agent.pid), rings(agent.sender())
    for _ in range(RESTARTS):
        agent.change(Op.PLUGIN_RESTART, "cpu")
    agent.wait_for_acks()
    settle(agent, before, mapped)


def test_workers_that_are_killed_leave_nothing(start_agent: Callable[..., Agent]) -> None:
    """No less where nothing was said before the end."""
    agent = start_agent({"cpu": {}, "memory": {}})
    agent.wait_for_acks()
    before, mapped = descriptors(agent.pid), rings(agent.sender())
    for _ in range(KILLS):
        pid = agent.worker("cpu")
        os.kill(pid, signal.SIGKILL)
        successor(agent.children, "kon-agent: worker cpu", pid)
    agent.wait_for_acks()
    settle(agent, before, mapped)


def test_senders_that_are_replaced_leave_nothing(start_agent: Callable[..., Agent]) -> None:
    """Each one's channel and folder are closed with it, and its successor maps what it had mapped."""
    agent = start_agent({"cpu": {}})
    agent.wait_for_acks()
    before, mapped = descriptors(agent.pid), rings(agent.sender())
    for number in range(RESTARTS):
        pid = agent.sender()
        reload_with(agent, f"{200 + number}ms")
        successor(agent.children, "kon-agent: sender", pid)
    agent.wait_for_acks()
    settle(agent, before, mapped)


def test_senders_that_are_killed_leave_nothing(start_agent: Callable[..., Agent]) -> None:
    """No less where nothing was said before the end."""
    agent = start_agent({"cpu": {}})
    agent.wait_for_acks()
    before, mapped = descriptors(agent.pid), rings(agent.sender())
    for _ in range(KILLS):
        pid = agent.sender()
        os.kill(pid, signal.SIGKILL)
        successor(agent.children, "kon-agent: sender", pid)
    agent.wait_for_acks()
    settle(agent, before, mapped)


def reload_with(agent: Agent, max_age: str) -> None:
    """Have the agent read a configuration that differs in something only its sender knows."""
    agent._base["batch"] = {"max_age": max_age}
    agent.configure({"cpu": {}})
    client.call(str(agent.socket), Request(op=Op.RELOAD), Reload)
