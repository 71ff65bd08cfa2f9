"""A supervisor that is killed leaves no program in the kernel, whenever that is; and the next one starts and counts."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf import objects
from kon_agent.errors import BpfError
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

KILLS = 50 if os.environ.get("KON_FAULT_LONG") else 6
GONE_S = 1.0  # the kernel lets programs go with the last descriptor, some of it after a grace period
START_S = 1.5  # an agent has attached by then; most of the kills during a start come before
FRAMES = 20
PLUGINS: dict[str, dict[str, Any]] = {"ebpf": {}, "flows": {}, "tcp": {}, "drops": {}, "runqlat": {}, "biolat": {}}
FRAME = bytes.fromhex("02000000000102000000000208004500003c00000000401166150a4d00020a4d0001")

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip"),
]


@dataclass(frozen=True)
class Holdings:
    """What a process has in the kernel: numbers of programs and links."""

    programs: frozenset[int]
    links: frozenset[int]

    @classmethod
    def of(cls, pid: int) -> Holdings:
        """Read them from its descriptors."""
        said = ""
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError):
                said += Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        return cls(
            frozenset(map(int, re.findall(r"^prog_id:\t(\d+)$", said, re.MULTILINE))),
            frozenset(map(int, re.findall(r"^link_id:\t(\d+)$", said, re.MULTILINE))),
        )

    def remaining(self) -> Holdings:
        """Return those the kernel still has."""
        programs = set()
        for number in self.programs:
            with suppress(BpfError):
                programs.add(objects.program(number).id)
        return Holdings(frozenset(programs), self.links & {link.id for _, link in objects.links()})


NOTHING = Holdings(frozenset(), frozenset())


@dataclass(frozen=True)
class Scene:
    """An agent that does not run yet, its receiver, and the link it watches."""

    agent: Agent
    receiver: Receiver
    link: Any

    def stored(self) -> float:
        """Return the newest stored count of frames that came in."""
        wanted = {"interface": "kon0", "direction": "ingress", "protocol": "udp"}
        records = self.receiver.query("ebpf", "network_packets_total")
        return next((each.value for each in reversed(records) if wanted.items() <= each.labels.items()), 0.0)

    def counts(self) -> bool:
        """Whether frames raise the stored count by as many."""
        before = self.stored()
        self.link.there.send(FRAME + bytes(40), FRAMES)
        wait_for(lambda: self.stored() == before + FRAMES, f"{FRAMES} frames more than {before:g} are stored")
        return True


@pytest.fixture
def scene(link: Any, station: Any) -> Iterator[Scene]:
    """Start the receiver; the agent is the test's to start."""
    agent = station.agent(PLUGINS)
    try:
        yield Scene(agent, station.receiver, link)
    finally:
        agent.clear()


def killed_while_starting(scene: Scene, dice: random.Random) -> Holdings:
    """Start the agent and kill it before long; return what it had."""
    with scene.agent.log_path.open("ab") as log:
        process = scene.agent.launch(log)
    time.sleep(dice.uniform(0, START_S))  # the moment is what is random here
    return _killed(process.pid, process.wait)


def killed_while_running(scene: Scene, dice: random.Random) -> Holdings:
    """Start the agent, see that it counts, and kill it; return what it had."""
    scene.agent.start()
    scene.agent.wait_until_running("ebpf")
    (kon0,) = scene.agent.status().interfaces
    assert ("kon0", "native", "") == (kon0.name, kon0.ingress_mode, kon0.ingress_reason)
    scene.agent.wait_for_acks("ebpf", more=1)
    assert scene.counts()
    held = _killed(scene.agent.pid, scene.agent.wait)
    assert len(held.links) >= 2
    return held


def _killed(pid: int, reap: Any) -> Holdings:
    os.kill(pid, signal.SIGSTOP)  # what it has now it has at its end
    held = Holdings.of(pid)
    os.kill(pid, signal.SIGKILL)
    reap()
    return held


def test_killed_at_random_moments(scene: Scene) -> None:
    """A second after SIGKILL nothing it loaded or attached is there; every next start succeeds and counts."""
    dice = random.Random(0xC0DE)  # the same moments in every run, as far as the machine lets them be
    for _ in range(KILLS // 2):
        for kill in (killed_while_starting, killed_while_running):
            held = kill(scene, dice)
            wait_for(lambda held=held: held.remaining() == NOTHING, f"{held} are gone", GONE_S)  # type: ignore[misc]
            wait_for(scene.agent.is_gone, "its children are gone", GONE_S)
