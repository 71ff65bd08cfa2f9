"""The command line `kon-agent`: every command is a few lines between the arguments and what does the work.

Invariants: results go to standard output, errors and hints to standard error; an error is a non-zero exit;
with `--json` standard output holds JSON and nothing else. Only `run` imports the supervisor, and only then.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kon_agent import __version__
from kon_agent.cli import DEFAULT_CONFIG, tables, target
from kon_agent.cli.authoring import available, new
from kon_agent.cli.completion import completion
from kon_agent.cli.doctor import doctor
from kon_agent.cli.plugins import plugins
from kon_agent.cli.spool import spool
from kon_agent.cli.tap import tap
from kon_agent.cli.top import top
from kon_agent.config.load import check as check_file
from kon_agent.config.load import load
from kon_agent.config.schema import Config
from kon_agent.control_protocol import UPGRADE_TIMEOUT_S, Op, Reload, Request, Status, Stopping, Upgraded
from kon_agent.errors import ConfigError, ControlError, KonError

EPILOG = "Completion for bash: source <(kon-agent completion bash)"


class _Commands(click.Group):
    """A group that turns the project's errors into a message, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KonError as err:
            # a configuration's mistakes are already one located line each
            for line in (str(err) if isinstance(err, ConfigError) else f"error: {err}").split("\n"):
                click.echo(tables.printable(line), err=True)
            if isinstance(err, ControlError) and err.hint:
                click.echo(f"hint: {tables.printable(err.hint)}", err=True)
            ctx.exit(err.exit_code)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kon-agent")
def main() -> None:
    """Collect this host's metrics, each plugin in a process of its own, and deliver them exactly once."""


@main.command()
@target.config_option
@click.option("--take-over", "given_fd", type=int, hidden=True)
@click.option("--rehearse", "is_rehearsal", is_flag=True, hidden=True)
def run(config_file: str | None, given_fd: int | None, is_rehearsal: bool) -> None:
    """Run the agent in the foreground, until SIGTERM or Ctrl-C."""
    from kon_agent.examination import examine
    from kon_agent.supervisor import rehearse
    from kon_agent.supervisor import run as supervise

    path = target.config_path(config_file)
    config = load(path, examine.at_boot, is_boot=True) if path else Config()
    if given_fd is not None and is_rehearsal:
        sys.exit(rehearse(config, given_fd))
    sys.exit(supervise(config, path, given_fd))


@main.command()
@target.config_option
def check(config_file: str | None) -> None:
    """Validate the configuration; print every mistake with its place. Exit 78 if there is one."""
    path = target.config_path(config_file)
    if path is None:
        click.echo(f"there is no {DEFAULT_CONFIG}: the built-in defaults apply")
        return
    from kon_agent.examination import examine

    _, mistakes = check_file(path, examine)
    for mistake in mistakes:
        click.echo(str(mistake), err=True)
    if mistakes:
        sys.exit(ConfigError.exit_code)
    click.echo(f"{path}: ok")


@main.command()
@target.control_options
def status(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Show the agent, its server, plugins, interfaces and resources."""
    answer = target.ask(socket_path, config_file, Request(op=Op.STATUS), Status)
    if not target.print_json(answer, as_json):
        tables.print_status(answer, tables.console())


@main.command()
@target.control_options
def reload(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Read the configuration again and apply what changed."""
    answer = target.ask(socket_path, config_file, Request(op=Op.RELOAD), Reload)
    if not target.print_json(answer, as_json):
        click.echo("changed: " + ", ".join(answer.changed) if answer.changed else "nothing has changed")
        for name in answer.waiting:
            click.echo(f"{name}: takes effect when the agent is restarted")


@main.command()
@target.control_options
def shutdown(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Stop the agent: workers first, then the sender when it has delivered."""
    answer = target.ask(socket_path, config_file, Request(op=Op.SHUTDOWN), Stopping)
    if not target.print_json(answer, as_json):
        click.echo("kon-agent is stopping")


@main.command()
@target.control_options
def upgrade(socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Let the code that is installed now take over from the running agent; no record is lost.

    It is tried first: where it could not take over, the agent goes on as it was.
    """
    answer = target.ask(socket_path, config_file, Request(op=Op.UPGRADE), Upgraded, UPGRADE_TIMEOUT_S)
    if not target.print_json(answer, as_json):
        counters = {"kept": "; packet counters stayed attached", "anew": "; packet counters attached anew"}
        missed = ", ".join(f"{name} missed {count}" for name, count in answer.missed_ticks.items()) or "no tick missed"
        click.echo(f"kon-agent {answer.before} -> {answer.after}, pid {answer.pid}, in {answer.took_s:.1f} s")
        replaced = ", ".join(answer.replaced) or "no worker"
        click.echo(f"replaced: sender, {replaced}; {missed}{counters.get(answer.counters, '')}")
    for name, reason in answer.troubled.items():
        click.echo(f"warning: {tables.printable(name)} does not run: {tables.printable(reason)}", err=True)
    if answer.troubled:
        sys.exit(1)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"kon-agent {__version__}")


@main.command()
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Keep all here.")
@click.option("--for", "seconds", type=target.Seconds(min=0), metavar="SECONDS", help="End then.")
def demo(folder: Path | None, seconds: float | None) -> None:
    """Run a receiver and an agent side by side and show what is stored; Ctrl-C ends both."""
    from kon_agent.cli.demo import run as run_demo

    sys.exit(run_demo(folder, seconds))


main.add_command(completion)
main.add_command(doctor)
main.add_command(plugins)
main.add_command(spool)
plugins.add_command(available)
plugins.add_command(new)
main.add_command(tap)
main.add_command(top)


if __name__ == "__main__":
    main()
