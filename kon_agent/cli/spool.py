"""The command `kon-agent spool`: what is in the spool, whether or not the agent runs. Nothing here changes it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import click
import msgspec

from kon_agent.cli import DEFAULT_CONFIG, tables
from kon_agent.config.load import load
from kon_agent.config.schema import Config
from kon_agent.spool.inspection import Inspection, SegmentReport, inspect

Command = TypeVar("Command", bound=Callable[..., None])


def _options(command: Command) -> Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--path", metavar="DIR", help="The spool's folder. Default: cache.path of the configuration."),
        click.option("-c", "--config", "config_file", metavar="FILE", help="The configuration that names the spool."),
    ):
        command = option(command)
    return command


@click.group()
def spool() -> None:
    """See what waits on disk to be delivered."""


@spool.command("ls")
@_options
def ls(config_file: str | None, path: str | None, as_json: bool) -> None:
    """List the spool's segments, the oldest first."""
    found = inspect(_folder(config_file, path), time.time(), is_thorough=False)
    if as_json:
        _print_json(found)
        return
    _print_head(found)
    if found.segments:
        columns = [">SEGMENT", ">BYTES", ">RECORDS", ">LOSSES", ">AGE", "STATE"]
        tables.print_table(columns, map(_row, found.segments), tables.console())


@spool.command()
@_options
def verify(config_file: str | None, path: str | None, as_json: bool) -> None:
    """Read every record and say which segments are damaged, and where. Exit 1 if one is."""
    found = inspect(_folder(config_file, path), time.time(), is_thorough=True)
    if as_json:
        _print_json(found)
    else:
        _print_head(found)
        for each in found.segments:
            click.echo(_verdict(each))
            for damage in each.damage:
                click.echo(f"  {damage.size} bytes from offset {damage.offset}")
    if found.is_damaged:
        sys.exit(1)


def _folder(config_file: str | None, path: str | None) -> str:
    if path is not None:
        return path
    if config_file is None and not os.path.exists(DEFAULT_CONFIG):
        return Config().cache.path
    return load(config_file or DEFAULT_CONFIG).cache.path


def _print_head(found: Inspection) -> None:
    size = tables.size(sum(each.bytes for each in found.segments))
    records = sum(each.records for each in found.segments)
    click.echo(f"{tables.printable(found.path)}: {len(found.segments)} segments, {records} records, {size}")
    if found.pid is not None:
        click.echo(f"in use by pid {found.pid or 'unknown'}")


def _row(each: SegmentReport) -> tuple[str, ...]:
    return (str(each.number), str(each.bytes), str(each.records), str(each.losses), tables.age(each.age_s), each.state)


def _verdict(each: SegmentReport) -> str:
    if each.state != "damaged":
        return f"{each.name}: ok, {each.records} records, {each.losses} losses" + (", open" * (each.state == "open"))
    why = f": {each.error}" if each.error else ""
    return f"{each.name}: damaged{why}, {each.unreadable} of {each.records} records are lost"


def _print_json(found: Inspection) -> None:
    answer = {**msgspec.structs.asdict(found), "damaged": found.is_damaged}
    click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2))
