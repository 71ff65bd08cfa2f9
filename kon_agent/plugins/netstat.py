"""The counters of the kernel's network stack, for this network namespace, as nstat(8) calls them.

Sources: /proc/net/snmp, /proc/net/netstat and /proc/net/snmp6 (Documentation/networking/snmp_counter.rst).
"""

from __future__ import annotations

from collections.abc import Iterable

from kon_agent.errors import NoData
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

Counters = dict[str, int]
"""Counters by nstat's names: the group's name, then the counter's, as in `TcpExtListenDrops`."""

SNMP, NETSTAT, SNMP6 = "/proc/net/snmp", "/proc/net/netstat", "/proc/net/snmp6"


def read(context: Context) -> Counters:
    """Return all counters there are; a file this kernel or this /proc does not have takes only its own with it."""
    found: Counters = {}
    for path in (SNMP, NETSTAT):
        found |= parse_table(read_text(context, path))
    return found | parse_list(read_text(context, SNMP6))


def read_text(context: Context, path: str) -> str:
    """Return a file's text, which is ASCII; nothing where it is not there or may not be read."""
    try:
        return procfs.read(context, path).decode("ascii", "replace")
    except (NoData, OSError):  # no IPv6, `subset=pid`, or a profile that forbids it
        return ""


def total(counters: Counters, names: Iterable[str]) -> int | None:
    """Return the sum of those counters that are there; None where none is."""
    found = [counters[name] for name in names if name in counters]
    return sum(found) if found else None


def parse_table(text: str) -> Counters:
    """Return the counters of snmp and netstat: per group, a line of names and then one of numbers."""
    lines = [line.split() for line in text.splitlines()]
    found: Counters = {}
    for names, numbers in zip(lines[::2], lines[1::2], strict=False):
        if names and names[:1] == numbers[:1]:
            group = names[0].removesuffix(":")
            found |= {group + name: int(number) for name, number in zip(names[1:], numbers[1:], strict=False)}
    return found


def parse_list(text: str) -> Counters:
    """Return the counters of snmp6: a name and a number per line."""
    fields = [line.split() for line in text.splitlines()]
    return {pair[0]: int(pair[1]) for pair in fields if len(pair) == 2}
