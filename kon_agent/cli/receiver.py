"""The command line `kon-receiver`: run it, look into its store, make certificates.

Invariants: results go to standard output, errors and hints to standard error; an error is a non-zero exit;
with `--json` standard output holds JSON and nothing else. Only `run` imports QUIC, and only then.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kon_agent import __version__
from kon_agent.clock import NS_PER_S, wall_ns
from kon_agent.config.load import load_receiver
from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.units import parse_duration
from kon_agent.errors import ConfigError, KonError

DEFAULT_CONFIG = "/etc/kon-agent/receiver.yaml"
DEFAULT_LIMIT = 50
"""Records `query` prints for people: a screenful. With --json: all, so that no program is surprised."""

Command = TypeVar("Command", bound=Callable[..., None])


class _Commands(click.Group):
    """A group that turns the project's errors into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `query | head`; do not let the interpreter complain of it at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KonError as err:
            click.echo(f"error: {err}", err=True)
            ctx.exit(err.exit_code)


def _config_option(command: Command) -> Command:
    help_text = f"The configuration. Default: {DEFAULT_CONFIG} if it exists, else built-in defaults."
    return click.option("-c", "--config", "config_file", metavar="FILE", help=help_text)(command)


def _store_options(command: Command) -> Command:
    store = click.option("--store", metavar="PATH", help="The store. Default: the configuration's, see `run`.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return _config_option(store(as_json(command)))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kon-receiver")
def main() -> None:
    """Accept agents over QUIC, store what they send exactly once, and show it."""


@main.command()
@_config_option
@click.option("--listen", metavar="HOST:PORT", help="Where to accept agents. Default: [::]:7843, IPv6 and IPv4.")
@click.option("--store", metavar="PATH", help=f"The store's file. Default: {ReceiverConfig().store}.")
@click.option("--cert", metavar="FILE", help="PEM certificate of this server. Default: made beside the store.")
@click.option("--key", metavar="FILE", help="Its PEM key.")
@click.option("--client-ca", metavar="FILE", help="Accept agents with a certificate from this authority.")
@click.option("--token-file", metavar="FILE", help="Accept agents with a token from this file.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line for every batch.")
def run(config_file: str | None, verbose: bool, **flags: str | None) -> None:
    """Accept agents in the foreground, until SIGTERM or Ctrl-C. A flag wins over the configuration."""
    from kon_agent.logs import setup
    from kon_agent.receiver.main import run as receive

    given = {name: value for name, value in flags.items() if value is not None}
    config = msgspec.structs.replace(_config(config_file), **given)
    setup("receiver", config.log.level, config.log.format)
    receive(config, verbose)


@main.command()
@_store_options
@click.option("--agent", metavar="A", help="Only this agent's.")
@click.option("--plugin", metavar="P", help="Only this plugin's.")
@click.option("--name", metavar="N", help="Only this metric.")
@click.option("--since", metavar="T", help="Not older than 10s, 5m, 2h, 7d, or since 2025-01-31T12:00:00Z.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"The newest N; 0: all. Default: {DEFAULT_LIMIT}, all with --json.",
)
def query(
    config_file: str | None,
    store: str | None,
    as_json: bool,
    agent: str | None,
    plugin: str | None,
    name: str | None,
    since: str | None,
    limit: int | None,
) -> None:
    """Show stored records, oldest first; with --json one object per line."""
    from kon_agent.receiver.reader import Filter, read_records

    since_ns = None if since is None else _since_ns(since, wall_ns())
    if limit is None:
        limit = 0 if as_json else DEFAULT_LIMIT
    records = read_records(_store(store, config_file), Filter(agent, plugin, name, since_ns, limit))
    if as_json:
        for record in records:
            sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
        sys.stdout.buffer.flush()
        return
    from kon_agent.cli import tables

    rows = [
        (
            _time(each.ts_ns) + ("?" if each.clock_unsynced else ""),
            each.agent,
            each.plugin,
            each.name,
            f"{each.value:.15g}",
            tables.labels(each.labels),
        )
        for each in records
    ]
    tables.print_table(["TIME", "AGENT", "PLUGIN", "NAME", ">VALUE", "LABELS"], rows, tables.console())
    if limit and len(rows) == limit:
        click.echo(f"the newest {limit}; --limit 0 shows all", err=True)


@main.command()
@_store_options
def ledger(config_file: str | None, store: str | None, as_json: bool) -> None:
    """Show, for each agent, plugin and epoch, what is stored, missing and declared lost."""
    from kon_agent.receiver.reader import read_ledger

    entries = read_ledger(_store(store, config_file))
    if as_json:
        click.echo(msgspec.json.encode(entries))
        return
    from kon_agent.cli import tables

    rows = [
        (
            each.agent,
            each.plugin,
            each.epoch,
            str(each.stored),
            str(len(each.ranges)),
            str(each.missing),
            tables.labels({reason: str(count) for reason, count in each.declared_lost.items()}) or "-",
            str(each.duplicates_refused),
        )
        for each in entries
    ]
    columns = ["AGENT", "PLUGIN", "EPOCH", ">STORED", ">RANGES", ">MISSING", "DECLARED LOST", ">DUPLICATES"]
    tables.print_table(columns, rows, tables.console())


@main.group()
def pki() -> None:
    """Make a private authority, and certificates for a server and its agents."""


@pki.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", "names", multiple=True, metavar="N", help="A further name or address of the server.")
def pki_init(folder: Path, names: tuple[str, ...]) -> None:
    """Make DIR/ca.pem, ca.key, server.pem and server.key."""
    from kon_agent.receiver.pki import init

    _print_made(init(folder, names))


@pki.command("agent")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.argument("name")
def pki_agent(folder: Path, name: str) -> None:
    """Make DIR/NAME.pem and NAME.key for the agent whose client-id is NAME."""
    from kon_agent.receiver.pki import agent

    _print_made(agent(folder, name))


def _config(config_file: str | None) -> ReceiverConfig:
    if config_file is None:
        return load_receiver(DEFAULT_CONFIG) if Path(DEFAULT_CONFIG).exists() else ReceiverConfig()
    return load_receiver(config_file)


def _store(store: str | None, config_file: str | None) -> Path:
    return Path(store or _config(config_file).store)


def _print_made(files: list[Path]) -> None:
    for path in files:
        click.echo(path)


def _since_ns(text: str, now_ns: int) -> int:
    try:
        return now_ns - int(parse_duration(text) * NS_PER_S)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--since {text!r} is neither a duration (10s, 5m) nor a time (2025-01-31T12:00:00Z)"
        ) from None
    return int(moment.timestamp()) * NS_PER_S + moment.microsecond * 1000


def _time(ts_ns: int) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(ts_ns // NS_PER_S)
    except (ValueError, OverflowError, OSError):
        return f"{ts_ns} ns"  # an agent's clock may say anything
    return f"{moment:%Y-%m-%d %H:%M:%S}.{ts_ns % NS_PER_S // 1_000_000:03}"


if __name__ == "__main__":
    main()
