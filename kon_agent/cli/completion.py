"""Completion in the shell: the script that switches it on, and the names it proposes."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from kon_agent.cli import target
from kon_agent.config.schema import BUILTIN_SECTIONS
from kon_agent.control_protocol import Op, PluginStatus, Request
from kon_agent.errors import KonError

PROGRAM = "kon-agent"
VARIABLE = "_KON_AGENT_COMPLETE"
TIMEOUT_S = 0.5  # somebody waits with a finger on the Tab key


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options and plugins; for bash: source <(kon-agent completion bash)."""
    known = get_completion_class(shell)
    assert known is not None
    # `source` of the class would run the shell for its version; the template is all we want
    script = known(click.Group(), {}, PROGRAM, VARIABLE)
    click.echo(script.source_template % script.source_vars())


def complete_plugin(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the plugins whose names begin with what has been typed: the running agent's, else the built-in ones."""
    return [CompletionItem(name) for name in _names(ctx) if name.startswith(incomplete)]


def _names(ctx: click.Context) -> list[str]:
    socket, file = ctx.params.get("socket_path"), ctx.params.get("config_file")
    try:
        plugins = target.ask(socket, file, Request(op=Op.PLUGINS_LIST), list[PluginStatus], TIMEOUT_S)
    except (KonError, OSError):
        return list(BUILTIN_SECTIONS)
    return [plugin.name for plugin in plugins]
