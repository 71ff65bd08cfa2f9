"""What a command is about: the options that name an agent and its configuration, and what they come to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from kon_agent.cli import DEFAULT_CONFIG, client
from kon_agent.config.load import check, load
from kon_agent.control_protocol import DEFAULT_SOCKET, SOCKET_ENV, TIMEOUT_S, Request

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")


class Seconds(click.FloatRange):
    """A length of time on the command line; unlike its base, it takes neither `nan` nor `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


def config_option(command: Command) -> Command:
    """Give a command the option `-c`."""
    return click.option(
        "-c",
        "--config",
        "config_file",
        metavar="FILE",
        help=f"The configuration. Default: {DEFAULT_CONFIG} if it exists, else built-in defaults.",
    )(command)


def json_option(command: Command) -> Command:
    """Give a command the option `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def control_options(command: Command) -> Command:
    """Give a command what it takes to talk to an agent: `--socket`, `-c`, `--json`."""
    socket = click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        help=f"The control socket. Default: that of -c FILE, else ${SOCKET_ENV}, else {DEFAULT_SOCKET}.",
    )
    return json_option(config_option(socket(command)))


def ask(
    socket: str | None, config_file: str | None, request: Request, result: type[T], timeout_s: float = TIMEOUT_S
) -> T:
    """Ask the agent these options name; see `client.call`."""
    return client.call(socket_path(socket, config_file), request, result, timeout_s)


def socket_path(flag: str | None, config_file: str | None) -> str:
    """Return the control socket's path: a flag beats the environment, and both beat what is installed."""
    if flag:
        return flag
    if config_file is not None:
        return load(config_file).control.socket
    if from_environment := os.environ.get(SOCKET_ENV):
        return from_environment
    if os.access(DEFAULT_CONFIG, os.R_OK):
        config, _ = check(DEFAULT_CONFIG)  # a mistake in it is no reason not to find the agent
        return config.control.socket if config else DEFAULT_SOCKET
    return DEFAULT_SOCKET


def config_path(given: str | None) -> str | None:
    """Return the file to read: the one given, else the installed one if there is one."""
    return given or (DEFAULT_CONFIG if os.path.exists(DEFAULT_CONFIG) else None)


def print_json(result: object, wanted: bool) -> bool:
    """Print a result as JSON if that is wanted; return whether it was."""
    if wanted:
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    return wanted
