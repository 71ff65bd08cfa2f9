"""The promises of the control requests: what is asked for happens once, and the answer comes when it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kon_agent import clock
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Config
from kon_agent.control_protocol import Op, PluginStatus, Reload, Request, Status, Stopping
from kon_agent.errors import ConfigError, ControlError
from kon_agent.lifecycle import State
from kon_agent.linkreport import LinkReport
from kon_agent.spoolreport import PluginTally, SpoolReport
from kon_agent.supervisor import status
from kon_agent.supervisor.control import Pending
from kon_agent.supervisor.meter import Meter
from kon_agent.supervisor.requests import Requests
from kon_agent.supervisor.unit import MAX_WAITING_RINGS
from tests.unit.supervisor.fakes import START_NS, Plugin, ended, make_plugin, sent

CPU = Config().plugins.cpu


class Agent:
    """A supervisor of one plugin, none of whose processes is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.plugin: Plugin = make_plugin(monkeypatch, config=CPU)
        self.unit = self.plugin.unit
        self.now_ns = START_NS
        self.stops = 0
        self.courier_configs: list[Config] = []
        self.refreshes = 0
        self.file = folder / "agent.yaml"
        self.file.write_text("")
        self.supervisor: Any = SimpleNamespace(
            config=Config(client_id="edge-1"),
            config_path=str(self.file),
            units={"cpu": self.unit},
            courier=SimpleNamespace(report=LinkReport, spool_report=SpoolReport, reconfigure=self.reconfigure_courier),
            network=SimpleNamespace(config=None, attachments=list, refresh=self.refresh),
            meter=Meter(),
            started_ns=START_NS - 5 * NS_PER_S,
            warnings=[],
            warn=lambda text: self.supervisor.warnings.append(text),
            stop=self.stop,
            plugin_statuses=lambda now_ns: [status.plugin_status(self.unit, PluginTally(), now_ns)],
        )
        self.requests = Requests(cast(Any, self.supervisor))
        monkeypatch.setattr(clock, "now_ns", lambda: self.now_ns)

    def reconfigure_courier(self, config: Config, now_ns: int) -> None:
        self.courier_configs.append(config)

    def refresh(self) -> None:
        self.refreshes += 1

    def stop(self) -> None:
        self.stops += 1

    def ask(self, op: Op, plugin: str | None = None, **fields: Any) -> Any:
        return self.requests.handle(Request(op=op, plugin=plugin, **fields))

    def pending(self, op: Op) -> Pending:
        """Ask for a change of the plugin and return the question that waits for it."""
        question = self.ask(op, "cpu")
        assert callable(question)
        return cast(Pending, question)

    def turn(self) -> None:
        """Do what the supervisor's loop does."""
        if self.unit.is_due(self.now_ns):
            self.plugin.start(self.now_ns)

    def worker_ends(self) -> None:
        self.unit.gone(ended(self.unit.child), self.now_ns)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(monkeypatch, tmp_path)
    yield made
    made.plugin.release()


def test_the_status_tells_everything(agent: Agent) -> None:
    """Who it is, for how long, and every plugin."""
    shown = agent.ask(Op.STATUS)
    assert isinstance(shown, Status)
    assert ("edge-1", 5.0, ["cpu"]) == (shown.agent_id, shown.uptime_s, [plugin.name for plugin in shown.plugins])
    assert shown.plugins == agent.ask(Op.PLUGINS_LIST)
    assert shown.plugins[0] == agent.ask(Op.PLUGIN_INFO, "cpu")


def test_an_unknown_plugin_gets_a_suggestion(agent: Agent) -> None:
    """A slip of the finger is answered with what was meant."""
    with pytest.raises(ControlError) as caught:
        agent.ask(Op.PLUGIN_DISABLE, "cpuu")
    assert ("unknown_plugin", "did you mean 'cpu'?") == (caught.value.code, caught.value.hint)


def test_shutdown_answers_at_once(agent: Agent) -> None:
    """The agent cannot tell of its own end."""
    assert Stopping() == agent.ask(Op.SHUTDOWN)
    assert 1 == agent.stops


@pytest.mark.parametrize(
    ("op", "fields"), [(Op.PLUGIN_SET_PERIOD, {"period": "1s"}), (Op.PLUGIN_DISABLE, {"persist": True})]
)
def test_what_is_not_offered_changes_nothing(agent: Agent, op: Op, fields: dict[str, Any]) -> None:
    """A request that cannot be carried out whole is not carried out by half."""
    agent.turn()
    with pytest.raises(ControlError):
        agent.ask(op, "cpu", **fields)
    assert (State.RUNNING, True) == (agent.unit.lifecycle.state, agent.unit.is_wanted)


def test_disabling_is_answered_once_the_worker_has_ended(agent: Agent) -> None:
    """Not sooner, and it is not started again."""
    agent.turn()
    question = agent.pending(Op.PLUGIN_DISABLE)
    assert None is question()
    agent.worker_ends()
    answer = question()
    assert isinstance(answer, PluginStatus)
    assert ("STOPPED", False, None) == (answer.state, answer.enabled, answer.pid)
    assert not agent.unit.is_due(agent.now_ns)


def test_disabling_twice_is_once(agent: Agent) -> None:
    """What is off is off."""
    agent.turn()
    agent.pending(Op.PLUGIN_DISABLE)
    agent.worker_ends()
    assert agent.pending(Op.PLUGIN_DISABLE)() is not None


def test_enabling_is_answered_once_the_worker_is_there(agent: Agent) -> None:
    """With the new worker's pid."""
    agent.unit.is_wanted = False
    question = agent.pending(Op.PLUGIN_ENABLE)
    assert None is question()
    agent.turn()
    answer = question()
    assert isinstance(answer, PluginStatus)
    assert (True, agent.unit.pid) == (answer.enabled, answer.pid)


def test_enabling_what_has_just_been_disabled_waits_for_the_new_worker(agent: Agent) -> None:
    """The one on its way out is not the answer."""
    agent.turn()
    old_pid = agent.unit.pid
    agent.pending(Op.PLUGIN_DISABLE)
    question = agent.pending(Op.PLUGIN_ENABLE)
    assert None is question()
    agent.worker_ends()
    agent.turn()
    answer = question()
    assert isinstance(answer, PluginStatus)
    assert answer.pid not in (None, old_pid)


def test_enabling_what_failed_tries_it_at_once(agent: Agent) -> None:
    """Somebody has looked: no backoff, no breaker."""
    for _ in range(5):
        agent.turn()
        agent.plugin.die(agent.now_ns)
        agent.now_ns = agent.unit.lifecycle.retry_at_ns or 0
    agent.now_ns -= NS_PER_S
    assert "open" == agent.unit.lifecycle.breaker
    question = agent.pending(Op.PLUGIN_ENABLE)
    agent.turn()
    assert question() is not None
    assert State.RUNNING is agent.unit.lifecycle.state


def test_restarting_is_answered_with_another_worker(agent: Agent) -> None:
    """Politely ended, started again, another pid."""
    agent.turn()
    old = agent.unit.child
    question = agent.pending(Op.PLUGIN_RESTART)
    assert 1 == len(sent(old))
    assert None is question()
    agent.worker_ends()
    agent.turn()
    answer = question()
    assert isinstance(answer, PluginStatus)
    assert old is not None
    assert answer.pid not in (None, old.pid)


def test_a_worker_that_dies_at_once_is_an_answer_too(agent: Agent) -> None:
    """Who asked is told of the death instead of waiting for what does not come."""
    agent.unit.is_wanted = False
    question = agent.pending(Op.PLUGIN_ENABLE)
    agent.turn()
    agent.plugin.die(agent.now_ns)
    answer = question()
    assert isinstance(answer, PluginStatus)
    assert ("BACKOFF", "killed by SIGKILL") == (answer.state, answer.last_exit)


def test_a_worker_held_back_is_an_answer_too(agent: Agent) -> None:
    """Who asked is told what it waits for."""
    for _ in range(MAX_WAITING_RINGS):
        agent.turn()
        agent.plugin.producer.publish(b"record")
        agent.plugin.die(agent.now_ns)
        agent.unit.restart(agent.now_ns)
    answer = agent.pending(Op.PLUGIN_RESTART)()
    assert isinstance(answer, PluginStatus)
    assert "drained" in answer.detail


def test_what_cannot_run_says_why(agent: Agent) -> None:
    """An obstacle is no state to wait in; what is disabled is enabled first."""
    agent.unit.obstacle = "needs root"
    for op in (Op.PLUGIN_ENABLE, Op.PLUGIN_RESTART):
        with pytest.raises(ControlError, match="needs root"):
            agent.ask(op, "cpu")
    agent.unit.obstacle, agent.unit.is_wanted = "", False
    with pytest.raises(ControlError, match="disabled"):
        agent.ask(Op.PLUGIN_RESTART, "cpu")


# ── reload ────────────────────────────────────────────────────────────────────────────────────────────────────────


def reload(agent: Agent, text: str) -> Reload:
    """Change the file, whose former content is the configuration in use, and reload it."""
    agent.file.write_text(f'client-id: "edge-1"\n{text}')
    answer = agent.ask(Op.RELOAD)
    assert isinstance(answer, Reload)
    return answer


@pytest.fixture
def running(agent: Agent) -> Agent:
    """An agent whose plugin runs and whose units are all the configuration's."""
    for name in ("memory", "disk", "ebpf", "agent"):
        agent.supervisor.units[name] = Idle(name)
    agent.turn()
    return agent


class Idle:
    """A plugin nobody does anything to."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.config: object = None
        self.is_wanted = True
        self.restarts = 0

    def restart(self, now_ns: int) -> None:
        self.restarts += 1


def test_a_reload_of_the_same_touches_nothing(running: Agent) -> None:
    """Every worker and the sender go on."""
    answer = reload(running, "")
    assert [] == answer.changed
    assert {"plugins.cpu", "server", "tls"} <= set(answer.unchanged)
    assert ([], []) == (sent(running.unit.child), running.courier_configs)


def test_a_reload_restarts_what_changed_and_nothing_else(running: Agent) -> None:
    """One plugin's section is one plugin's restart."""
    answer = reload(running, "plugins: {memory: {period: 1s}}")
    assert ["plugins.memory"] == answer.changed
    memory = running.supervisor.units["memory"]
    assert (1, 1.0) == (memory.restarts, memory.config.period)
    assert ([], [], 0) == (sent(running.unit.child), running.courier_configs, running.refreshes)


def test_a_reload_can_switch_off(running: Agent) -> None:
    """A plugin disabled in the file ends like one disabled by command."""
    reload(running, "plugins: {cpu: {enable: false}}")
    running.worker_ends()
    assert not running.unit.is_due(running.now_ns)


def test_a_reload_looks_at_the_interfaces_again(running: Agent) -> None:
    """Other patterns are other interfaces, for the supervisor before the worker."""
    reload(running, 'plugins: {ebpf: {interfaces: ["eth*"]}}')
    assert (["eth*"], 1) == (running.supervisor.network.config.interfaces, running.refreshes)


def test_a_reload_restarts_the_sender_for_what_is_the_senders(running: Agent) -> None:
    """Another server is another sender, which is given the new configuration."""
    answer = reload(running, 'server: "quic://other:1"')
    assert ["server"] == answer.changed
    assert ["quic://other:1"] == [config.server for config in running.courier_configs]


def test_a_reload_says_what_it_cannot_do(running: Agent) -> None:
    """What is decided at the start waits for the next one, and the status says so."""
    answer = reload(running, "log: {level: debug}")
    assert (["log"], []) == (answer.changed, running.courier_configs)
    assert ["log: the change takes effect when the agent is restarted"] == running.supervisor.warnings


@pytest.mark.parametrize("text", ["plugins: {cpu: {periode: 1s}}", "tls: {ca: missing.pem}"])
def test_an_invalid_file_changes_nothing(running: Agent, text: str) -> None:
    """Neither its valid parts nor its mistakes take effect."""
    before = running.supervisor.config
    with pytest.raises(ConfigError):
        reload(running, f'server: "quic://other:1"\n{text}')
    assert (before, []) == (running.supervisor.config, running.courier_configs)


def test_without_a_file_there_is_nothing_to_reload(agent: Agent) -> None:
    """Built-in defaults do not change."""
    agent.supervisor.config_path = None
    with pytest.raises(ControlError, match="no file"):
        agent.ask(Op.RELOAD)
