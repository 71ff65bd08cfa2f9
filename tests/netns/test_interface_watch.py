"""The real agent in a namespace whose interfaces come, go and change: each is attached again within a second."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf import libbpf
from kon_agent.control_protocol import InterfaceStatus
from kon_agent.receiver import pki
from tests.support import foreign
from tests.support.agent import AGENT_ID, Agent
from tests.support.netns import run
from tests.support.waiting import wait_for

WITHIN_S = 1.0
BURST = 200
BURST_S = 30.0  # a driver takes 16 ms to take a program, more on a machine under load
ANSWER_S = 1.0  # at no time does the supervisor leave somebody waiting for longer

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip"),
]


@dataclass(frozen=True)
class Scene:
    """An agent, and the namespace it watches, with one interface `kon0` whose other end is elsewhere."""

    agent: Agent
    namespace: Any

    def ip(self, *command: str) -> str:
        """Run `ip` in the namespace."""
        return run("ip", "-n", self.namespace.name, *command)

    def interface(self, name: str) -> InterfaceStatus | None:
        """Return what the agent says of an interface."""
        return next((each for each in self.agent.status().interfaces if each.name == name), None)

    def has_program(self, name: str) -> bool:
        """Whether the kernel has an XDP program there."""
        return "xdp" in json.loads(self.ip("-j", "link", "show", name))[0]

    def is_attached(self, name: str) -> bool:
        """Whether the agent says so, and the kernel agrees."""
        found = self.interface(name)
        return found is not None and found.ingress_mode != "none" and self.has_program(name)

    def wait_until_attached(self, name: str) -> None:
        """Wait for that, for a second at most."""
        wait_for(lambda: self.is_attached(name), f"{name} is attached", WITHIN_S)

    def wait_until_gone(self, name: str) -> None:
        """Wait until the agent watches it no longer, for a second at most."""
        wait_for(lambda: self.interface(name) is None, f"{name} is let go", WITHIN_S)


@pytest.fixture
def scene(link: Any) -> Iterator[Scene]:
    """Start the agent; it needs no receiver for this."""
    with tempfile.TemporaryDirectory(prefix="kon-") as name:
        folder = Path(name)
        pki.init(folder, [])
        pki.agent(folder, AGENT_ID)
        prefix = ("ip", "netns", "exec", link.here.name)
        with Agent(folder, 9, folder, {"ebpf": {}}, prefix=prefix) as agent:
            wait_for(lambda: agent.socket.exists() and agent.status().interfaces, "kon0 is watched")
            scene = Scene(agent, link.here)
            scene.wait_until_attached("kon0")
            yield scene


def down_and_up(scene: Scene) -> None:
    scene.ip("link", "set", "kon0", "down")
    scene.wait_until_gone("kon0")
    scene.ip("link", "set", "kon0", "up")
    scene.wait_until_attached("kon0")


def added_and_removed(scene: Scene) -> None:
    scene.ip("link", "add", "kon2", "type", "veth", "peer", "kon3")
    scene.ip("link", "set", "kon2", "up")
    scene.wait_until_attached("kon2")
    scene.ip("link", "delete", "kon2")
    scene.wait_until_gone("kon2")
    assert scene.is_attached("kon0")


def renamed(scene: Scene) -> None:
    scene.ip("link", "set", "kon0", "down")
    scene.ip("link", "set", "kon0", "name", "kon9", "up")
    scene.wait_until_attached("kon9")
    scene.wait_until_gone("kon0")


def moved_away_and_back(scene: Scene) -> None:
    name = f"kon-{uuid.uuid4().hex[:8]}"
    run("ip", "netns", "add", name)
    try:
        scene.ip("link", "set", "kon0", "netns", name)
        scene.wait_until_gone("kon0")
        assert "xdp" not in json.loads(run("ip", "-n", name, "-j", "link", "show", "kon0"))[0]
        run("ip", "-n", name, "link", "set", "kon0", "netns", scene.namespace.name)
        scene.ip("link", "set", "kon0", "up")
        scene.wait_until_attached("kon0")
    finally:
        run("ip", "netns", "delete", name)


def recreated_alike(scene: Scene) -> None:
    pair = ("link", "add", "kon7", "index", "777", "up", "type", "veth", "peer", "name", "kon8")
    scene.ip(*pair)
    scene.wait_until_attached("kon7")
    batch = scene.agent.config_path.with_name("batch")
    batch.write_text("\n".join(" ".join(line) for line in [("link", "delete", "kon7"), pair]) + "\n")
    scene.ip("-batch", str(batch))  # at once: the agent looks when the second one is there
    scene.wait_until_attached("kon7")


def cleared(scene: Scene) -> None:
    scene.ip("link", "add", "kon4", "type", "veth", "peer", "kon5")
    program = foreign.load()
    index = socket.if_nametoindex("kon4")
    foreign.set_xdp(index, libbpf.XDP_FLAGS_SKB_MODE, program)
    scene.ip("link", "set", "kon4", "up")
    wait_for(lambda: scene.interface("kon4"), "kon4 is listed", WITHIN_S)
    found = scene.interface("kon4")
    assert found is not None
    assert "none" == found.ingress_mode
    assert foreign.NAME in found.ingress_reason
    foreign.set_xdp(index, libbpf.XDP_FLAGS_SKB_MODE, -1)  # the kernel tells the link monitor
    scene.wait_until_attached("kon4")
    os.close(program)


@pytest.mark.parametrize(
    "change", [down_and_up, added_and_removed, renamed, moved_away_and_back, recreated_alike, cleared],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_change(scene: Scene, change: Callable[[Scene], None]) -> None:
    """Whatever becomes of an interface, the agent follows within a second."""
    change(scene)


def test_a_program_that_leaves_without_a_word(scene: Scene) -> None:
    """A link that is closed tells nobody: the agent looks again by itself, first after a second, then less often."""
    scene.ip("link", "add", "kon4", "type", "veth", "peer", "kon5")
    held = foreign.link_xdp(socket.if_nametoindex("kon4"), libbpf.XDP_FLAGS_DRV_MODE)
    scene.ip("link", "set", "kon4", "up")
    wait_for(lambda: scene.interface("kon4"), "kon4 is listed", WITHIN_S)
    os.close(held)
    wait_for(lambda: scene.is_attached("kon4"), "kon4 is attached", 10)


def test_a_burst_of_interfaces(scene: Scene) -> None:
    """200 interfaces at once, on a bridge as containers' are: every one is attached in the end, nobody is kept waiting
    by it, and all are let go when they are deleted at once."""
    batch = scene.agent.config_path.with_name("batch")
    batch.write_text(
        "link add name konbr up type bridge\n"
        + "".join(
            f"link add konb{n} type veth peer name konp{n}\nlink set konb{n} master konbr\nlink set konb{n} up\n"
            for n in range(BURST)
        )
    )
    scene.ip("-batch", str(batch))
    deadline = time.monotonic() + BURST_S
    slowest_s, attached = 0.0, 0
    while attached < BURST and time.monotonic() < deadline:
        asked = time.monotonic()
        interfaces = scene.agent.status().interfaces
        slowest_s = max(slowest_s, time.monotonic() - asked)
        attached = sum(each.name.startswith("konb") and each.ingress_mode == "native" for each in interfaces)
    assert attached == BURST
    assert slowest_s < ANSWER_S
    batch.write_text("".join(f"link delete konb{n}\n" for n in range(BURST)))
    scene.ip("-batch", str(batch))
    wait_for(lambda: len(scene.agent.status().interfaces) <= 2, "they are let go", BURST_S)
