"""The commands of kon-agent."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner, Result

from kon_agent.cli import agent as commands
from kon_agent.cli import target, trial
from kon_agent.config.schema import Config
from kon_agent.control_protocol import (
    Op,
    PluginStatus,
    Reload,
    Request,
    Status,
    Stopping,
    encode_error,
    encode_result,
    unknown_plugin,
)
from kon_agent.errors import ConfigError, ControlError, NoData
from kon_agent.metric import Metric

if TYPE_CHECKING:
    from tests.unit.cli.conftest import FakeAgent

Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run `kon-agent` with these arguments, on a machine without an installed configuration."""
    monkeypatch.setattr(target, "DEFAULT_CONFIG", str(tmp_path / "absent.yaml"))

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(commands.main, arguments)

    return invoke


def test_status_json_has_every_field_of_the_contract(cli: Cli, agent: FakeAgent, whole: Status) -> None:
    """`status --json` prints the object DESIGN.md §8 promises, and nothing else."""
    agent.reply = lambda _: encode_result(whole)
    result = cli("status", "--json")
    printed = json.loads(result.stdout)
    assert {
        "agent_id", "version", "pid", "uptime_s", "server", "plugins", "spool", "resources",
        "interfaces", "warnings",
    } == set(printed)  # fmt: skip
    assert {
        "name", "state", "enabled", "pid", "period_s", "restarts", "last_exit", "breaker", "produced",
        "acked", "in_flight", "in_ring", "spooled", "dropped", "ring_used_bytes", "ring_size_bytes", "collect_ms",
        "missed_ticks", "uptime_s", "detail", "recovered", "type", "origin", "configured_period_s", "priority",
        "memory_limit_bytes", "rate_per_s", "deaths",
    } == set(printed["plugins"][0])  # fmt: skip
    assert {"address", "state", "since", "rtt_ms", "detail"} == set(printed["server"])
    assert {"bytes", "max_bytes", "segments", "records", "oldest_age_s", "mode", "detail"} == set(printed["spool"])
    assert {
        "cpu_percent", "pss_bytes", "level", "cpu_limit_percent", "memory_limit_bytes", "detail", "steps",
    } == set(printed["resources"])  # fmt: skip
    assert ([Request(op=Op.STATUS)], 0) == (agent.requests, result.exit_code)


def test_status_is_readable(cli: Cli, agent: FakeAgent, whole: Status) -> None:
    """Without --json the same status is a page for people."""
    agent.reply = lambda _: encode_result(whole)
    assert "the server's certificate is not from our CA" in cli("status").stdout


def test_list_json_is_one_array(cli: Cli, agent: FakeAgent, cpu: PluginStatus) -> None:
    """`plugins list --json` prints an array with an object per plugin."""
    agent.reply = lambda _: encode_result([cpu])
    assert [json.loads(msgspec.json.encode(cpu))] == json.loads(cli("plugins", "list", "--json").stdout)


def test_list_is_a_table(cli: Cli, agent: FakeAgent, cpu: PluginStatus) -> None:
    """`plugins list` prints a heading and a line per plugin."""
    agent.reply = lambda _: encode_result([cpu])
    heading, line = cli("plugins", "list").stdout.splitlines()
    assert ("NAME", "cpu") == (heading.split()[0], line.split()[0])


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("enable", "cpu"), Request(op=Op.PLUGIN_ENABLE, plugin="cpu")),
        (("disable", "cpu", "--persist"), Request(op=Op.PLUGIN_DISABLE, plugin="cpu", persist=True)),
        (("set-period", "cpu", "1s"), Request(op=Op.PLUGIN_SET_PERIOD, plugin="cpu", period="1s")),
        (("remove", "ups", "--persist"), Request(op=Op.PLUGIN_REMOVE, plugin="ups", persist=True)),
        (
            ("add", "ups", "--type", "exec", "--period", "1s", "--set", "command=[/bin/x, a=b]"),
            Request(
                op=Op.PLUGIN_ADD,
                plugin="ups",
                settings={"type": "exec", "period": "1s", "command": "[/bin/x, a=b]"},
            ),
        ),
    ],
)
def test_changes_are_asked_for_as_given(
    cli: Cli, agent: FakeAgent, cpu: PluginStatus, arguments: tuple[str, ...], request_: Request
) -> None:
    """What the arguments say is what the agent is asked for."""
    agent.reply = lambda _: encode_result(cpu)
    assert 0 == cli("plugins", *arguments).exit_code
    assert [request_] == agent.requests


@pytest.mark.parametrize("given", [("period",), ("=1s",), ("top=1", "top=2"), ("type=cpu",)])
def test_settings_are_keys_and_values(cli: Cli, agent: FakeAgent, given: tuple[str, ...]) -> None:
    """What is no KEY=VALUE, or says one thing twice, is a mistake of the command line."""
    options = [word for text in given for word in ("--set", text)]
    assert 2 == cli("plugins", "add", "ups", "--type", "exec", *options).exit_code
    assert [] == agent.requests


@pytest.mark.parametrize("arguments", [("plugins", "info", "\udcff"), ("tap", "--plugin", "\udcff")])
def test_what_is_no_text_is_told(cli: Cli, agent: FakeAgent, arguments: tuple[str, ...]) -> None:
    """A byte of the command line that is no UTF-8 is a mistake, not a traceback."""
    result = cli(*arguments)
    assert (1, "error: '\\udcff' is no UTF-8 text; write it as such\n") == (result.exit_code, result.stderr)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
@pytest.mark.parametrize("arguments", [("tap", "--for"), ("top", "--once", "--interval")])
def test_a_length_of_time_is_a_number(cli: Cli, agent: FakeAgent, arguments: tuple[str, ...], seconds: str) -> None:
    """One that has an end."""
    assert 2 == cli(*arguments, seconds).exit_code
    assert [] == agent.requests


def test_no_error_writes_to_the_terminal(cli: Cli, agent: FakeAgent) -> None:
    """An error may hold the words of a plugin."""
    agent.reply = lambda _: encode_error(ControlError("failed", "cpu: \x1b[2J\nline two", "\x07now"))
    result = cli("plugins", "enable", "cpu")
    assert ["error: cpu:  [2J", "line two", "hint:  now"] == result.stderr.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(cli: Cli, shell: str) -> None:
    """The script for each shell calls the program back."""
    result = cli("completion", shell)
    assert (0, True) == (result.exit_code, f"_KON_AGENT_COMPLETE={shell}_complete" in result.stdout)


def proposed(words: str) -> list[str]:
    """Return what bash is proposed behind `kon-agent WORDS`."""
    count = str(len(words.split(" ")))
    environment = {"_KON_AGENT_COMPLETE": "bash_complete", "COMP_WORDS": f"kon-agent {words}", "COMP_CWORD": count}
    result = CliRunner().invoke(commands.main, prog_name="kon-agent", env=environment)
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_the_agents_plugins_are_proposed(cli: Cli, agent: FakeAgent, cpu: PluginStatus) -> None:
    """Behind a command that takes a plugin stand the running agent's; commands complete as well."""
    agent.reply = lambda _: encode_result([cpu, msgspec.structs.replace(cpu, name="ups")])
    assert ["ups"] == proposed("plugins disable u")
    assert ["set-period"] == proposed("plugins set")


def test_without_an_agent_the_built_in_names_are_proposed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent, no message: the names every agent has."""
    monkeypatch.setenv("KON_AGENT_SOCKET", "/nowhere/control.sock")
    assert ["memory"] == proposed("plugins disable me")


@pytest.mark.parametrize(
    ("verb", "op"),
    [
        ("enable", Op.PLUGIN_ENABLE),
        ("disable", Op.PLUGIN_DISABLE),
        ("restart", Op.PLUGIN_RESTART),
        ("info", Op.PLUGIN_INFO),
    ],
)
def test_plugin_commands_name_their_plugin(cli: Cli, agent: FakeAgent, cpu: PluginStatus, verb: str, op: Op) -> None:
    """Each verb asks for its operation on the plugin named, and prints its state afterwards."""
    agent.reply = lambda _: encode_result(cpu)
    result = cli("plugins", verb, "cpu")
    assert [Request(op=op, plugin="cpu")] == agent.requests
    assert "RUNNING" in result.stdout
    assert cpu == msgspec.json.decode(cli("plugins", verb, "cpu", "--json").stdout, type=PluginStatus)


def test_change_says_the_new_process(cli: Cli, agent: FakeAgent, cpu: PluginStatus) -> None:
    """After a change one line tells the state and the pid."""
    agent.reply = lambda _: encode_result(cpu)
    assert "cpu: RUNNING, pid 4194303\n" == cli("plugins", "restart", "cpu").stdout


def test_change_says_why_it_shows_no_effect(cli: Cli, agent: FakeAgent, cpu: PluginStatus) -> None:
    """What the governor has paused is enabled and does not run: the reason stands beside the result."""
    why = "paused by the governor: 3.1 % of a core is used; the limit is 2 %"
    agent.reply = lambda _: encode_result(msgspec.structs.replace(cpu, state="STOPPED", pid=None, detail=why))
    result = cli("plugins", "enable", "cpu")
    assert ("cpu: STOPPED\n", f"{why}\n") == (result.stdout, result.stderr)


def test_unknown_plugin_is_suggested(cli: Cli, agent: FakeAgent) -> None:
    """A wrong name ends in an error and a hint on stderr and a failure, with nothing on stdout."""
    agent.reply = lambda request: encode_error(unknown_plugin(request.plugin or "", ["cpu", "disk"]))
    result = cli("plugins", "enable", "dsik", "--json")
    assert "error: there is no plugin 'dsik'\nhint: did you mean 'disk'?\n" == result.stderr
    assert (1, "") == (result.exit_code, result.stdout)


def test_reload_lists_what_changed(cli: Cli, agent: FakeAgent) -> None:
    """A reload names the sections it applied, or says that there were none."""
    agent.reply = lambda _: encode_result(Reload(changed=["plugins.cpu", "batch"], unchanged=["tls"]))
    assert "changed: plugins.cpu, batch\n" == cli("reload").stdout
    agent.reply = lambda _: encode_result(Reload(changed=[], unchanged=["tls"]))
    assert "nothing has changed\n" == cli("reload").stdout
    agent.reply = lambda _: encode_result(Reload(changed=["user"], unchanged=[], waiting=["user"]))
    assert "changed: user\nuser: takes effect when the agent is restarted\n" == cli("reload").stdout


def test_shutdown(cli: Cli, agent: FakeAgent) -> None:
    """A shutdown is asked for once."""
    agent.reply = lambda _: encode_result(Stopping())
    assert {"stopping": True} == json.loads(cli("shutdown", "--json").stdout)
    assert [Request(op=Op.SHUTDOWN)] == agent.requests


def test_flag_beats_file_beats_environment(cli: Cli, agent: FakeAgent, tmp_path: Path) -> None:
    """--socket wins over -c FILE, which wins over KON_AGENT_SOCKET."""
    (tmp_path / "agent.yaml").write_text("control: {socket: /nowhere/file.sock}\n")
    file = str(tmp_path / "agent.yaml")
    assert "/nowhere/flag.sock" in cli("status", "--socket", "/nowhere/flag.sock", "-c", file).stderr
    assert "/nowhere/file.sock" in cli("status", "-c", file).stderr
    assert [] == agent.requests


def test_installed_configuration_names_the_socket(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flag and environment the installed file names the socket; a broken one is no obstacle."""
    installed = tmp_path / "installed.yaml"
    monkeypatch.setattr(target, "DEFAULT_CONFIG", str(installed))
    monkeypatch.delenv("KON_AGENT_SOCKET", raising=False)
    installed.write_text("control: {socket: /nowhere/installed.sock}\n")
    assert "/nowhere/installed.sock" in cli("status").stderr
    monkeypatch.setattr(target, "DEFAULT_SOCKET", "/nowhere/default.sock")
    installed.write_text("nonsense: 1\n")
    assert "/nowhere/default.sock" in cli("status").stderr


def test_check_prints_every_mistake(cli: Cli, tmp_path: Path) -> None:
    """Five different mistakes are five located lines on stderr and exit 78."""
    file = tmp_path / "agent.yaml"
    file.write_text(
        "servr: quic://localhost:1\n"
        "plugins:\n"
        "  cpu: {period: 5 lightyears}\n"
        "  dsk: {enable: true}\n"
        "batch: {max_records: -3}\n"
        "log: {level: loud}\n"
    )
    result = cli("check", "-c", str(file))
    lines = result.stderr.splitlines()
    assert (5, 78, "") == (len(lines), result.exit_code, result.stdout)
    assert [f"{file}:{line}:" for line in (1, 3, 4, 5, 6)] == [line[: len(str(file)) + 3] for line in lines]


def test_check_of_a_good_file_is_one_line(cli: Cli, tmp_path: Path) -> None:
    """A valid file is called ok."""
    file = tmp_path / "agent.yaml"
    file.write_text("server: quic://localhost:7843\n")
    assert (f"{file}: ok\n", 0) == ((result := cli("check", "-c", str(file))).stdout, result.exit_code)


def test_check_without_a_file_says_so(cli: Cli) -> None:
    """With nothing installed and nothing named, `check` says that defaults apply."""
    assert "built-in defaults" in cli("check").stdout


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, str | None]]:
    """What the supervisor was started with; it ends with code 3."""
    calls: list[tuple[Config, str | None]] = []

    def run(config: Config, path: str | None, given_fd: int | None = None) -> int:
        calls.append((config, path))
        return 3

    module = types.ModuleType("kon_agent.supervisor")
    module.run = run  # type: ignore[attr-defined]
    module.rehearse = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kon_agent.supervisor", module)
    return calls


def test_run_hands_over_the_file(cli: Cli, tmp_path: Path, supervised: list[tuple[Config, str | None]]) -> None:
    """`run -c FILE` starts the supervisor with that file, and its exit code is the command's."""
    file = tmp_path / "agent.yaml"
    file.write_text("client-id: edge-7\n")
    assert 3 == cli("run", "-c", str(file)).exit_code
    [(config, path)] = supervised
    assert ("edge-7", str(file)) == (config.client_id, path)


def test_run_without_a_file_takes_defaults(cli: Cli, supervised: list[tuple[Config, str | None]]) -> None:
    """With nothing installed `run` starts on built-in defaults."""
    cli("run")
    assert [(Config(), None)] == supervised


def test_run_refuses_a_broken_file(cli: Cli, tmp_path: Path, supervised: list[tuple[Config, str | None]]) -> None:
    """A configuration with a mistake starts nothing: the mistake on stderr, exit 78."""
    file = tmp_path / "agent.yaml"
    file.write_text("nonsense: 1\n")
    result = cli("run", "-c", str(file))
    assert (ConfigError.exit_code, []) == (result.exit_code, supervised)
    assert result.stderr.startswith(f"{file}:1:1: ")


def test_plugins_test_prints_metrics(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's metrics are a table for people and one JSON object per line for programs."""
    metric = Metric("cpu_usage_percent", 12.5, {"mode": "user"}, ts_ns=7)
    monkeypatch.setattr(trial, "collect", lambda name, config: [metric])
    assert ["cpu_usage_percent", "mode=user", "12.5"] == cli("plugins", "test", "cpu").stdout.splitlines()[1].split()
    [line] = cli("plugins", "test", "cpu", "--json").stdout.splitlines()
    assert metric == msgspec.json.decode(line, type=Metric)


def test_plugins_test_of_nothing_is_no_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that offers nothing is said on stderr; absence is not failure."""

    def nothing(name: str, config: Config) -> list[Metric]:
        raise NoData("no swap here")

    monkeypatch.setattr(trial, "collect", nothing)
    result = cli("plugins", "test", "memory")
    assert ("memory has nothing to report here: no swap here\n", 0) == (result.stderr, result.exit_code)


def test_plugins_test_suggests_names(cli: Cli) -> None:
    """A wrong name for a trial is suggested the right one, without any agent."""
    result = cli("plugins", "test", "cpuu")
    assert ("hint: did you mean 'cpu'?", 1) == (result.stderr.splitlines()[1], result.exit_code)


def test_version(cli: Cli) -> None:
    """`version` prints the program and its version."""
    assert "kon-agent " == cli("version").stdout[:10]
