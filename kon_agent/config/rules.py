"""What the schema's types cannot say: ranges, addresses, keys that go together, texts that are paths. Pure.

A rule belongs to a section's class and a key, and holds for every section derived from it. Tables, so that
whoever adds a key sees at a glance what can be asked of it.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable
from typing import Any

from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.schema import (
    MIN_PERIOD_S,
    BatchConfig,
    CacheConfig,
    Config,
    ControlConfig,
    Duration,
    ExecConfig,
    FlowsConfig,
    PluginConfig,
    PluginsConfig,
    Share,
    Size,
    TlsConfig,
)
from kon_agent.config.server import parse_listen, parse_server
from kon_agent.config.units import format_duration, format_size

MIN_RING_BYTES = 16 * 1024  # a few of the largest records
MAX_RING_BYTES = 64 * 1024 * 1024  # memory that is pinned for as long as the plugin is enabled
MIN_BATCH_BYTES = 8 * 1024  # the largest record (one page) and what frames it fit
MAX_BATCH_BYTES = 512 * 1024  # with its headers it must fit a frame of 1 MiB
MIN_FLOW_MEMORY_BYTES = 128 * 1024  # below, not even a bucket per CPU fits where there may be 200
MAX_FLOW_MEMORY_BYTES = 64 * 1024 * 1024  # the worker reads all of it each period: some 15 ms per 4 MiB, all active
MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its NUL (unix(7))

NO_KEYS = {(PluginsConfig, "instances")}
"""Fields that are no keys of the file: they are made of other keys."""

Rule = Callable[[Any], str | None]
"""Takes a value of the right type; returns what is wrong with it, or None."""


def complaint(section: type, key: str, value: object) -> str | None:
    """Return what is wrong with `value`, already of the right type, as `key` of a `section`, or None.

    Whoever sets a single key at run time (the control socket) asks this as the loader does.
    """
    if isinstance(value, str) and not value.isprintable():
        return "holds a character that cannot be printed; remove it"
    if isinstance(value, Duration | Size | Share) and value <= 0:
        return "must be more than 0"
    rule = _look_up(_RULES, section, key)
    return rule(value) if rule else None


def is_path(section: type, key: str) -> bool:
    """Return whether `key` of a `section` is a path, relative to the file that names it."""
    return bool(_look_up(_PATHS, section, key))


def together(section: type) -> tuple[str, str] | None:
    """Return the two keys of a `section` of which neither makes sense without the other."""
    return _TOGETHER.get(section)


def noun(section: type) -> str:
    """Return what a key of a `section` is called when it is unknown."""
    return "plugin" if section is PluginsConfig else "key"


def _period(value: Duration) -> str | None:
    if value < MIN_PERIOD_S:
        return f"{format_duration(value)} is too short; the shortest period is {format_duration(MIN_PERIOD_S)}"
    return None


def _ring_size(value: Size) -> str | None:
    if MIN_RING_BYTES <= value <= MAX_RING_BYTES and value & (value - 1) == 0:
        return None
    bounds = f"{format_size(MIN_RING_BYTES)} to {format_size(MAX_RING_BYTES)}"
    nearest = 1 << (max(MIN_RING_BYTES, min(value, MAX_RING_BYTES)) - 1).bit_length()
    return f"must be a power of two from {bounds}; did you mean '{format_size(nearest)}'?"


def _batch_bytes(value: Size) -> str | None:
    if MIN_BATCH_BYTES <= value <= MAX_BATCH_BYTES:
        return None
    return f"must be from {format_size(MIN_BATCH_BYTES)} to {format_size(MAX_BATCH_BYTES)}"


def _flow_memory(value: Size) -> str | None:
    if MIN_FLOW_MEMORY_BYTES <= value <= MAX_FLOW_MEMORY_BYTES:
        return None
    return f"must be from {format_size(MIN_FLOW_MEMORY_BYTES)} to {format_size(MAX_FLOW_MEMORY_BYTES)}"


def _server(value: str | list[str]) -> str | None:
    if isinstance(value, list):
        return None if value else "is an empty list; name at least one quic://host:port"
    return _error_of(parse_server, value)


def _listen(value: str) -> str | None:
    return _error_of(parse_listen, value)


def _socket(value: str) -> str | None:
    if len(os.path.abspath(value).encode()) > MAX_SOCKET_PATH_BYTES:
        return f"is longer than the {MAX_SOCKET_PATH_BYTES} bytes a socket's path may have; choose a shorter one"
    return None


def _command(value: str | list[str]) -> str | None:
    if isinstance(value, str):  # one of its words
        return None
    return _absolute(value[0]) if value else "is an empty list; name the program and its arguments"


def _absolute(value: str | list[str]) -> str | None:
    if isinstance(value, str) and not value.startswith("/"):
        return f"{value!r} is not an absolute path; write it from / on"
    return None


def _error_of(parse: Callable[[str], object], text: str) -> str | None:
    try:
        parse(text)
    except ValueError as err:
        return str(err)
    return None


_RULES: dict[tuple[type, str], Rule] = {
    (PluginConfig, "period"): _period,
    (PluginConfig, "ring_size"): _ring_size,
    (BatchConfig, "max_bytes"): _batch_bytes,
    (ControlConfig, "socket"): _socket,
    (FlowsConfig, "memory"): _flow_memory,
    (ExecConfig, "command"): _command,
    (ExecConfig, "execute"): _absolute,
    (ExecConfig, "read"): _absolute,
    (Config, "server"): _server,
    (ReceiverConfig, "listen"): _listen,
}

_PATHS: dict[tuple[type, str], bool] = {
    (Config, "plugin_dir"): True,
    (CacheConfig, "path"): True,
    (ControlConfig, "socket"): True,
    (TlsConfig, "ca"): True,
    (TlsConfig, "cert"): True,
    (TlsConfig, "key"): True,
    (TlsConfig, "token_file"): True,
    (ReceiverConfig, "store"): True,
    (ReceiverConfig, "cert"): True,
    (ReceiverConfig, "key"): True,
    (ReceiverConfig, "client_ca"): True,
    (ReceiverConfig, "token_file"): True,
}

_TOGETHER: dict[type, tuple[str, str]] = {TlsConfig: ("cert", "key"), ReceiverConfig: ("cert", "key")}


def _look_up(table: dict[tuple[type, str], Any], section: type, key: str) -> Any:
    """Return the table's entry for `key` of `section` or of a class it derives from."""
    return next((table[base, key] for base in section.__mro__ if (base, key) in table), None)
