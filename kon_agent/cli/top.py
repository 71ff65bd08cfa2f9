"""The command `kon-agent top`: the running agent on one screen, drawn again each second.

Pure: `rates` and `view` make the rows from two answers of the control socket; they draw nothing and ask no clock.
Thin: the loop that asks, draws and waits; the terminal itself is `screen`'s.

Invariants: a rate is never negative: where a counter went back (the agent was restarted) there is none; a line never
exceeds the width; nothing printed can write to the terminal; an agent that does not answer ends nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import msgspec

from kon_agent import clock
from kon_agent.cli import client, target
from kon_agent.cli.screen import Row, Screen, clip, fit, width_of
from kon_agent.cli.tables import age, period, printable, size
from kon_agent.control_protocol import InterfaceStatus, Op, PluginStatus, Request, ResourceStatus, Status
from kon_agent.errors import ControlError

RATE_WINDOW_S = 10.0  # rates are over so long, or a plugin with a period of 5 s would show 0, 0, 0, 0, 60
ANSWER_TIMEOUT_S = 2.0  # an agent that takes longer is shown as silent: keys wait for the answer meanwhile
MIN_WIDTH = 40  # below this nothing can be laid out; lines are cut
MIN_INTERVAL_S = 0.1  # ten questions a second cost the agent more than what they show

Ask = Callable[[], Status]


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer, and when it came: seconds of any clock that does not step."""

    status: Status
    at_s: float


class Rates(msgspec.Struct, frozen=True):
    """One plugin's records per second; None where two answers do not say."""

    produced_per_s: float | None = None
    acked_per_s: float | None = None
    dropped_per_s: float | None = None


class Frame(msgspec.Struct, frozen=True):
    """What `--json` prints, one object per interval.

    Attributes:
        ts_ns: when, nanoseconds since the epoch.
        error: why there is no answer; empty where there is one.
        rates: by plugin, over the last 10 s at most.
        status: as `kon-agent status --json` prints it; None where there is no answer.
    """

    ts_ns: int
    error: str
    rates: dict[str, Rates]
    status: Status | None


# ── two answers become rows ───────────────────────────────────────────────────────────────────────────────────────


def rates(previous: Sample | None, current: Sample) -> dict[str, Rates]:
    """Return each plugin's rates between two answers; none from before the agent's start."""
    if previous is None or not _is_same_run(previous.status, current.status):
        return {plugin.name: Rates() for plugin in current.status.plugins}
    seconds = current.at_s - previous.at_s
    before = {plugin.name: plugin for plugin in previous.status.plugins}
    found = {}
    for now in current.status.plugins:
        then = before.get(now.name)
        found[now.name] = Rates() if then is None else Rates(
            _rate(then.produced - then.recovered, now.produced - now.recovered, seconds),  # made now, not found
            _rate(then.acked, now.acked, seconds),
            _rate(sum(then.dropped.values()), sum(now.dropped.values()), seconds),
        )  # fmt: skip
    return found


def _is_same_run(then: Status, now: Status) -> bool:
    return then.pid == now.pid and then.uptime_s <= now.uptime_s  # in a container the process id is always the same


def _rate(then: int, now: int, seconds: float) -> float | None:
    return (now - then) / seconds if now >= then and seconds > 0 else None


def view(previous: Sample | None, current: Sample, width: int) -> list[Row]:
    """Return the screen's rows, each at most `width` cells wide.

    Args:
        previous: an earlier answer to take the rates from; None: there are none yet.
        current: what to show.
        width: of the terminal, in cells.
    """
    status = current.status
    server, used, spool = status.server, status.resources, status.spool
    rtt = "" if server.rtt_ms is None else f"  rtt {server.rtt_ms:.1f} ms"
    waiting = f"  {spool.records} records" if spool.records else ""
    oldest = "" if spool.oldest_age_s is None else f"  oldest {age(spool.oldest_age_s)}"
    rows = [
        Row(f"kon-agent {status.version}  {status.agent_id}  pid {status.pid}  up {age(status.uptime_s)}", "bold"),
        Row(f"server      {server.state}{rtt}  {server.address}", _state_style(server.state)),
        Row(f"resources   {_resources(used)}", "" if used.level == "normal" else "yellow"),
        Row(f"spool       {spool.mode}  {size(spool.bytes)} of {size(spool.max_bytes)}{waiting}{oldest}"),
    ]
    if status.interfaces:
        rows.append(Row(f"interfaces  {_interfaces(status.interfaces)}"))
    rows += [Row(""), *_plugin_rows(status.plugins, rates(previous, current), width)]
    rows += _notes(status, width)
    return [Row(clip(row.text, width), row.style) for row in rows]


def _notes(status: Status, width: int) -> list[Row]:
    """Return what there is to explain, wrapped: why something is not as it should be is worth its lines."""
    used = status.resources
    explained = [("server", status.server.detail), ("spool", status.spool.detail), ("limits", used.detail)]
    if used.steps and used.level != "normal":
        step = used.steps[-1]
        explained.append(("latest step", f"{step.step} {step.plugin or 'all'}: {step.reason}"))
    explained += [(plugin.name, plugin.detail) for plugin in status.plugins]
    explained += [("warning", warning) for warning in status.warnings]
    texts = [f"{what}: {detail}" for what, detail in explained if detail]
    wrapped = [textwrap.wrap(printable(text), max(MIN_WIDTH, width), subsequent_indent="  ") for text in texts]
    rows = [Row(line, "yellow") for lines in wrapped for line in lines]
    return [Row(""), *rows] if rows else []


def _resources(used: ResourceStatus) -> str:
    of_cpu = f"{used.cpu_limit_percent:g}%" if used.cpu_limit_percent else "a core"
    of_memory = f" of {size(used.memory_limit_bytes)}" if used.memory_limit_bytes else ""
    return f"cpu {used.cpu_percent:.1f}% of {of_cpu}  memory {size(used.pss_bytes)}{of_memory}  level {used.level}"


def _interfaces(faces: Sequence[InterfaceStatus]) -> str:
    return "  ".join(f"{face.name} {face.ingress_mode}/{face.egress_mode}" for face in faces)


_COLUMNS = ("STATE", ">PERIOD", ">REC/S", ">ACK/S", ">DROPPED", ">RING", ">COLLECT", ">MISSED")
_WIDTHS = (9, 6, 7, 7, 7, 4, 8, 6)  # with the gaps 62: at 80 columns 18 are left for the name


def _plugin_rows(plugins: Sequence[PluginStatus], by_name: dict[str, Rates], width: int) -> list[Row]:
    off = [plugin.name for plugin in plugins if _is_off(plugin)]
    plugins = [plugin for plugin in plugins if not _is_off(plugin)]
    longest = max([len("PLUGIN"), *(width_of(plugin.name) for plugin in plugins)])
    room = max(MIN_WIDTH, width) - sum(_WIDTHS) - len(_WIDTHS)
    name_width = max(len("PLUGIN"), min(longest, room))
    rows = [Row(_columns(["PLUGIN", *_COLUMNS], name_width), "bold")]
    for plugin in plugins:
        rate = by_name.get(plugin.name, Rates())
        lost = sum(plugin.dropped.values())
        fill = plugin.ring_used_bytes / plugin.ring_size_bytes if plugin.ring_size_bytes else 0.0
        cells = [
            plugin.name,
            plugin.state,
            f">{period(plugin.period_s)}",
            f">{_per_second(rate.produced_per_s)}",
            f">{_per_second(rate.acked_per_s)}",
            f">{_count(lost)}",
            f">{fill:.0%}",
            f">{_milliseconds(plugin.collect_ms)}",
            f">{_count(plugin.missed_ticks)}",
        ]
        rows.append(Row(_columns(cells, name_width), _plugin_style(plugin.state, rate, fill)))
    return [*rows, Row(f"disabled: {', '.join(off)}", "dim")] if off else rows


def _is_off(plugin: PluginStatus) -> bool:
    """Whether there is nothing to see: disabled, ended and drained."""
    return plugin.state == "STOPPED" and not plugin.enabled and not plugin.in_ring and not plugin.in_flight


def _columns(cells: Sequence[str], name_width: int) -> str:
    """Return cells side by side; one that begins with `>` stands at the right of its column."""
    parts = [
        " " * max(0, width - width_of(cell) + 1) + cell[1:] if cell.startswith(">") else clip(cell, width, pad=True)
        for cell, width in zip(cells, (name_width, *_WIDTHS), strict=True)
    ]
    return " ".join(parts)


def _plugin_style(state: str, rate: Rates, fill: float) -> str:
    return "yellow" if rate.dropped_per_s or fill > 0.5 else _state_style(state)


def _state_style(state: str) -> str:
    return {"failed": "red", "refused": "red", "running": "", "connected": ""}.get(state.lower(), "yellow")


def _milliseconds(time_ms: float | None) -> str:
    if time_ms is None:
        return "-"
    return f"{time_ms:.1f} ms" if time_ms < 999.95 else f"{time_ms / 1000:.1f} s"


def _per_second(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1f}" if rate < 9_999.95 else _count(int(rate))


def _count(number: int) -> str:
    """Return a count in six characters: as it is, or in thousands, millions and so on."""
    if number < 1_000_000:
        return str(number)
    power = (len(str(number)) - 3) // 3
    return f"{number // 1000**power}{'kMGTPE'[power - 1]}"


# ── asking again and again ────────────────────────────────────────────────────────────────────────────────────────


class History:
    """The answers of the last RATE_WINDOW_S, and what went wrong with the latest question.

    Args:
        ask: asks the agent.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._samples: deque[Sample] = deque()
        self.error = ""

    def look(self, now_s: float) -> None:
        """Ask; keep the answer, or why there is none.

        Raises:
            ControlError: there has never been an answer.
        """
        try:
            status = self._ask()
        except ControlError as err:
            if not self._samples:
                raise
            self.error = str(err)
            return
        self.error = ""
        if self._samples and not _is_same_run(self._samples[-1].status, status):
            self._samples.clear()
        self._samples.append(Sample(status, now_s))
        while len(self._samples) > 2 and self._samples[1].at_s < now_s - RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def previous(self) -> Sample | None:
        """The answer to take rates from."""
        return self._samples[0] if len(self._samples) > 1 else None

    def rows(self, width: int) -> list[Row]:
        """Return what to show now."""
        rows = view(self.previous, self._samples[-1], width)
        if self.error:
            rows.insert(0, Row(clip(f"no answer: {self.error}", width), "bold red"))
        return rows

    def frame(self, ts_ns: int) -> Frame:
        """Return what a program reads now."""
        if self.error:
            return Frame(ts_ns, self.error, {}, None)
        current = self._samples[-1]
        return Frame(ts_ns, "", rates(self.previous, current), current.status)


def run(ask: Ask, interval_s: float) -> int:
    """Show the agent on the terminal until `q`, Ctrl-C or SIGTERM; return the exit code.

    Raises:
        ControlError: there was no answer at all.
    """
    history = History(ask)
    history.look(time.monotonic())
    due_s = time.monotonic() + min(interval_s, 1.0)  # the first rates come within a second
    while True:
        with Screen() as screen:
            told = _watch(screen, history, interval_s, due_s)
        if told != signal.SIGTSTP:
            return 0 if told == signal.SIGINT else 128 + told
        os.kill(os.getpid(), signal.SIGSTOP)  # the terminal is the shell's again; SIGCONT brings us back here


def _watch(screen: Screen, history: History, interval_s: float, due_s: float) -> int:
    while True:
        columns, lines = screen.size
        screen.draw(fit(history.rows(columns), lines))
        told = screen.wait(due_s - time.monotonic())
        if told is not None and told != signal.SIGWINCH:
            return told
        if (now_s := time.monotonic()) >= due_s:
            history.look(now_s)
            due_s = max(due_s + interval_s, time.monotonic())


def _print_once(ask: Ask, interval_s: float) -> None:
    """Print one frame with its rates, which take two answers."""
    history = History(ask)
    history.look(time.monotonic())
    time.sleep(interval_s)
    history.look(time.monotonic())
    for row in history.rows(shutil.get_terminal_size().columns):
        click.echo(row.text.rstrip())


def _print_json(ask: Ask, interval_s: float, is_once: bool) -> None:
    history = History(ask)
    while True:
        started_s = time.monotonic()
        history.look(started_s)
        if not is_once or history.previous is not None:
            sys.stdout.buffer.write(msgspec.json.encode(history.frame(clock.wall_ns())) + b"\n")
            sys.stdout.buffer.flush()
            if is_once:
                return
        time.sleep(max(0.0, started_s + interval_s - time.monotonic()))


@click.command()
@click.option(
    "--interval",
    "interval_s",
    type=target.Seconds(min=MIN_INTERVAL_S),
    default=1.0,
    metavar="SECONDS",
    help="Between two looks. Default: 1.",
)
@click.option("--once", "is_once", is_flag=True, help="Print one plain frame and end, as without a terminal.")
@target.control_options
def top(interval_s: float, is_once: bool, socket_path: str | None, config_file: str | None, as_json: bool) -> None:
    """Watch the agent live; q or Ctrl-C ends it. With --json: one object per interval."""
    path = target.socket_path(socket_path, config_file)

    def ask() -> Status:
        return client.call(path, Request(op=Op.STATUS), Status, ANSWER_TIMEOUT_S)

    try:
        if as_json:
            _print_json(ask, interval_s, is_once)
        elif is_once or not sys.stdout.isatty():
            _print_once(ask, interval_s)
        else:
            sys.exit(run(ask, interval_s))
    except KeyboardInterrupt:
        pass  # the usual way to end it
    except BrokenPipeError:  # `top --json | head`; do not let the interpreter complain of it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
