"""The commands `kon-agent plugins …`: see and change what is collected, while it is collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from kon_agent.cli import tables, target
from kon_agent.cli.completion import complete_plugin
from kon_agent.config.load import load
from kon_agent.config.schema import Config
from kon_agent.control_protocol import Op, PluginStatus, Request
from kon_agent.errors import NoData

Command = TypeVar("Command", bound=Callable[..., Any])

name_argument = click.argument("name", shell_complete=complete_plugin)


def _change_options(command: Command) -> Command:
    persist = click.option("--persist", is_flag=True, help="Write it into the agent's configuration file as well.")
    return target.control_options(persist(command))


@click.group()
def plugins() -> None:
    """See and change what is collected."""


@plugins.command("list")
@target.control_options
def list_plugins(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """List the plugins with their processes and counters."""
    answer = target.ask(socket_path, config_file, Request(op=Op.PLUGINS_LIST), list[PluginStatus])
    if not target.print_json(answer, as_json):
        tables.print_plugins(answer, tables.console())


@plugins.command()
@name_argument
@target.control_options
def info(name: str, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Show everything known about one plugin."""
    answer = target.ask(socket_path, config_file, Request(op=Op.PLUGIN_INFO, plugin=name), PluginStatus)
    if not target.print_json(answer, as_json):
        tables.print_plugin(answer, tables.console())


@plugins.command()
@name_argument
@_change_options
def enable(name: str, persist: bool, **to: Any) -> None:
    """Start a plugin's worker, and forget how often it has died."""
    _change(Request(op=Op.PLUGIN_ENABLE, plugin=name, persist=persist), **to)


@plugins.command()
@name_argument
@_change_options
def disable(name: str, persist: bool, **to: Any) -> None:
    """End a plugin's worker."""
    _change(Request(op=Op.PLUGIN_DISABLE, plugin=name, persist=persist), **to)


@plugins.command()
@name_argument
@target.control_options
def restart(name: str, **to: Any) -> None:
    """Replace a plugin's worker by a fresh one; closes its breaker."""
    _change(Request(op=Op.PLUGIN_RESTART, plugin=name), **to)


@plugins.command("set-period")
@name_argument
@click.argument("period")
@_change_options
def set_period(name: str, period: str, persist: bool, **to: Any) -> None:
    """Have a plugin run every PERIOD (500ms, 5s, 1m); its worker stays."""
    _change(Request(op=Op.PLUGIN_SET_PERIOD, plugin=name, period=period, persist=persist), **to)


@plugins.command()
@click.argument("name")
@click.option("--type", "kind", metavar="TYPE", help="The plugin this is an instance of.")
@click.option("--period", metavar="TIME", help="How often it runs. Default: 5s.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting, the value as in the file; repeatable."
)
@_change_options
def add(name: str, kind: str | None, period: str | None, settings: tuple[str, ...], persist: bool, **to: Any) -> None:
    """Add a plugin under a NAME of its own and start its worker.

    \b
    kon-agent plugins add ups --type exec --set 'command=[/usr/local/bin/ups-metrics]'
    """
    flags = [f"{key}={value}" for key, value in (("type", kind), ("period", period)) if value is not None]
    section = _settings((*flags, *settings))
    _change(Request(op=Op.PLUGIN_ADD, plugin=name, settings=section, persist=persist), **to)


@plugins.command()
@name_argument
@_change_options
def remove(name: str, persist: bool, **to: Any) -> None:
    """End the worker of a plugin that was added, and forget the plugin."""
    _change(Request(op=Op.PLUGIN_REMOVE, plugin=name, persist=persist), **to)


@plugins.command()
@name_argument
@target.config_option
@target.json_option
def test(name: str, config_file: str | None, as_json: bool) -> None:
    """Run one collection here and print it; needs no running agent. With --json: a line per metric."""
    from kon_agent.cli import trial
    from kon_agent.examination import examine

    path = target.config_path(config_file)
    try:
        metrics = trial.collect(name, load(path, examine, is_boot=True) if path else Config())
    except NoData as reason:
        click.echo(f"{name} has nothing to report here: {reason}", err=True)
        return
    if as_json:
        for metric in metrics:
            click.echo(msgspec.json.encode(metric))
    else:
        tables.print_metrics(metrics, tables.console())


def _settings(given: tuple[str, ...]) -> dict[str, str]:
    """Return `KEY=VALUE` texts by key."""
    settings: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
        if key in settings:
            raise click.BadParameter(f"{key!r} is given twice", param_hint="--set")
        settings[key] = value
    return settings


def _change(request: Request, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    plugin = target.ask(socket_path, config_file, request, PluginStatus)
    if not target.print_json(plugin, as_json):
        pid = "" if plugin.pid is None else f", pid {plugin.pid}"
        every = f", every {tables.period(plugin.period_s)}" if request.op is Op.PLUGIN_SET_PERIOD else ""
        state = "removed" if request.op is Op.PLUGIN_REMOVE else tables.printable(plugin.state)
        click.echo(f"{tables.printable(plugin.name)}: {state}{pid}{every}")
        if plugin.detail:  # what was asked for is not what is: the governor's pause, a death
            click.echo(tables.printable(plugin.detail), err=True)
