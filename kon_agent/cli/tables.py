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

from kon_agent.control_protocol import InterfaceStatus, PluginStatus, ResourceStatus, SpoolStatus, Status
from kon_agent.metric import Metric

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_STEPS = 3
"""Of the governor's latest steps; `--json` has them all."""

PIPE_COLUMNS = 10_000
"""Width where there is no terminal: nothing that is going to be read by a program is cut."""

MIN_HEADING = 4  # of a column of numbers: `RES…` is still known for what it is
MIN_TEXT = 8  # of a text: a state, most of a name

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
    """Print the plugins' table, and below it a line for each plugin that has something to explain.

    A terminal that is wide enough shows more columns behind those that are always there.
    """
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
    wide_columns = [*columns, ">UPTIME", "BREAKER", ">RATE"]
    wide_rows = [
        (*row, _age_or_dash(plugin.uptime_s), plugin.breaker, _rate(plugin.rate_per_s))
        for row, plugin in zip(rows, plugins, strict=True)
    ]
    if _fits(wide_columns, wide_rows, out, indent):
        print_table(wide_columns, wide_rows, out, indent)
    else:
        print_table(columns, rows, out, indent)
    for plugin in plugins:
        for note in _notes(plugin):
            out.print(f"{' ' * indent}{printable(plugin.name)}: {printable(note)}")


def print_plugin(plugin: PluginStatus, out: Console) -> None:
    """Print everything known about one plugin, a line each."""
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(plugin.dropped.items()) if count)
    ring = f"{size(plugin.ring_used_bytes)} of {size(plugin.ring_size_bytes)}"
    every = period(plugin.period_s)
    if plugin.configured_period_s not in (None, plugin.period_s):
        every += f" (configured: {period(plugin.configured_period_s or 0.0)})"
    facts = [
        ("name", plugin.name),
        ("type", plugin.type or plugin.name),
        ("origin", plugin.origin or "-"),
        ("state", plugin.state + ("" if plugin.enabled else " (disabled)")),
        ("detail", plugin.detail or "-"),
        ("pid", _or_dash(plugin.pid)),
        ("uptime", _age_or_dash(plugin.uptime_s)),
        ("period", every),
        ("collect", "-" if plugin.collect_ms is None else f"{plugin.collect_ms:.1f} ms"),
        ("missed ticks", str(plugin.missed_ticks)),
        ("restarts", str(plugin.restarts)),
        ("last exit", plugin.last_exit or "-"),
        *(("death", f"{death.when}  {death.reason}") for death in plugin.deaths),
        ("breaker", plugin.breaker),
        ("priority", _or_dash(plugin.priority)),
        ("memory limit", "-" if plugin.memory_limit_bytes is None else size(plugin.memory_limit_bytes)),
        ("rate", _rate(plugin.rate_per_s)),
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
    out.print(f"server     {printable(server.state)}  {printable(server.address)}{rtt}")
    out.print(f"           since {printable(server.since)}")
    if server.detail:
        out.print(f"           {printable(server.detail)}")
    out.print(f"resources  cpu {used.cpu_percent:.1f}% of a core  memory {size(used.pss_bytes)}  level {used.level}")
    _print_governor(used, out)
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


def _print_governor(used: ResourceStatus, out: Console) -> None:
    """Print what is done to stay within the limits, and the latest steps while anything is."""
    if used.detail:
        limits = f"cpu {used.cpu_limit_percent:g}%  memory {size(used.memory_limit_bytes)}"
        out.print(f"           limits: {limits}; {printable(used.detail)}")
    for step in used.steps[-SHOWN_STEPS:] if used.level != "normal" else ():
        what = f"{step.step} {step.plugin}" if step.plugin else f"periods x{step.factor}"
        out.print(f"           {printable(step.at)} {printable(what)}: {printable(step.reason)}")


def print_metrics(metrics: Iterable[Metric], out: Console) -> None:
    """Print metrics, one per line: name, labels, value."""
    rows = [(metric.name, labels(metric.labels), f"{metric.value:.15g}") for metric in metrics]
    print_table(["NAME", "LABELS", ">VALUE"], rows, out, is_folded=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], out: Console, indent: int = 0, *, is_folded: bool = False
) -> None:
    """Print rows under their headings; a heading that begins with `>` is a column of numbers.

    Columns stand two spaces apart, or one where the terminal is too narrow for that. Where even that is too wide,
    headings of numbers end in an ellipsis first, then texts; numbers last. Where `is_folded`, a text that is too long
    goes on in its next line instead.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    room = out.width - indent
    widths = _widths(columns, cells)
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= room else 1
    table = _table(columns, cells, _narrowed(columns, cells, widths, room - gap * (len(widths) - 1)), gap, is_folded)
    if indent:
        from rich.padding import Padding

        out.print(Padding(table, (0, 0, 0, indent), expand=False), soft_wrap=False)
    else:
        out.print(table, soft_wrap=False)


def _fits(columns: Sequence[str], rows: Sequence[Sequence[str]], out: Console, indent: int) -> bool:
    """Whether a table fits with its columns two spaces apart."""
    return sum(_widths(columns, rows)) + 2 * (len(columns) - 1) <= out.width - indent


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return how wide each column would like to be."""
    from rich.cells import cell_len

    headed = [[column.lstrip(">") for column in columns], *rows]
    return [max(map(cell_len, column)) for column in zip(*headed, strict=True)]


def _narrowed(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: list[int], room: int) -> list[int]:
    """Return widths that fit into `room`, or nearly, the columns being as readable as can be."""
    contents = _widths([">"] * len(columns), rows)
    least = [
        max(content, MIN_HEADING) if column[0] == ">" else MIN_TEXT
        for column, content in zip(columns, contents, strict=True)
    ]
    narrow = list(widths)
    for is_number in (True, False):
        while sum(narrow) > room:
            spare = [
                (narrow[index] - least[index], index)
                for index, column in enumerate(columns)
                if (column[0] == ">") is is_number and narrow[index] > least[index]
            ]
            if not spare:
                break
            narrow[max(spare)[1]] -= 1
    return narrow


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int], gap: int, is_folded: bool
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(
            column.lstrip(">"),
            justify="right" if column.startswith(">") else "left",
            width=width,
            no_wrap=not is_folded,
            overflow="fold" if is_folded else "ellipsis",
        )
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


def _age_or_dash(seconds: float | None) -> str:
    return "-" if seconds is None else age(seconds)


def _rate(per_s: float | None) -> str:
    return "-" if per_s is None else f"{per_s:.1f}/s"


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
