"""Delivery while things break: no record missing, none stored twice, and words for what does not work."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kon_agent.control_protocol import Op
from tests.support import law
from tests.support.agent import AGENT_ID, Agent
from tests.support.program import Program
from tests.support.receiver import Receiver, free_port
from tests.support.waiting import DEADLINE_S, wait_for
from tests.support.witness import Witness

PLUGINS = ("cpu", "memory", "disk")
MANY = 200  # records that wait; the quietest plugin makes them in some three seconds

StartAgent = Callable[..., Agent]


@pytest.fixture
def agent(start_agent: StartAgent) -> Agent:
    """Return an agent under load: some hundred records a second."""
    agent = start_agent({name: {} for name in PLUGINS})
    agent.wait_for_acks()
    return agent


def assert_nothing_lost(agent: Agent, receiver: Receiver) -> None:
    """Let the workers end and everything arrive; then the store holds exactly what was produced, once."""
    assert {} == settle(agent, receiver)
    assert sum(plugin.produced for plugin in agent.status().plugins) == len(receiver.query())


def settle(agent: Agent, receiver: Receiver) -> dict[str, int]:
    """Let the workers end and everything arrive; check that all is accounted for and return what was lost, and why."""
    for name in PLUGINS:
        agent.change(Op.PLUGIN_DISABLE, name)
    wait_for(lambda: law.is_drained(agent.status()), "everything is delivered")
    status = agent.status()
    law.exactly_once(status, receiver.ledger())
    lost = Counter[str]()
    for plugin in status.plugins:
        lost.update(plugin.dropped)
    return dict(lost)


def wait_for_waiting(agent: Agent) -> None:
    """Wait until MANY records of every plugin wait to be delivered."""

    def are_waiting() -> bool:
        plugins = [plugin for plugin in agent.status().plugins if plugin.enabled]
        return all(plugin.in_ring + plugin.in_flight + plugin.spooled >= MANY for plugin in plugins)

    wait_for(are_waiting, f"{MANY} records of every plugin wait")


def wait_for_new_sender(agent: Agent, old: int, deadline_s: float = DEADLINE_S) -> None:
    wait_for(lambda: agent.children().get("kon-agent: sender", old) != old, "there is a new sender", deadline_s)


# ── outages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_receiver_that_is_away_for_a_while(agent: Agent, receiver: Receiver) -> None:
    """Records made while no receiver runs are delivered when it is back, and fresh ones follow."""
    receiver.stop()
    wait_for_waiting(agent)
    assert "connected" != agent.status().server.state
    receiver.start()
    agent.wait_for_acks(more=2 * MANY)
    assert_nothing_lost(agent, receiver)


def test_a_receiver_that_comes_late(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """An agent started before any receiver keeps its records and says what is wrong until one is there."""
    receiver = Receiver(folder, pki, prefix=network)
    with Agent(folder, receiver.port, pki, {name: {} for name in PLUGINS}, prefix=network) as agent:
        assert "is the receiver running" in wait_for(lambda: agent.status().server.detail, "a reason")
        with receiver:
            agent.wait_for_acks()
            assert_nothing_lost(agent, receiver)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: rings are read after their owner's death")
@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_an_agent_that_ends_during_an_outage(agent: Agent, receiver: Receiver, way: str) -> None:
    """What it has made is on disk when it has ended, and is delivered by the next one, once, with every loss named."""
    epochs = {row.epoch for row in receiver.ledger()}
    receiver.stop()
    wait_for_waiting(agent)
    witness = Witness(agent.pid)
    if way == "stopped":
        assert 0 == agent.stop()
    else:
        agent.kill()
        wait_for(agent.is_gone, "all its processes have ended")
    receiver.start()
    agent.start()
    agent.wait_for_acks()
    wait_for(lambda: 0 == agent.status().spool.records, "the spool is empty")
    rows = {row.plugin: row for row in receiver.ledger() if row.epoch in epochs}
    law.gapless(rows.values())
    for plugin, stats in witness.stats().items():
        lost = rows[plugin].declared_lost
        assert stats.produced == rows[plugin].stored + sum(lost.values())
        assert {} == lost if way == "stopped" else lost.keys() <= {"worker_crash"}


def test_a_receiver_killed_under_load(agent: Agent, receiver: Receiver) -> None:
    """Killed and restarted at once, it has stored every record, and none of them twice."""
    receiver.kill()
    receiver.start()
    agent.wait_for_acks()
    assert_nothing_lost(agent, receiver)


def test_a_sender_killed_under_load(agent: Agent, receiver: Receiver) -> None:
    """Killed again and again, it is replaced, and its successor delivers what it had not."""
    for _ in range(3):
        killed = agent.sender()
        os.kill(killed, signal.SIGKILL)
        wait_for_new_sender(agent, killed)
        agent.wait_for_acks()
    assert_nothing_lost(agent, receiver)


def test_a_hung_sender_is_replaced(start_agent: StartAgent, receiver: Receiver) -> None:
    """A sender that no longer runs is replaced; what found no room in its ring meanwhile is counted and declared."""
    agent = start_agent({name: {"ring_size": "16KiB" if name == "cpu" else "1MiB"} for name in PLUGINS})
    agent.wait_for_acks()
    stopped = agent.sender()
    os.kill(stopped, signal.SIGSTOP)
    wait_for_new_sender(agent, stopped, deadline_s=25)
    agent.wait_for_acks()
    lost = settle(agent, receiver)
    assert {"ring_full"} == lost.keys()
    assert {"ring_full": agent.plugin("cpu").dropped["ring_full"]} == lost


# ── who may talk to whom ──────────────────────────────────────────────────────────────────────────────────────────


def refusal(agent: Agent) -> str:
    """Return what the status says once the connection has been given up."""

    def given_up() -> str:
        server = agent.status().server
        return server.detail if server.state == "backoff" else ""

    return wait_for(given_up, "the status says why there is no connection")


def assert_nothing_stored(agent: Agent, receiver: Receiver) -> None:
    status = agent.status()
    assert 0 == sum(plugin.acked for plugin in status.plugins)
    assert [] == receiver.query()
    assert 0 == agent.stop()


def test_a_server_of_another_authority_gets_nothing(
    start_agent: StartAgent, receiver: Receiver, other_pki: Path
) -> None:
    """With another CA than the server's nothing is sent, and the status says that TLS failed and what to check."""
    agent = start_agent({"cpu": {}}, pki=other_pki, certificate=None, sections={"shutdown_timeout": "1s"})
    said = refusal(agent)
    assert said.startswith("TLS failed: ") and "tls.ca" in said
    assert_nothing_stored(agent, receiver)


def test_an_agent_with_anothers_certificate_is_refused(start_agent: StartAgent, receiver: Receiver) -> None:
    """The name in the certificate is who an agent is: with another's it stores nothing and is told so."""
    agent = start_agent({"cpu": {}}, certificate="edge-2", sections={"shutdown_timeout": "1s"})
    assert f"the certificate names edge-2, not '{AGENT_ID}'" in refusal(agent)
    assert_nothing_stored(agent, receiver)


def test_an_agent_without_a_certificate_is_refused(start_agent: StartAgent, receiver: Receiver) -> None:
    """Where the receiver wants certificates, an agent without one stores nothing and is told what it needs."""
    agent = start_agent({"cpu": {}}, certificate=None, sections={"shutdown_timeout": "1s"})
    assert "a client certificate is needed" in refusal(agent)
    assert_nothing_stored(agent, receiver)


# ── the original's protocol ───────────────────────────────────────────────────────────────────────────────────────


class LegacyServer(Program):
    """A server that speaks nothing but the original's protocol."""

    def __init__(self, folder: Path, pki: Path, prefix: Sequence[str]) -> None:
        super().__init__("server", folder, prefix)
        self.port = free_port()
        self._files = [str(pki / "server.pem"), str(pki / "server.key")]

    def arguments(self) -> list[str]:
        return ["tests.support.legacy_server", str(self.port), *self._files]

    def stop(self) -> int:
        self.kill()
        return 0

    def names(self) -> list[str]:
        """Return the names of all metrics received from our agent."""
        messages = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [name for message in messages if message["agent"] == AGENT_ID for name in message["names"]]


def test_a_server_that_knows_only_the_originals_protocol(folder: Path, pki: Path, network: Sequence[str]) -> None:
    """The agent falls back to the original's protocol, and what it counts as acknowledged has arrived."""
    with (
        LegacyServer(folder, pki, network) as server,
        Agent(folder, server.port, pki, {name: {} for name in PLUGINS}, prefix=network) as agent,
    ):
        agent.wait_for_acks()
        for name in PLUGINS:
            agent.change(Op.PLUGIN_DISABLE, name)
        wait_for(lambda: law.is_drained(agent.status()), "everything is delivered")
        received = server.names()
        assert sum(plugin.acked for plugin in agent.status().plugins) == len(received)
        assert {"cpu_usage_percent", "memory_total_bytes", "disk_usage_percent"} <= set(received)
