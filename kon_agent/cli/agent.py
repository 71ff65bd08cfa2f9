"""The command line `kon-agent`: every command is a few lines between the arguments and what does the work.

Invariants: results go to standard output, errors and hints to standard error; an error is a non-zero exit;
with `--json` standard output holds JSON and nothing else. Only `run` imports the supervisor, and only then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kon_agent import __version__
from kon_agent.cli import DEFAULT_CONFIG, client, tables
from kon_agent.cli.spool import spool
from kon_agent.config.load import check as check_file
from kon_agent.config.load import load
from kon_agent.config.schema import Config
from kon_agent.control_protocol import (
    DEFAULT_SOCKET,
    SOCKET_ENV,
    Op,
    PluginStatus,
    Reload,
    Request,
    Status,
    Stopping,
)
from kon_agent.errors import ConfigError, ControlError, KonError, NoData

EPILOG = 'Completion for bash: eval "$(_KON_AGENT_COMPLETE=bash_source kon-agent)"'

Command = TypeVar("Command", bound=Callable[..., None])
T = TypeVar("T")


class _Commands(click.Group):
    """A group that turns the project's errors into a message, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KonError as err:
            # a configuration's mistakes are already one located line each
            click.echo(str(err) if isinstance(err, ConfigError) else f"error: {err}", err=True)
            if isinstance(err, ControlError) and err.hint:
                click.echo(f"hint: {err.hint}", err=True)
            ctx.exit(err.exit_code)


def _config_option(command: Command) -> Command:
    return click.option(
        "-c",
        "--config",
        "config_file",
        metavar="FILE",
        help=f"The configuration. Default: {DEFAULT_CONFIG} if it exists, else built-in defaults.",
    )(command)


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _control_options(command: Command) -> Command:
    socket = click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        help=f"The control socket. Default: that of -c FILE, else ${SOCKET_ENV}, else {DEFAULT_SOCKET}.",
    )
    return _json_option(_config_option(socket(command)))


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kon-agent")
def main() -> None:
    """Collect this host's metrics, each plugin in a process of its own, and deliver them exactly once."""


@main.command()
@_config_option
def run(config_file: str | None) -> None:
    """Run the agent in the foreground, until SIGTERM or Ctrl-C."""
    from kon_agent.supervisor import run as supervise

    path = _config_path(config_file)
    sys.exit(supervise(load(path) if path else Config(), path))


@main.command()
@_config_option
def check(config_file: str | None) -> None:
    """Validate the configuration; print every mistake with its place. Exit 78 if there is one."""
    path = _config_path(config_file)
    if path is None:
        click.echo(f"there is no {DEFAULT_CONFIG}: the built-in defaults apply")
        return
    _, mistakes = check_file(path)
    for mistake in mistakes:
        click.echo(str(mistake), err=True)
    if mistakes:
        sys.exit(ConfigError.exit_code)
    click.echo(f"{path}: ok")


@main.command()
@_control_options
def status(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Show the agent, its server, plugins, interfaces and resources."""
    answer = _ask(socket_path, config_file, Request(op=Op.STATUS), Status)
    if not _print_json(answer, as_json):
        tables.print_status(answer, tables.console())


@main.command()
@_control_options
def reload(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Read the configuration again and apply what changed."""
    answer = _ask(socket_path, config_file, Request(op=Op.RELOAD), Reload)
    if not _print_json(answer, as_json):
        click.echo("changed: " + ", ".join(answer.changed) if answer.changed else "nothing has changed")


@main.command()
@_control_options
def shutdown(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Stop the agent: workers first, then the sender when it has delivered."""
    answer = _ask(socket_path, config_file, Request(op=Op.SHUTDOWN), Stopping)
    if not _print_json(answer, as_json):
        click.echo("kon-agent is stopping")


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"kon-agent {__version__}")


@main.command()
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Keep all here.")
@click.option("--for", "seconds", type=click.FloatRange(min=0), metavar="SECONDS", help="End then.")
def demo(folder: Path | None, seconds: float | None) -> None:
    """Run a receiver and an agent side by side and show what is stored; Ctrl-C ends both."""
    from kon_agent.cli.demo import run as run_demo

    sys.exit(run_demo(folder, seconds))


main.add_command(spool)


@main.group()
def plugins() -> None:
    """See and change what is collected."""


@plugins.command("list")
@_control_options
def list_plugins(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """List the plugins with their processes and counters."""
    answer = _ask(socket_path, config_file, Request(op=Op.PLUGINS_LIST), list[PluginStatus])
    if not _print_json(answer, as_json):
        tables.print_plugins(answer, tables.console())


@plugins.command()
@click.argument("name")
@_control_options
def info(name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Show everything known about one plugin."""
    answer = _ask(socket_path, config_file, Request(op=Op.PLUGIN_INFO, plugin=name), PluginStatus)
    if not _print_json(answer, as_json):
        tables.print_plugin(answer, tables.console())


@plugins.command()
@click.argument("name")
@_control_options
def enable(name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Start a plugin's worker, until the agent ends or is told otherwise."""
    _change(Op.PLUGIN_ENABLE, name, socket_path, config_file, as_json)


@plugins.command()
@click.argument("name")
@_control_options
def disable(name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """End a plugin's worker, until the agent ends or is told otherwise."""
    _change(Op.PLUGIN_DISABLE, name, socket_path, config_file, as_json)


@plugins.command()
@click.argument("name")
@_control_options
def restart(name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Replace a plugin's worker by a fresh one; closes its breaker."""
    _change(Op.PLUGIN_RESTART, name, socket_path, config_file, as_json)


@plugins.command()
@click.argument("name")
@_config_option
@_json_option
def test(name: str, config_file: str | None, as_json: bool) -> None:
    """Run one collection here and print it; needs no running agent. With --json: a line per metric."""
    from kon_agent.cli import trial

    path = _config_path(config_file)
    try:
        metrics = trial.collect(name, load(path) if path else Config())
    except NoData as reason:
        click.echo(f"{name} has nothing to report here: {reason}", err=True)
        return
    if as_json:
        for metric in metrics:
            click.echo(msgspec.json.encode(metric))
    else:
        tables.print_metrics(metrics, tables.console())


def _change(op: Op, name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    plugin = _ask(socket_path, config_file, Request(op=op, plugin=name), PluginStatus)
    if not _print_json(plugin, as_json):
        pid = "" if plugin.pid is None else f", pid {plugin.pid}"
        click.echo(f"{tables.printable(plugin.name)}: {tables.printable(plugin.state)}{pid}")


def _ask(socket_path: str | None, config_file: str | None, request: Request, result: type[T]) -> T:
    return client.call(_socket_path(socket_path, config_file), request, result)


def _socket_path(flag: str | None, config_file: str | None) -> str:
    """A flag beats the environment, and both beat what is installed."""
    if flag:
        return flag
    if config_file is not None:
        return load(config_file).control.socket
    if from_environment := os.environ.get(SOCKET_ENV):
        return from_environment
    if os.access(DEFAULT_CONFIG, os.R_OK):
        config, _ = check_file(DEFAULT_CONFIG)  # a mistake in it is no reason not to find the agent
        return config.control.socket if config else DEFAULT_SOCKET
    return DEFAULT_SOCKET


def _config_path(given: str | None) -> str | None:
    """The file to read: the one given, else the installed one if there is one."""
    return given or (DEFAULT_CONFIG if os.path.exists(DEFAULT_CONFIG) else None)


def _print_json(result: object, wanted: bool) -> bool:
    if wanted:
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    return wanted


if __name__ == "__main__":
    main()
