"""The whole agent: from a kernel counter to a stored record, and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kon_agent.control_protocol import Op
from tests.support import law
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for
from tests.support.witness import Witness

LOOPBACK = {"interfaces": ["lo"], "exclude": []}
EVERYTHING = {"cpu": {}, "memory": {}, "disk": {}, "ebpf": LOOPBACK, "agent": {}}

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the agent attaches BPF programs"),
]
pytestmark = needs_root

NAMES = {
    "cpu": ("cpu_usage_percent", {"mode": "total"}),
    "memory": ("memory_total_bytes", {}),
    "disk": ("disk_usage_percent", {"mountpoint": "/"}),
    "ebpf": ("network_packets_total", {"interface": "lo", "direction": "ingress", "protocol": "udp"}),
    "agent": ("agent_plugin_up", {"plugin": "cpu"}),
}


def test_every_plugins_records_are_stored(start_agent: Callable[..., Agent], receiver: Receiver) -> None:
    """All five plugins deliver; each metric is stored under its name with its labels."""
    agent = start_agent(EVERYTHING)
    agent.wait_for_acks()
    for plugin, (name, labels) in NAMES.items():
        found = [record for record in receiver.query(plugin, name) if labels.items() <= record.labels.items()]
        assert found, f"{plugin} stored no {name} with {labels}"
        assert {("edge-1", plugin)} == {(record.agent, record.plugin) for record in found}
    law.gapless(receiver.ledger())


def test_nothing_is_lost_at_rest(start_agent: Callable[..., Agent], receiver: Receiver) -> None:
    """Once every worker has ended, the store holds exactly what each of them produced, no less and no more."""
    agent = start_agent(EVERYTHING)
    agent.wait_for_acks()
    for plugin in EVERYTHING:
        agent.change(Op.PLUGIN_DISABLE, plugin)
    wait_for(lambda: law.is_drained(agent.status()), "everything is delivered")
    status = agent.status()
    law.exactly_once(status, receiver.ledger())
    assert all(plugin.produced for plugin in status.plugins if plugin.name in EVERYTHING)
    assert not any(plugin.dropped for plugin in status.plugins)


def test_the_law_holds_at_any_instant(start_agent: Callable[..., Agent]) -> None:
    """While everything runs, every record produced is accounted for in every status."""
    agent = start_agent(EVERYTHING)
    agent.wait_until_running()
    for _ in range(200):
        for plugin in agent.status().plugins:
            law.conservation(plugin)


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "shutdown"])
def test_an_orderly_end_delivers_everything(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str], way: str
) -> None:
    """It exits with 0 after the last record is stored; no process, XDP program or socket is left."""
    agent = start_agent(EVERYTHING)
    agent.wait_for_acks()
    assert xdp_programs(network)
    witness = Witness(agent.pid)
    if way == "shutdown":
        assert 0 == agent.control("shutdown").returncode
    else:
        agent.signal(signal.Signals[way])
    assert 0 == agent.wait()
    assert agent.is_gone()
    assert [] == xdp_programs(network)
    assert not agent.socket.exists()
    stored = {plugin: sum(row.stored for row in receiver.ledger() if row.plugin == plugin) for plugin in EVERYTHING}
    assert {plugin: stats.produced for plugin, stats in witness.stats().items()} == stored
    law.gapless(receiver.ledger())


def test_nothing_outlives_a_killed_supervisor(
    start_agent: Callable[..., Agent], receiver: Receiver, network: Sequence[str]
) -> None:
    """Within 2 s of its SIGKILL no child and no XDP program is left, and the next start works."""
    agent = start_agent(EVERYTHING)
    agent.wait_for_acks()
    witness = Witness(agent.pid)
    agent.kill()
    wait_for(agent.is_gone, "all children have ended", deadline_s=2)
    assert [] == xdp_programs(network)
    for plugin, stats in witness.stats().items():
        stored = sum(row.stored for row in receiver.ledger() if row.plugin == plugin)
        assert stored >= stats.acked  # what was in flight may be stored, too
    law.gapless(receiver.ledger())
    agent.start()
    agent.wait_for_acks()


def test_a_second_instance_is_refused(start_agent: Callable[..., Agent]) -> None:
    """A second agent on the same socket ends with a message that says why, and the first is not disturbed."""
    agent = start_agent({"cpu": {}})
    agent.wait_until_running()
    second = agent.launch(subprocess.PIPE)
    said, _ = second.communicate(timeout=15)
    assert 78 == second.returncode
    assert f"another kon-agent answers on {agent.socket}" in said.decode()
    agent.wait_for_acks()


def test_a_stale_socket_is_no_obstacle(start_agent: Callable[..., Agent]) -> None:
    """The socket a killed agent has left behind is replaced."""
    agent = start_agent({"cpu": {}})
    agent.kill()
    assert agent.socket.exists()
    wait_for(agent.is_gone, "all children have ended")
    agent.start()
    agent.wait_until_running()


def xdp_programs(network: Sequence[str]) -> list[str]:
    """Return the interfaces of the tests' network that have an XDP program."""
    assert shutil.which("ip")
    shown = subprocess.run([*network, "ip", "-json", "link"], check=True, capture_output=True).stdout
    return [link["ifname"] for link in json.loads(shown) if "xdp" in link]


def test_the_log_is_quiet_when_healthy(start_agent: Callable[..., Agent], folder: Path) -> None:
    """From start to end nothing is logged as a warning but what the machine lacks."""
    agent = start_agent(EVERYTHING)
    agent.wait_for_acks()
    agent.stop()
    complaints = [line for line in agent.log().splitlines() if " WARNING " in line or " ERROR " in line]
    expected = ("user 'kon-agent' does not exist", "watching lo: ")
    assert [] == [line for line in complaints if not any(text in line for text in expected)]
