"""Plugins changed while they run: at once, alone, and where asked for in the file, which stays as it was otherwise."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kon_agent.control_protocol import PluginStatus
from tests.support import law
from tests.support.agent import Agent
from tests.support.program import environment_of
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

CALM = {"period": "200ms"}  # so that a busy machine alone makes nobody miss a tick
SOME = {"cpu": CALM, "memory": CALM}
FILE = """\
# Edge 1, in the cellar. Ask Ada before you touch this.
{head}

plugins:      # what is collected
  cpu:
    # Twice as often as it was.
    enable: true    # really
    period: 200ms

  # Memory.
  memory: {{enable: true, period: '200ms'}}   # one line
  disk:
    enable: false
    #period: 5s   # the default
  ebpf:
    enable: false
  agent: {{enable: false}}

# The end.
"""

StartAgent = Callable[..., Agent]


@pytest.fixture
def agent(start_agent: StartAgent) -> Agent:
    """Return an agent that runs two plugins, on a file that is mostly comments."""
    agent = start_agent(SOME)
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in agent._base.items())
    agent.config_path.write_text(FILE.format(head=head))
    assert "changed: " in agent.control("reload").stdout
    agent.wait_until_running("cpu", "memory")
    return agent


def by_name(agent: Agent) -> dict[str, PluginStatus]:
    return {plugin.name: plugin for plugin in agent.status().plugins}


def run(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `kon-agent plugins WORDS`, which succeeds."""
    done = agent.control("plugins", *words)
    assert 0 == done.returncode, done.stderr
    return done


def difference(before: str, after: str) -> list[str]:
    """Return the lines taken out (-) and put in (+)."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line[0] + line[2:] for line in lines if line[0] in "+-"]


def assert_undisturbed(before: Mapping[str, PluginStatus], agent: Agent, *others: str) -> None:
    """Assert that these plugins have the same worker as before, and have kept every tick."""
    agent.wait_for_acks(*others, more=5)
    after = by_name(agent)
    for name in others:
        assert (before[name].pid, before[name].missed_ticks) == (after[name].pid, after[name].missed_ticks)


def test_a_period_changes_under_its_worker(agent: Agent) -> None:
    """The same process, at once, and until its section changes; a reload about something else leaves it."""
    before, text = by_name(agent), agent.config_path.read_text()
    run(agent, "set-period", "cpu", "1h")
    run(agent, "set-period", "cpu", "100ms")
    agent.wait_for_acks("cpu", more=20)
    assert_undisturbed(before, agent, "memory")
    cpu = agent.plugin("cpu")
    assert (before["cpu"].pid, 0.1, 0.2, 0) == (cpu.pid, cpu.period_s, cpu.configured_period_s, cpu.missed_ticks)
    assert text == agent.config_path.read_text()
    assert "nothing has changed\n" == agent.control("reload").stdout
    assert 0.1 == agent.plugin("cpu").period_s
    agent.config_path.write_text(text.replace("period: 200ms", "period: 300ms"))
    assert "changed: plugins.cpu\n" == agent.control("reload").stdout
    assert 0.3 == agent.plugin("cpu").period_s


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("disable", "cpu"), ["-    enable: true    # really", "+    enable: false    # really"]),
        (("set-period", "cpu", "1s"), ["-    period: 200ms", "+    period: 1s"]),
        (
            ("set-period", "memory", "500ms"),
            [
                "-  memory: {enable: true, period: '200ms'}   # one line",
                "+  memory: {enable: true, period: '500ms'}   # one line",
            ],
        ),
        (("enable", "disk"), ["-    enable: false", "+    enable: true"]),
        (("enable", "load"), ["+  load:", "+    enable: true"]),
        (
            ("add", "cores", "--type", "cpu", "--period", "1s", "--set", "per-core=true"),
            ["+  cores:", "+    type: cpu", "+    period: 1s", "+    per-core: true"],
        ),
    ],
)
def test_what_is_persisted_is_one_change_of_the_file(agent: Agent, words: tuple[str, ...], expected: list[str]) -> None:
    """The difference is the intended line; a reload finds nothing to do; the sender stays."""
    before, sender = agent.config_path.read_text(), agent.sender()
    run(agent, *words, "--persist")
    assert expected == difference(before, agent.config_path.read_text())
    assert "nothing has changed\n" == agent.control("reload").stdout
    assert sender == agent.sender()


def test_a_plugin_comes_and_goes(agent: Agent, receiver: Receiver) -> None:
    """An instance is added, delivers, and is removed without a record missing; nobody else notices."""
    before, text = by_name(agent), agent.config_path.read_text()
    run(agent, "add", "cores", "--type", "cpu", "--period", "100ms", "--persist")
    wait_for(lambda: agent.plugin("cores").acked >= 20, "records of cores are acknowledged")
    assert ("cpu", "built-in") == (agent.plugin("cores").type, agent.plugin("cores").origin)
    pid = agent.plugin("cores").pid
    assert "cores: removed\n" == run(agent, "remove", "cores", "--persist").stdout
    assert not Path(f"/proc/{pid}").exists()
    assert "cores" not in by_name(agent)
    assert text == agent.config_path.read_text()
    assert_undisturbed(before, agent, "cpu", "memory")
    rows = [row for row in receiver.ledger() if row.plugin == "cores"]
    assert 1 == len(rows)
    law.gapless(rows)


def test_a_name_is_used_again(agent: Agent) -> None:
    """A plugin that comes back under its name is a new one."""
    for _ in range(3):
        run(agent, "add", "cores", "--type", "cpu", "--period", "100ms")
        agent.wait_for_acks("cores", more=5)
        law.conservation(agent.plugin("cores"))
        run(agent, "remove", "cores")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("set-period", "cpu", "1ms"), "1ms is too short"),
        (("add", "cores", "--type", "cpuu"), "did you mean 'cpu'?"),
        (("add", "cores", "--type", "cpu", "--set", "per_coer=true"), "plugins.cores.per_coer: unknown key"),
        (("add", "ups", "--type", "exec"), "needs 'command'"),
        (("add", "cpu", "--type", "cpu"), "there is a plugin 'cpu' already"),
        (("remove", "cpu"), "kon-agent plugins disable cpu"),
        (("remove", "cores"), "there is no plugin 'cores'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(agent: Agent, words: tuple[str, ...], message: str) -> None:
    """The error says what and what to do."""
    before, text = by_name(agent), agent.config_path.read_text()
    refused = agent.control("plugins", *words, "--persist")
    assert refused.returncode != 0
    assert message in refused.stderr
    assert text == agent.config_path.read_text()
    assert_undisturbed(before, agent, "cpu", "memory")


def test_what_cannot_be_persisted_is_not_done(agent: Agent) -> None:
    """A file that somebody broke meanwhile is neither edited nor is the change made."""
    before = by_name(agent)
    agent.config_path.write_text("nonsense: 1\n")
    refused = agent.control("plugins", "disable", "cpu", "--persist")
    assert f"{agent.config_path}:1:1: nonsense: unknown key" in refused.stderr
    assert "nothing has been changed" in refused.stderr
    assert refused.returncode != 0
    assert_undisturbed(before, agent, "cpu", "memory")


def test_names_complete(agent: Agent) -> None:
    """The shell is proposed the running agent's plugins."""
    run(agent, "add", "cores", "--type", "cpu")
    words = f"kon-agent plugins disable --socket {agent.socket} c"
    done = subprocess.run(
        [sys.executable, "-c", "from kon_agent.cli.agent import main; main(prog_name='kon-agent')"],
        env=environment_of(_KON_AGENT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="5"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert {"plain,cpu", "plain,cgroup", "plain,cores"} == set(done.stdout.split())
