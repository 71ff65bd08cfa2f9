"""The real agent in a network of its own: what crosses a link is what is stored, to the packet."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

PINGS = 1000

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("ping"), reason="needs root, ip and ping"
    ),
]


@dataclass(frozen=True)
class Setup:
    """An agent with the `ebpf` plugin and its receiver, both at the near end of the link."""

    agent: Agent
    receiver: Receiver
    near: str
    far: str
    address: str

    def stored(self, **labels: str) -> float:
        """Return the newest stored count of packets with these labels; 0 where there is none."""
        records = self.receiver.query("ebpf", "network_packets_total")
        return next((each.value for each in reversed(records) if labels.items() <= each.labels.items()), 0.0)


@pytest.fixture
def setup(link: Any, station: Any) -> Iterator[Setup]:
    """Start receiver and agent in the namespace at this end."""
    with station.agent({"ebpf": {}}) as agent:
        agent.wait_until_running()
        yield Setup(agent, station.receiver, link.here.name, link.there.name, link.here.address)


def test_a_thousand_pings_are_a_thousand_packets(setup: Setup) -> None:
    """1,000 echo requests raise the stored count of received ICMP packets by exactly 1,000, the replies likewise."""
    ingress = {"interface": "kon0", "direction": "ingress", "protocol": "icmp"}
    egress = {**ingress, "direction": "egress"}
    setup.agent.wait_for_acks()
    before = setup.stored(**ingress), setup.stored(**egress)
    ping = ["ping", "-q", "-c", str(PINGS), "-i", "0.001", setup.address]
    subprocess.run(["ip", "netns", "exec", setup.far, *ping], check=True, capture_output=True)
    wait_for(lambda: setup.stored(**ingress) >= before[0] + PINGS, "the packets are stored")
    setup.agent.wait_for_acks(more=100)  # had any been counted twice, that would be stored by now
    assert (before[0] + PINGS, before[1] + PINGS) == (setup.stored(**ingress), setup.stored(**egress))


def test_a_new_interface_is_watched_within_a_second(setup: Setup) -> None:
    """An interface that appears while the agent runs is attached within 1 s, and let go when it is removed."""

    def watched() -> list[str]:
        return [interface.name for interface in setup.agent.status().interfaces]

    assert ["kon0"] == watched()
    ip = ("ip", "-n", setup.near, "link")
    subprocess.run([*ip, "add", "kon2", "type", "veth", "peer", "kon3"], check=True)
    subprocess.run([*ip, "set", "kon2", "up"], check=True)
    wait_for(lambda: "kon2" in watched(), "kon2 is watched", deadline_s=1)
    subprocess.run([*ip, "delete", "kon2"], check=True)
    wait_for(lambda: "kon2" not in watched(), "kon2 is no longer watched", deadline_s=1)
    assert ["kon0"] == watched()
