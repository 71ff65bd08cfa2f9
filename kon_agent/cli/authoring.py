"""The commands for those who write or install plugins: `kon-agent plugins available` and `plugins new`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import msgspec

from kon_agent.catalog import Catalog, Origin
from kon_agent.cli import scaffold, tables, target
from kon_agent.config.load import check
from kon_agent.config.naming import canonical
from kon_agent.config.schema import TYPES, Config, ForeignConfig, PluginConfig


class Available(msgspec.Struct, frozen=True):
    """A plugin that a configuration may name.

    Attributes:
        name: its name.
        origin: built in, a file of the plugin folder, or an installed package.
        where: the file, or the package and its `module:Class`; empty where it is built in.
        configured: the enabled sections that use it.
        refusal: why it cannot be used; empty: it can.
    """

    name: str
    origin: Literal["built in", "file", "package"]
    where: str = ""
    configured: list[str] = []
    refusal: str = ""


@click.command()
@target.config_option
@target.json_option
def available(config_file: str | None, as_json: bool) -> None:
    """List what can be configured: built-in plugins, installed ones, files of the plugin folder; runs none of them."""
    path = target.config_path(config_file)
    config, mistakes = check(path) if path else (Config(), [])
    if mistakes:
        click.echo(f"{path} has mistakes, see 'kon-agent check': the defaults are assumed", err=True)
    found = list_available(config or Config())
    if not target.print_json(found, as_json):
        rows = [(each.name, each.origin, ", ".join(each.configured) or "-", each.where, each.refusal) for each in found]
        tables.print_table(["NAME", "ORIGIN", "CONFIGURED", "WHERE", "REFUSED"], rows, tables.console())


@click.command()
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write it here.")
@click.option("--package", "is_package", is_flag=True, help="A package for pip, not a file for the plugin folder.")
def new(name: str, folder: Path | None, is_package: bool) -> None:
    """Write a plugin that works, and its tests, to begin with."""
    files = scaffold.write(name, folder, is_package)
    for file in files:
        click.echo(str(file))
    home = files[0].parent
    place = home if home.is_absolute() else f"./{home}"  # a bare name is a stranger's package to pip
    install = (
        f"pip install {place}"
        if is_package
        else f"sudo install -D -m 644 {files[0]} {Config().plugin_dir}/{files[0].name}"
    )
    click.echo(f"test it: pytest {home}\ninstall it: {install}\nuse it: add '{name}: {{}}' under 'plugins:', reload")


def list_available(config: Config) -> list[Available]:
    """Return what can be configured, built-in plugins first."""
    sections = config.plugins.by_name()
    builtin = [Available(name, "built in", configured=_users(name, sections)) for name in TYPES]
    found = [
        Available(
            name=origin.name,
            origin=origin.kind,
            where=str(origin),
            configured=_users(origin, sections),
            refusal="a built-in plugin has this name" if canonical(origin.name) in TYPES else origin.refusal,
        )
        for origin in Catalog(config.plugin_dir).found()
    ]
    return [*builtin, *found]


def _users(kind: str | Origin, sections: dict[str, PluginConfig]) -> list[str]:
    """Return the sections that run a plugin, built in or found."""
    return [
        name
        for name, section in sections.items()
        if section.enable
        and kind == (section.origin if isinstance(section, ForeignConfig) else canonical(section.type or name))
    ]
