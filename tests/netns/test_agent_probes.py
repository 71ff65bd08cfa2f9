"""The real agent in a network of its own: what happens to connections and packets there is what is stored."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kon_agent.control_protocol import Op
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

DISCARD = 9
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 s
OWN = {"namespaces": "own"}

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip"),
]


@dataclass(frozen=True)
class Setup:
    """An agent with the plugins `tcp` and `drops` and its receiver, both at the near end of the link."""

    agent: Agent
    receiver: Receiver

    def stored(self, plugin: str, name: str, **labels: str) -> float | None:
        """Return the newest stored value with these labels; None where there is none."""
        records = self.receiver.query(plugin, name)
        return next((each.value for each in reversed(records) if labels.items() <= each.labels.items()), None)


@pytest.fixture
def setup(station: Any) -> Iterator[Setup]:
    """Start receiver and agent in the namespace at this end; the agent counts that one alone."""
    with station.agent({"tcp": OWN, "drops": OWN}) as agent:
        agent.wait_until_running()
        setup = Setup(agent, station.receiver)
        wait_for(lambda: setup.stored("tcp", "ebpf_source", source="bpf"), "the programs of tcp are loaded")
        wait_for(lambda: setup.stored("drops", "ebpf_source", source="bpf"), "the program of drops is loaded")
        yield setup


def refuse(link: Any, times: int) -> None:
    """Have connections refused at the other end."""
    for _ in range(times):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((link.there.address, DISCARD))


def test_failures_and_drops_are_stored_with_reason_and_count(link: Any, setup: Setup) -> None:
    """Refused and reset connections and datagrams without a socket are stored as such, and exactly so many."""
    refuse(link, times=5)
    with link.there.entered():
        server = socket.create_server((link.there.address, 0))
        unwanted = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, unwanted:
        for _ in range(3):
            with socket.create_connection(server.getsockname()):
                peer = server.accept()[0]
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                peer.close()
        for _ in range(11):
            unwanted.sendto(b"x", (link.here.address, DISCARD))
    expected = {
        ("tcp", "tcp_connections_failed_total", "refused"): 5,
        ("tcp", "tcp_connections_failed_total", "timeout"): 0,
        ("tcp", "tcp_connections_aborted_total", "reset"): 3,
        ("drops", "kernel_drops_total", "no_socket"): 11,
    }

    def stored() -> dict[tuple[str, str, str], float | None]:
        return {key: setup.stored(key[0], key[1], reason=key[2]) for key in expected}

    wait_for(lambda: expected == stored(), "everything is stored")
    setup.agent.wait_for_acks(more=100)  # had anything been counted twice, that would be stored by now
    assert expected == stored()
    assert 3 == setup.stored("tcp", "tcp_connections_opened_total")
    assert 8 == setup.stored("tcp", "tcp_resets_received_total")


def test_counts_outlive_their_worker(link: Any, setup: Setup) -> None:
    """A worker that is restarted goes on where the last one was: the counters live in the kernel."""

    def refused() -> float | None:
        return setup.stored("tcp", "tcp_connections_failed_total", reason="refused")

    refuse(link, times=2)
    wait_for(lambda: refused() == 2, "the first two are stored")
    created = setup.stored("tcp", "ebpf_counters_created_seconds")
    assert created is not None
    setup.agent.change(Op.PLUGIN_RESTART, "tcp")
    setup.agent.wait_until_running()
    refuse(link, times=1)
    wait_for(lambda: refused() == 3, "the third is stored after them")
    assert created == setup.stored("tcp", "ebpf_counters_created_seconds")


def test_counters_that_begin_anew_say_so(link: Any, setup: Setup) -> None:
    """Switched off and on again, a probe counts from zero, and the time of its zero has moved with it."""

    def created() -> float:
        return setup.stored("tcp", "ebpf_counters_created_seconds") or 0.0

    def refused() -> float | None:
        return setup.stored("tcp", "tcp_connections_failed_total", reason="refused")

    wait_for(lambda: abs(time.time() - created()) < 60, "the time of the first zero is stored")
    first = created()
    refuse(link, times=2)
    wait_for(lambda: refused() == 2, "both are stored")
    setup.agent.change(Op.PLUGIN_DISABLE, "tcp")
    setup.agent.change(Op.PLUGIN_ENABLE, "tcp")
    wait_for(lambda: created() > first, "the time of the second zero is stored")
    refuse(link, times=1)
    wait_for(lambda: refused() == 1, "the third is the first since then")
