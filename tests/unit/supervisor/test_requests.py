"""The promises of the control requests: what is asked for happens once, and the answer comes when it has."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kon_agent import clock
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import MAX_PLUGINS, Config, LimitsConfig, PluginConfig
from kon_agent.control_protocol import Op, PluginStatus, Reload, Request, Status, Stopping, encode_result
from kon_agent.errors import ConfigError, ControlError
from kon_agent.lifecycle import State
from kon_agent.linkreport import LinkReport
from kon_agent.spoolreport import OTHER, PluginTally, Slots, SpoolReport
from kon_agent.supervisor import status
from kon_agent.supervisor.control import Pending
from kon_agent.supervisor.regulation import Regulation
from kon_agent.supervisor.requests import Requests
from kon_agent.supervisor.unit import MAX_WAITING_RINGS, STEER, Unit
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
        self.added: list[Unit] = []
        self.file = folder / "agent.yaml"
        self.file.write_text("")
        self.supervisor: Any = SimpleNamespace(
            config=Config(client_id="edge-1"),
            started_with=Config(client_id="edge-1"),
            config_path=str(self.file),
            units={"cpu": self.unit},
            slots=Slots(["cpu"]),
            courier=SimpleNamespace(
                config=Config(client_id="edge-1"),
                report=LinkReport,
                spool_report=SpoolReport,
                reconfigure=self.reconfigure_courier,
            ),
            network=SimpleNamespace(config=None, attachments=list, refresh=self.refresh),
            regulation=Regulation(LimitsConfig(), START_NS),
            started_ns=START_NS - 5 * NS_PER_S,
            warnings=[],
            warn=lambda text: self.supervisor.warnings.append(text),
            withdraw=self.withdraw,
            go_by=self.go_by,
            add_unit=self.add_unit,
            remove_unit=self.remove_unit,
            stop=self.stop,
            plugin_statuses=lambda now_ns: [
                status.plugin_status(unit, PluginTally(), now_ns)
                for unit in self.supervisor.units.values()
                if isinstance(unit, Unit)
            ],
        )
        self.requests = Requests(cast(Any, self.supervisor))
        monkeypatch.setattr(clock, "now_ns", lambda: self.now_ns)

    def reconfigure_courier(self, config: Config, now_ns: int) -> None:
        self.courier_configs.append(config)
        self.supervisor.courier.config = config

    def withdraw(self, text: str) -> None:
        if text in self.supervisor.warnings:
            self.supervisor.warnings.remove(text)

    def go_by(self, config: Config) -> None:
        self.supervisor.config = config

    def add_unit(self, name: str, section: PluginConfig) -> None:
        self.supervisor.slots.give(name)
        unit = Unit(name, "module:Class", section, self.unit._around)
        self.added.append(unit)
        self.supervisor.units[name] = unit

    def remove_unit(self, name: str, now_ns: int) -> None:
        unit = self.supervisor.units.pop(name)
        unit.is_wanted = False
        unit.stop(now_ns)

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
    for unit in made.added:
        unit.release()
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


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (Op.PLUGIN_ENABLE, Op.PLUGIN_DISABLE, "cpu has been disabled meanwhile"),
        (Op.PLUGIN_RESTART, Op.PLUGIN_DISABLE, "cpu has been disabled meanwhile"),
        (Op.PLUGIN_DISABLE, Op.PLUGIN_ENABLE, "cpu has been enabled meanwhile"),
    ],
)
def test_a_command_overtaken_by_its_opposite_is_told(agent: Agent, first: Op, second: Op, why: str) -> None:
    """What will not come about is not waited for."""
    agent.turn()
    if first is Op.PLUGIN_ENABLE:
        agent.pending(Op.PLUGIN_DISABLE)
    question = agent.pending(first)
    agent.pending(second)
    with pytest.raises(ControlError, match=why):
        question()


@pytest.mark.parametrize("op", [Op.PLUGIN_ENABLE, Op.PLUGIN_RESTART, Op.PLUGIN_DISABLE])
def test_a_command_overtaken_by_a_removal_is_told(agent: Agent, op: Op) -> None:
    """A plugin that is forgotten has no state to answer with."""
    agent.turn()
    question = agent.pending(op)
    agent.supervisor.remove_unit("cpu", agent.now_ns)
    agent.worker_ends()
    with pytest.raises(ControlError, match="cpu has been removed meanwhile"):
        question()


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


# ── tap ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tap_is_given_every_ring_read_only(agent: Agent) -> None:
    """The worker's and those of dead ones that wait to be drained, the oldest first; one plugin's if that is asked."""
    agent.turn()
    agent.plugin.producer.publish(b"record")
    agent.plugin.die(agent.now_ns)
    agent.unit.restart(agent.now_ns)
    agent.turn()
    given = agent.ask(Op.TAP)
    assert given == agent.ask(Op.TAP, "cpu")
    assert ("edge-1", agent.unit.rings()) == (given.result.agent_id, agent.plugin.announced)
    assert [ring.epoch for ring in agent.unit.rings()] == [place.epoch for place in given.result.rings]
    assert b'"size_bytes":262144' in encode_result(given.result)
    assert [os.O_RDONLY] * 2 == [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in given.fds]


def test_a_tap_of_an_unknown_plugin_gets_a_suggestion(agent: Agent) -> None:
    """It is not answered with silence."""
    with pytest.raises(ControlError) as caught:
        agent.ask(Op.TAP, "cpuu")
    assert "did you mean 'cpu'?" == caught.value.hint


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

    def reconfigure(self, config: PluginConfig, now_ns: int) -> None:
        self.config = config
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
    answer = reload(running, "user: other")
    assert (["user"], ["user"], []) == (answer.changed, answer.waiting, running.courier_configs)
    assert ["user: the change takes effect when the agent is restarted"] == running.supervisor.warnings


def test_what_waited_and_is_taken_back_is_forgotten(running: Agent) -> None:
    """The warning goes when the file says again what the agent was started with."""
    reload(running, "control: {group: ops}")
    assert [] == reload(running, "").waiting
    assert [] == running.supervisor.warnings


def test_a_reload_of_the_log_touches_nobody(running: Agent) -> None:
    """The supervisor at once, the others from their next start."""
    answer = reload(running, "log: {level: debug}")
    assert (["log"], [], []) == (answer.changed, answer.waiting, running.courier_configs)
    assert ("debug", "debug") == (running.supervisor.config.log.level, running.supervisor.courier.config.log.level)


def test_the_spool_may_have_other_limits_and_no_other_place(running: Agent) -> None:
    """A new sender goes by them; the folder waits for the agent's next start, through any number of reloads."""
    old = Config().cache.path
    assert [] == reload(running, "cache: {max_size: 1MB}").waiting
    assert ["cache.path"] == reload(running, "cache: {max_size: 2MB, path: /elsewhere}").waiting
    reload(running, "cache: {max_size: 2MB, path: /elsewhere}\nlog: {level: debug}")
    seen = [(config.cache.path, config.cache.max_size) for config in running.courier_configs]
    assert [(old, 1_000_000), (old, 2_000_000)] == seen


@pytest.mark.parametrize("text", ["limits: {cpu: 5%}", "plugin_dir: /elsewhere"])
def test_what_is_nobodys_restart(running: Agent, text: str) -> None:
    """Neither the sender nor a worker hears of it, and nothing waits."""
    answer = reload(running, text)
    assert (1, [], []) == (len(answer.changed), answer.waiting, running.courier_configs)
    assert [] == sent(running.unit.child)


# ── live changes ──────────────────────────────────────────────────────────────────────────────────────────────────

UPS = {"type": "exec", "command": "[/bin/ups, -v]", "period": "1s"}


def test_a_period_changes_under_the_worker(agent: Agent) -> None:
    """The same worker, told at once; the file says nothing of it."""
    agent.turn()
    pid = agent.unit.pid
    answer = agent.ask(Op.PLUGIN_SET_PERIOD, "cpu", period="500ms")
    assert (0.5, 5.0, pid) == (answer.period_s, answer.configured_period_s, answer.pid)
    assert ([STEER], "") == (sent(agent.unit.child), agent.file.read_text())


def test_a_shorter_period_does_not_make_the_past_a_hang(agent: Agent) -> None:
    """A worker that was to run once an hour has been silent rightly."""
    agent.unit.set_period(3600)
    agent.turn()
    agent.now_ns += 3000 * NS_PER_S
    agent.ask(Op.PLUGIN_SET_PERIOD, "cpu", period="1s")
    agent.unit.look(agent.now_ns)
    assert signal.SIGABRT not in sent(agent.unit.child)
    agent.unit.look(agent.now_ns + 10 * NS_PER_S)
    assert signal.SIGABRT in sent(agent.unit.child)


@pytest.mark.parametrize(("period", "message"), [("10ms", "10ms is too short"), ("fast", "is not a duration")])
def test_a_period_is_judged_as_the_files(agent: Agent, period: str, message: str) -> None:
    """By the loader's rule, and nothing changes."""
    with pytest.raises(ControlError, match=message):
        agent.ask(Op.PLUGIN_SET_PERIOD, "cpu", period=period, persist=True)
    assert (5.0, "") == (agent.unit.period_s, agent.file.read_text())


def test_enabling_what_runs_forgets_its_deaths(agent: Agent) -> None:
    """Four deaths and a word: the next one is the first again."""
    for _ in range(4):
        agent.turn()
        agent.plugin.die(agent.now_ns)
        agent.now_ns = agent.unit.lifecycle.retry_at_ns or 0
    agent.turn()
    assert agent.pending(Op.PLUGIN_ENABLE)() is not None
    agent.plugin.die(agent.now_ns)
    assert State.BACKOFF is agent.unit.lifecycle.state


def test_the_status_tells_of_the_latest_deaths(agent: Agent) -> None:
    """When and of what; no more than a handful."""
    for _ in range(7):
        agent.turn()
        agent.plugin.die(agent.now_ns)
        agent.now_ns = agent.unit.lifecycle.retry_at_ns or 0
    deaths = agent.ask(Op.PLUGIN_INFO, "cpu").deaths
    assert ["killed by SIGKILL"] * 5 == [death.reason for death in deaths]
    assert all(death.when.endswith("+00:00") for death in deaths)


def test_an_added_plugin_runs(agent: Agent) -> None:
    """Under its own name, by the settings given; the answer comes with its worker."""
    question = agent.ask(Op.PLUGIN_ADD, "ups", settings=UPS)
    assert None is question()
    unit = agent.supervisor.units["ups"]
    unit.spawn(agent.now_ns)
    answer = question()
    assert ("ups", "exec", 1.0, unit.pid) == (answer.name, answer.type, answer.period_s, answer.pid)
    assert ("", ["/bin/ups", "-v"]) == (agent.file.read_text(), unit.config.command)


def test_a_removed_plugin_is_gone(agent: Agent) -> None:
    """The answer comes when its worker has ended."""
    agent.ask(Op.PLUGIN_ADD, "ups", settings=UPS)
    unit = agent.supervisor.units["ups"]
    unit.spawn(agent.now_ns)
    question = agent.ask(Op.PLUGIN_REMOVE, "ups")
    assert None is question()
    unit.gone(ended(unit.child), agent.now_ns)
    assert ("ups", "STOPPED", False) == ((answer := question()).name, answer.state, answer.enabled)
    with pytest.raises(ControlError, match="no plugin 'ups'"):
        agent.ask(Op.PLUGIN_REMOVE, "ups")


@pytest.mark.parametrize(
    ("name", "settings", "code", "message"),
    [
        ("cpu", {"type": "cpu"}, "exists", "there is a plugin 'cpu' already"),
        ("ups", {"type": "exec"}, "bad_value", "needs 'command'"),
        ("ups", {**UPS, "timeout": "soon"}, "bad_value", "plugins.ups.timeout: 'soon' is not a duration"),
        ("Ups", UPS, "bad_value", "lower-case"),
    ],
)
def test_what_cannot_be_added(agent: Agent, name: str, settings: dict[str, str], code: str, message: str) -> None:
    """Says why, and changes neither the agent nor the file."""
    with pytest.raises(ControlError, match=message) as caught:
        agent.ask(Op.PLUGIN_ADD, name, settings=settings, persist=True)
    assert (code, ["cpu"], "") == (caught.value.code, list(agent.supervisor.units), agent.file.read_text())


def test_plugins_are_bounded(agent: Agent) -> None:
    """In number, and in names that the spool's report tells apart."""
    for number in range(OTHER):
        agent.supervisor.slots.give(f"name-{number}")
    with pytest.raises(ControlError, match="too many names"):
        agent.ask(Op.PLUGIN_ADD, "ups", settings=UPS)
    agent.supervisor.units |= {f"plugin-{number}": Idle("x") for number in range(MAX_PLUGINS)}
    with pytest.raises(ControlError, match=f"there are {MAX_PLUGINS} plugins"):
        agent.ask(Op.PLUGIN_ADD, "ups", settings=UPS)


def test_what_is_built_in_stays(agent: Agent) -> None:
    """It is disabled instead."""
    with pytest.raises(ControlError) as caught:
        agent.ask(Op.PLUGIN_REMOVE, "cpu")
    assert ("built_in", "kon-agent plugins disable cpu") == (caught.value.code, caught.value.hint)


# ── live changes that are kept ────────────────────────────────────────────────────────────────────────────────────

FILE = "client-id: edge-1\n# mine\nplugins:\n  cpu: # too\n    enable: true\n    period: 5s\n"


@pytest.mark.parametrize(
    ("op", "plugin", "fields", "line"),
    [
        (Op.PLUGIN_DISABLE, "cpu", {}, "    enable: false"),
        (Op.PLUGIN_SET_PERIOD, "cpu", {"period": "1s"}, "    period: 1s"),
        (Op.PLUGIN_ADD, "ups", {"settings": UPS}, "    command: [/bin/ups, -v]"),
    ],
)
def test_what_is_kept_is_in_the_file(running: Agent, op: Op, plugin: str, fields: dict[str, Any], line: str) -> None:
    """And a reload finds nothing to do."""
    reload(running, FILE.partition("\n")[2])
    running.ask(op, plugin, persist=True, **fields)
    text = running.file.read_text()
    assert line in text.splitlines()
    assert {"# mine", "  cpu: # too"} <= set(text.splitlines())
    assert [] == running.ask(Op.RELOAD).changed


def test_what_is_added_and_kept_is_removed_and_kept(running: Agent) -> None:
    """The file is what it was."""
    reload(running, FILE.partition("\n")[2])
    before = running.file.read_text()
    running.ask(Op.PLUGIN_ADD, "ups", settings=UPS, persist=True)
    running.ask(Op.PLUGIN_REMOVE, "ups", persist=True)
    assert before == running.file.read_text()
    assert [] == running.ask(Op.RELOAD).changed


def test_what_else_the_file_says_by_now_waits_for_a_reload(running: Agent) -> None:
    """What is on disk is edited; somebody's half-made changes there are not applied by the way."""
    running.file.write_text(FILE.replace("5s", "7s"))
    running.ask(Op.PLUGIN_DISABLE, "cpu", persist=True)
    assert "period: 7s" in running.file.read_text()
    assert 5.0 == running.supervisor.config.plugins.cpu.period
    assert ["plugins.cpu"] == running.ask(Op.RELOAD).changed


@pytest.mark.parametrize("break_file", [lambda a: a.file.write_text("nonsense: 1"), lambda a: a.file.unlink()])
@pytest.mark.parametrize(("op", "fields"), [(Op.PLUGIN_SET_PERIOD, {"period": "1s"}), (Op.PLUGIN_DISABLE, {})])
def test_what_cannot_be_kept_is_not_done(
    agent: Agent, op: Op, fields: dict[str, Any], break_file: Callable[[Agent], None]
) -> None:
    """A request that cannot be carried out whole is not carried out by half."""
    agent.turn()
    break_file(agent)
    with pytest.raises(ControlError, match=r"agent\.yaml") as caught:
        agent.ask(op, "cpu", persist=True, **fields)
    assert "not_persisted" == caught.value.code
    assert (State.RUNNING, True, 5.0) == (agent.unit.lifecycle.state, agent.unit.is_wanted, agent.unit.period_s)


@pytest.mark.parametrize("fields", [{}, {"period": "1s"}])
def test_what_has_taken_anothers_name_is_not_kept(running: Agent, fields: dict[str, Any]) -> None:
    """The file's plugin of that name is another one: neither its section nor the plugin that runs is changed."""
    reload(running, "plugins: {ups: {type: load}}")
    running.ask(Op.PLUGIN_REMOVE, "ups")
    running.ask(Op.PLUGIN_ADD, "ups", settings={"type": "netdev"})
    op = Op.PLUGIN_SET_PERIOD if fields else Op.PLUGIN_DISABLE
    before = (running.file.read_text(), running.supervisor.units["ups"].config)
    with pytest.raises(ControlError, match="another plugin in the place of the file's 'ups'"):
        running.ask(op, "ups", persist=True, **fields)
    assert before == (running.file.read_text(), running.supervisor.units["ups"].config)


def test_without_a_file_nothing_is_kept(agent: Agent) -> None:
    """Built-in defaults cannot be written to."""
    agent.supervisor.config_path = None
    agent.turn()
    with pytest.raises(ControlError, match="no file to write to"):
        agent.ask(Op.PLUGIN_DISABLE, "cpu", persist=True)
    assert agent.unit.is_wanted


def test_what_is_not_kept_lasts_until_its_section_changes(running: Agent) -> None:
    """A reload that is about something else leaves it alone."""
    running.ask(Op.PLUGIN_SET_PERIOD, "cpu", period="1s")
    reload(running, "plugins: {memory: {period: 3s}}")
    assert 1.0 == running.unit.period_s
    reload(running, "plugins: {cpu: {period: 2s}}")
    assert 2.0 == running.unit.period_s


def test_what_is_added_and_not_kept_outlives_a_reload(running: Agent) -> None:
    """The file has never heard of it."""
    running.ask(Op.PLUGIN_ADD, "ups", settings=UPS)
    assert [] == reload(running, "").changed
    assert "ups" in running.supervisor.units


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
