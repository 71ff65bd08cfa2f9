"""Whatever is asked of a running agent in whatever order: it is what the requests add up to, and nobody else notices.

A plain model of the plugins (enabled or not, with which period) is told the same random operations as the agent. The
short form is part of every test run; the long one, a thousand operations, runs with KON_FAULT_LONG=1.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kon_agent.cli import client
from kon_agent.control_protocol import Op, PluginStatus, Reload, Request
from kon_agent.errors import ControlError
from tests.support import law
from tests.support.agent import Agent
from tests.support.faults import IS_LONG, times
from tests.support.holdings import descriptors, rings
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a child's descriptors are hidden from its own user"),
    pytest.mark.timeout(1800 if IS_LONG else 120),
]

OPERATIONS = times(short=200, long=1000)
SUBJECTS = ("cpu", "memory", "load", "process", "time")
UNTOUCHED = ("disk", "agent")
UNTOUCHED_PERIOD = "1s"  # a tick is missed where a cycle is late by a whole period, which a crowded machine can make it
PERIODS_S = (0.1, 0.2, 0.5, 2.0)
SENDER_EVERY = 250  # operations between two kills of the sender: five in a minute would open its breaker
LOSSES = {"worker_crash", "ring_full"}


@dataclass
class Expected:
    """What a plugin should be."""

    enabled: bool = True
    period_s: float = 0.1


class Model:
    """The plugins as the operations leave them, beside the agent they are carried out on.

    Args:
        agent: the agent.
        seed: of what is chosen.
    """

    def __init__(self, agent: Agent, seed: int) -> None:
        self.plugins = {name: Expected() for name in SUBJECTS}
        self.in_file = {name: Expected() for name in SUBJECTS}
        self.agent = agent
        self.random = random.Random(seed)
        self.done = 0

    def step(self) -> None:
        """Carry out one random operation, and see that it did what it says."""
        name = self.random.choice(SUBJECTS)
        operations: list[Callable[[str], None]] = [
            *(self.enable, self.disable, self.restart, self.set_period),
            *(self.reload_same, self.reload_changed, self.kill),
        ]
        self.done += 1
        if self.done % SENDER_EVERY == 0:
            self.kill_sender()
        else:
            self.random.choice(operations)(name)

    def enable(self, name: str) -> None:
        self.plugins[name].enabled = True
        assert self.agent.change(Op.PLUGIN_ENABLE, name).pid is not None

    def disable(self, name: str) -> None:
        self.plugins[name].enabled = False
        assert self.agent.change(Op.PLUGIN_DISABLE, name).pid is None

    def restart(self, name: str) -> None:
        before = self.agent.plugin(name).pid
        if not self.plugins[name].enabled:
            with pytest.raises(ControlError, match="disabled"):
                self.agent.change(Op.PLUGIN_RESTART, name)
            return
        assert self.agent.change(Op.PLUGIN_RESTART, name).pid not in (None, before)

    def set_period(self, name: str) -> None:
        before = self.agent.plugin(name).pid
        period_s = self.plugins[name].period_s = self.random.choice(PERIODS_S)
        request = Request(op=Op.PLUGIN_SET_PERIOD, plugin=name, period=f"{period_s * 1000:.0f}ms")
        after = client.call(str(self.agent.socket), request, PluginStatus)
        assert (before, period_s) == (after.pid, after.period_s)

    def reload_same(self, _: str) -> None:
        assert [] == client.call(str(self.agent.socket), Request(op=Op.RELOAD), Reload).changed

    def reload_changed(self, name: str) -> None:
        wanted = Expected(self.random.random() < 0.7, self.random.choice(PERIODS_S))
        if wanted == self.in_file[name]:
            return
        self.in_file[name] = wanted
        self.plugins[name] = Expected(wanted.enabled, wanted.period_s)
        self.write_file()
        assert [f"plugins.{name}"] == client.call(str(self.agent.socket), Request(op=Op.RELOAD), Reload).changed
        state = "RUNNING" if wanted.enabled else "STOPPED"  # a reload does not wait for its workers
        wait_for(lambda: self.agent.plugin(name).state == state, f"{name} is {state}")

    def kill(self, name: str) -> None:
        pid = self.agent.plugin(name).pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):  # a reload has just ended it
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.agent.plugin(name).pid != pid, f"{name} is gone")
        self.restart(name)  # and its death forgotten: the breaker is not what is tried here

    def kill_sender(self) -> None:
        pid = self.agent.sender()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.agent.children().get("kon-agent: sender", pid) != pid, "another sender is there")

    def write_file(self) -> None:
        """Write the configuration the model believes in."""
        subjects = {name: {"enable": e.enabled, "period": e.period_s} for name, e in self.in_file.items()}
        self.agent.configure({**subjects, **untouched()})

    def make_all_run(self) -> None:
        """Come back to where the test began: everything enabled."""
        for name in SUBJECTS:
            self.enable(name)
            request = Request(op=Op.PLUGIN_SET_PERIOD, plugin=name, period="100ms")
            client.call(str(self.agent.socket), request, PluginStatus)
            self.plugins[name] = Expected()
        self.agent.wait_until_running()

    def check(self) -> None:
        """See that the agent is what the model says."""
        with contextlib.suppress(AssertionError):  # the next line says more
            wait_for(lambda: not self._differences(), "the agent is as the model")
        assert [] == self._differences()
        expected = {f"kon-agent: worker {name}" for name, plugin in self.plugins.items() if plugin.enabled}
        expected |= {f"kon-agent: worker {name}" for name in UNTOUCHED} | {"kon-agent: sender"}
        wait_for(lambda: set(self.agent.children()) == expected, f"its processes are {sorted(expected)}")

    def _differences(self) -> list[PluginStatus]:
        found = {plugin.name: plugin for plugin in self.agent.status().plugins}
        return [
            found[name]
            for name, expected in self.plugins.items()
            if (found[name].enabled, found[name].period_s) != (expected.enabled, expected.period_s)
            or found[name].state != ("RUNNING" if expected.enabled else "STOPPED")
        ]


def untouched() -> dict[str, dict[str, Any]]:
    """Return the sections of the plugins nothing is done to."""
    return {name: {"period": UNTOUCHED_PERIOD} for name in UNTOUCHED}


def test_random_operations(start_agent: Callable[..., Agent], receiver: Receiver) -> None:
    """The final state is the model's, counts are flat, the untouched missed nothing, and the ledger is clean."""
    agent = start_agent({**{name: {} for name in SUBJECTS}, **untouched()})
    agent.wait_for_acks(*SUBJECTS)
    pids = {name: agent.worker(name) for name in UNTOUCHED}
    before, mapped = descriptors(agent.pid), rings(agent.sender())
    model = Model(agent, seed=4)
    for _ in range(OPERATIONS):
        model.step()
    model.check()
    model.make_all_run()
    model.check()
    wait_for(lambda: not descriptors(agent.pid) - before, f"the supervisor holds no more than {dict(before)}")
    wait_for(lambda: rings(agent.sender()) == mapped, f"the sender has {mapped} rings mapped again")
    assert pids == {name: agent.worker(name) for name in UNTOUCHED}
    assert dict.fromkeys(UNTOUCHED, 0) == {name: agent.plugin(name).missed_ticks for name in UNTOUCHED}
    for name in (*SUBJECTS, *UNTOUCHED):
        agent.change(Op.PLUGIN_DISABLE, name)
    wait_for(lambda: law.is_drained(agent.status()), "everything is delivered")
    law.exactly_once(agent.status(), receiver.ledger())
    assert LOSSES >= {reason for row in receiver.ledger() for reason in row.declared_lost}
