"""How the command line shows things to people: plain columns, a line per row, alike with and without colour.

Invariants: numbers are exact; nothing wraps inside a column: what does not fit a column of the plugins table
stands in full below it; whatever comes from elsewhere is stripped of control characters first, so that no
error message of a worker can write to a terminal. rich is imported on first use: it costs more than the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TextIO

from kon_agent.control_protocol import InterfaceStatus, PluginStatus, SpoolStatus, Status
from kon_agent.metric import Metric

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS = 10_000
"""Width where there is no terminal: nothing that is going to be read by a program is cut."""

_COLOURS = {
    "running": "green",
    "connected": "green",
    "backoff": "yellow",
    "half_open": "yellow",
    "failed": "red",
}


def console(file: TextIO | None = None) -> Console:
    """Return the console for `file` (default: standard output), with colours only on a terminal."""
    from rich.console import Console

    out = file or sys.stdout
    width = None if out.isatty() else PIPE_COLUMNS
    return Console(file=out, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_plugins(plugins: Sequence[PluginStatus], out: Console, indent: int = 0) -> None:
    """Print the plugins' table, and below it a line for each plugin that has something to explain."""
    rows = [
        (
            plugin.name,
            "DISABLED" if plugin.state == "STOPPED" and not plugin.enabled else plugin.state,
            _or_dash(plugin.pid),
            period(plugin.period_s),
            str(plugin.restarts),
            _short_exit(plugin.last_exit),
            str(plugin.produced),
            str(plugin.acked),
            str(sum(plugin.dropped.values())),
        )
        for plugin in plugins
    ]
    columns = [
        "NAME",
        "STATE",
        ">PID",
        ">PERIOD",
        ">RESTARTS",
        "LAST-EXIT",
        ">PRODUCED",
        ">ACKED",
        ">DROPPED",
    ]
    print_table(columns, rows, out, indent)
    for plugin in plugins:
        for note in _notes(plugin):
            out.print(f"{' ' * indent}{printable(plugin.name)}: {printable(note)}")


def print_plugin(plugin: PluginStatus, out: Console) -> None:
    """Print everything known about one plugin, a line each."""
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(plugin.dropped.items()) if count)
    ring = f"{size(plugin.ring_used_bytes)} of {size(plugin.ring_size_bytes)}"
    facts = [
        ("name", plugin.name),
        ("state", plugin.state + ("" if plugin.enabled else " (disabled)")),
        ("detail", plugin.detail or "-"),
        ("pid", _or_dash(plugin.pid)),
        ("uptime", "-" if plugin.uptime_s is None else age(plugin.uptime_s)),
        ("period", period(plugin.period_s)),
        ("collect", "-" if plugin.collect_ms is None else f"{plugin.collect_ms:.1f} ms"),
        ("missed ticks", str(plugin.missed_ticks)),
        ("restarts", str(plugin.restarts)),
        ("last exit", plugin.last_exit or "-"),
        ("breaker", plugin.breaker),
        ("produced", str(plugin.produced)),
        ("acked", str(plugin.acked)),
        ("in flight", str(plugin.in_flight)),
        ("in ring", f"{plugin.in_ring} ({ring})"),
        ("spooled", str(plugin.spooled)),
        ("dropped", lost or "0"),
    ]
    for key, value in facts:
        out.print(f"{key:<14}{printable(value)}")


def print_status(status: Status, out: Console) -> None:
    """Print the whole agent on a screen: itself, its server, plugins, interfaces, resources, warnings."""
    server, used = status.server, status.resources
    name, up = printable(status.agent_id), age(status.uptime_s)
    out.print(f"kon-agent {status.version}  {name}  pid {status.pid}  up {up}")
    rtt = "" if server.rtt_ms is None else f"  rtt {server.rtt_ms:.1f} ms"
    out.print(f"server     {printable(server.state)}  {printable(server.address)}  since {server.since}{rtt}")
    if server.detail:
        out.print(f"           {printable(server.detail)}")
    out.print(f"resources  cpu {used.cpu_percent:.1f}% of a core  memory {size(used.pss_bytes)}  level {used.level}")
    out.print(f"spool      {_spool(status.spool)}")
    if status.spool.detail:
        out.print(f"           {printable(status.spool.detail)}")
    out.print("plugins")
    print_plugins(status.plugins, out, indent=2)
    if status.interfaces:
        out.print("interfaces")
        _print_interfaces(status.interfaces, out)
    for warning in status.warnings:
        out.print(f"warning: {printable(warning)}", style="yellow")


def print_metrics(metrics: Iterable[Metric], out: Console) -> None:
    """Print metrics, one per line: name, labels, value."""
    rows = [(metric.name, labels(metric.labels), f"{metric.value:.15g}") for metric in metrics]
    print_table(["NAME", "LABELS", ">VALUE"], rows, out)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], out: Console, indent: int = 0) -> None:
    """Print rows under their headings; a heading that begins with `>` is a column of numbers.

    Columns stand two spaces apart, or one where the terminal is too narrow for that; what is too wide even
    then ends in an ellipsis.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    table = _table(columns, cells, gap=2)
    unbounded = out.options.update(width=PIPE_COLUMNS)  # a measurement never exceeds the width it is given
    if out.measure(table, options=unbounded).maximum > out.width - indent:
        table = _table(columns, cells, gap=1)
    if indent:
        from rich.padding import Padding

        out.print(Padding(table, (0, 0, 0, indent), expand=False), soft_wrap=False)
    else:
        out.print(table, soft_wrap=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], gap: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell.lower(), "")) for cell in row))
    return table


def _print_interfaces(interfaces: Sequence[InterfaceStatus], out: Console) -> None:
    rows = [(face.name, face.ingress_mode, face.egress_mode) for face in interfaces]
    print_table(["NAME", "INGRESS", "EGRESS"], rows, out, indent=2)
    for face in interfaces:
        for way, reason in (("ingress", face.ingress_reason), ("egress", face.egress_reason)):
            if reason:
                out.print(f"  {printable(face.name)} {way}: {printable(reason)}")


def _spool(spool: SpoolStatus) -> str:
    room = f"{size(spool.bytes)} of {size(spool.max_bytes)}"
    oldest = "" if spool.oldest_age_s is None else f"  oldest {age(spool.oldest_age_s)}"
    return f"{spool.mode}  {room}  {spool.records} records in {spool.segments} segments{oldest}"


def _short_exit(last_exit: str | None) -> str:
    """`SIGKILL` for `killed by SIGKILL`, `exit 70` for `exit 70: ImportError: …`: a column's worth."""
    if last_exit is None:
        return "-"
    return last_exit.removeprefix("killed by ").partition(":")[0]


def _notes(plugin: PluginStatus) -> list[str]:
    notes = [plugin.detail] if plugin.detail else []
    last = plugin.last_exit or ""
    if ":" in last and last not in plugin.detail:  # the column shows what stands before the colon
        notes.append(f"last {last}")
    return notes


def labels(pairs: Mapping[str, str]) -> str:
    """Return labels as `key=value`, space-separated, in the order of their keys."""
    return " ".join(f"{key}={value}" for key, value in sorted(pairs.items()))


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def printable(text: str) -> str:
    """Return `text` with every control character replaced by a space."""
    return "".join(char if char.isprintable() else " " for char in text)


def size(count: int) -> str:
    """Return bytes as people read them: `512 B`, `256 KiB`, `47.7 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def period(seconds: float) -> str:
    """Return a period as the configuration writes it: `100ms`, `5s`, `1.5s`, `2m`."""
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    if seconds >= 60 and seconds % 60 == 0:
        return f"{seconds / 60:g}m"
    return f"{seconds:g}s"


def age(seconds: float) -> str:
    """Return a length of time by its two largest units: `42s`, `3m 5s`, `2h 10m`, `7d 3h`."""
    left = int(seconds)
    for (unit, length), (smaller, step) in pairwise((("d", 86400), ("h", 3600), ("m", 60), ("s", 1))):
        if left >= length:
            rest = left % length // step
            return f"{left // length}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{left}s"
