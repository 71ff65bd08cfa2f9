"""Measure what the governor makes of a storm: `python -m tests.bench.storm [--storm NAME] [--cpu 2%]`.

A default agent runs with a CPU limit; then plugins are enabled that use many times that, by a reload; later they are
taken away again. What the tree really uses is read from /proc twice a second by this process, starts and ends of
workers included, and printed with every step the governor took. Figures, no assertions: they depend on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kon_agent.control_protocol import StepStatus
from kon_agent.linux import procfs
from kon_agent.receiver import pki as authority
from tests.support.agent import AGENT_ID, Agent
from tests.support.receiver import Receiver

Sections = Mapping[str, Mapping[str, Any]]

SAMPLE_S = 0.5
WINDOW_S = 60.0
SETTLED_S = 10.0  # after the onset: the second figure leaves out what was used before the first steps
CALM: Sections = {name: {"period": "5s"} for name in ("cpu", "memory", "disk", "ebpf", "agent")}
SPIN = ["/bin/sh", "-c", "while :; do :; done"]
STORMS: dict[str, Sections] = {
    "periods": {
        "cpu": {"period": "100ms", "per_core": True},
        **{name: {"period": "100ms"} for name in ("memory", "disk", "process", "cgroup", "netdev", "filesystem")},
        "script": {"type": "exec", "period": "1s", "command": ["/bin/sh", "-c", "echo a 1"], "priority": 10},
    },
    "loop": {"loop": {"type": "exec", "mode": "stream", "command": SPIN, "period": "5s"}},
    "loops": {f"loop{n}": {"type": "exec", "mode": "stream", "command": SPIN, "period": "5s"} for n in range(3)},
}


class Watch:
    """What the tree below a process has used, sample by sample."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.samples: list[tuple[float, float]] = []
        self.levels: list[tuple[float, str]] = []

    def run(self, seconds: float, until_level: str | None = None) -> None:
        """Sample for some time, or until the governor is at a level."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.samples.append((time.monotonic(), tree_cpu_seconds(self.agent.pid)))
            level = self.agent.status().resources.level if len(self.samples) % 4 == 0 else None
            if level and (not self.levels or self.levels[-1][1] != level):
                self.levels.append((time.monotonic(), level))
            if level and level == until_level:
                return
            time.sleep(SAMPLE_S)

    def worst(self, since: float, until: float, window_s: float = WINDOW_S) -> float:
        """Return the highest mean, percent of a core, of any window within two times; of all where it is shorter."""
        inside = [sample for sample in self.samples if since <= sample[0] <= until]
        worst = 0.0
        for at, used_s in inside:
            later = [sample for sample in inside if sample[0] >= at + window_s]
            if later:
                worst = max(worst, 100 * (later[0][1] - used_s) / (later[0][0] - at))
        return worst

    def mean(self, since: float, until: float) -> float:
        """Return the mean between two times, percent of a core."""
        inside = [sample for sample in self.samples if since <= sample[0] <= until]
        return 100 * (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def tree_cpu_seconds(pid: int) -> float:
    """Return what a process, all below it, and all of them that have ended have used."""
    total = procfs.read_family_cpu_seconds(pid)
    for child in procfs.read_descendants(pid):
        try:
            total += procfs.read_family_cpu_seconds(child)
        except OSError:  # ended meanwhile: it is in its parent's figure
            continue
    return total


def measure(storm: Sections, arguments: argparse.Namespace) -> None:
    """Run one storm and print what came of it."""
    with tempfile.TemporaryDirectory(prefix="kon-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        pki = folder / "pki"
        pki.mkdir()
        authority.init(pki, [])
        authority.agent(pki, AGENT_ID)
        limits = {"limits": {"cpu": arguments.cpu, "memory": arguments.memory}}
        receiver = Receiver(folder, pki, ["--client-ca", str(pki / "ca.pem")])
        with receiver, Agent(folder, receiver.port, pki, CALM, sections=limits) as agent:
            agent.wait_until_running()
            watch = Watch(agent)
            watch.run(arguments.calm)
            onset = time.monotonic()
            agent.configure({**CALM, **storm})
            agent.control("reload", "-c", str(agent.config_path))
            watch.run(arguments.length)
            end = time.monotonic()
            steps = agent.status().resources.steps
            agent.configure(CALM)
            agent.control("reload", "-c", str(agent.config_path))
            watch.run(arguments.recovery, until_level="normal")
            back = time.monotonic()
            steps += [step for step in agent.status().resources.steps if step not in steps]
            report(watch, onset, end, back, steps)
            print(*(line for line in agent.log().splitlines() if "governor" in line), sep="\n")


def report(watch: Watch, onset: float, end: float, back: float, steps: list[StepStatus]) -> None:
    """Print the figures of one storm."""
    first = watch.samples[0][0]
    print(f"{'before, mean':<44}{watch.mean(first, onset):6.2f} %")
    print(f"{'storm, mean':<44}{watch.mean(onset, end):6.2f} %")
    print(f"{'worst 60 s from the onset':<44}{watch.worst(onset, end):6.2f} %")
    print(f"{f'worst 60 s from {SETTLED_S:.0f} s after the onset':<44}{watch.worst(onset + SETTLED_S, end):6.2f} %")
    print(f"{'worst 60 s from the end on':<44}{watch.worst(end, back):6.2f} %")
    print(f"{'back to normal after':<44}{back - end:6.0f} s, level {watch.agent.status().resources.level}")
    print(f"{'levels':<44}" + ", ".join(f"{at - onset:.0f} s {level}" for at, level in watch.levels))
    print(f"{'steps in status':<44}{len(steps):6}")


def main() -> None:
    """Measure the storms asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storm", choices=STORMS, action="append", help="default: all")
    parser.add_argument("--cpu", default="2%")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--calm", type=float, default=30.0, help="seconds before the storm")
    parser.add_argument("--length", type=float, default=150.0, help="seconds of storm")
    parser.add_argument("--recovery", type=float, default=200.0, help="seconds to wait for the recovery at most")
    arguments = parser.parse_args()
    for name in arguments.storm or STORMS:
        print(f"── {name}, cpu limit {arguments.cpu}")
        measure(STORMS[name], arguments)


if __name__ == "__main__":
    main()
