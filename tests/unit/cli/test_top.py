"""The live view: what its rows say, and that the terminal is given back."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from rich.cells import cell_len

from kon_agent.cli.agent import main
from kon_agent.cli.screen import Row, clip, fit
from kon_agent.cli.top import RATE_WINDOW_S, Frame, History, Rates, Sample, rates, view
from kon_agent.control_protocol import (
    InterfaceStatus,
    PluginStatus,
    ResourceStatus,
    Status,
    StepStatus,
    encode_error,
    encode_result,
)
from kon_agent.errors import ControlError
from tests.support.program import environment_of

if TYPE_CHECKING:
    from tests.unit.cli.conftest import FakeAgent

DEADLINE_S = 15.0
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"  # the other screen, xterm's control sequences


def later(status: Status, seconds: float, **changes: object) -> Status:
    """Return the same agent's answer some seconds later, with changes to its first plugin."""
    first, *rest = status.plugins
    plugins = [replace(first, **changes), *rest]
    return replace(status, uptime_s=status.uptime_s + seconds, plugins=plugins)


def text(rows: list[Row]) -> list[str]:
    return [row.text.rstrip() for row in rows]


# ── rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rates_are_differences_over_time(whole: Status, cpu: PluginStatus) -> None:
    """Records a second, between two answers."""
    now = later(whole, 2.0, produced=cpu.produced + 30, acked=cpu.acked + 20, dropped={"ring_full": 1})
    assert Rates(15.0, 10.0, 0.5) == rates(Sample(whole, 100.0), Sample(now, 102.0))["cpu"]


def test_the_first_answer_has_no_rates(whole: Status) -> None:
    """One answer is no difference, and no zero either."""
    assert Rates(None, None, None) == rates(None, Sample(whole, 1.0))["cpu"]


@pytest.mark.parametrize("sign", ["pid", "uptime_s"])
def test_a_restart_of_the_agent_is_no_negative_rate(whole: Status, sign: str) -> None:
    """Another process, or one that is younger than before, has begun to count anew."""
    now = replace(later(whole, 2.0, produced=69_379_300), **{sign: 1})
    assert Rates(None, None, None) == rates(Sample(whole, 1.0), Sample(now, 2.0))["cpu"]


def test_a_counter_that_goes_back_has_no_rate(whole: Status, cpu: PluginStatus) -> None:
    """Whatever the reason: that one counter says nothing, the others do."""
    now = later(whole, 1.0, produced=5, acked=cpu.acked + 1)
    assert Rates(None, 1.0, 0.0) == rates(Sample(whole, 1.0), Sample(now, 2.0))["cpu"]


def test_records_found_in_the_spool_are_not_made_now(whole: Status, cpu: PluginStatus) -> None:
    """What an earlier run has left counts as delivered, not as produced."""
    now = later(whole, 1.0, produced=cpu.produced + 1005, recovered=1000, acked=cpu.acked + 1005)
    assert Rates(5.0, 1005.0, 0.0) == rates(Sample(whole, 1.0), Sample(now, 2.0))["cpu"]


def test_a_new_plugin_has_no_rate_yet(whole: Status, cpu: PluginStatus) -> None:
    """One that was not there before is shown without rates."""
    now = replace(whole, plugins=[*whole.plugins, replace(cpu, name="gpu")])
    assert Rates() == rates(Sample(whole, 1.0), Sample(now, 2.0))["gpu"]


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_rows_tell_everything(whole: Status, cpu: PluginStatus) -> None:
    """The agent, its server, cost, spool and interfaces, each plugin's figures, and what there is to explain."""
    now = later(whole, 10.0, produced=cpu.produced + 30, acked=cpu.acked + 20, ring_used_bytes=131_072)
    assert [
        "kon-agent 9.8.7  edge-1  pid 321  up 1h 2m",
        "server      backoff  quic://localhost:7843",
        "resources   cpu 0.4% of a core  memory 43 MiB  level normal",
        "spool       idle  1.5 KiB of 47.7 MiB  7 records  oldest 1m 1s",
        "interfaces  eth0 generic/tcx",
        "",
        "PLUGIN STATE     PERIOD   REC/S   ACK/S DROPPED RING  COLLECT MISSED",
        "cpu    RUNNING       5s     3.0     2.0       0  50%   0.4 ms      0",
        "memory HALF_OPEN  500ms     0.0     0.0       4   0%        -      0",
        "",
        "server: the server's certificate is not from our CA",
        "warning: not root: nothing is dropped",
    ] == text(view(Sample(whole, 0.0), Sample(now, 10.0), 80))


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
def test_no_row_is_wider_than_the_terminal(whole: Status, cpu: PluginStatus, width: int) -> None:
    """Names of any length and script, numbers of any size."""
    plugins = [
        replace(cpu, name="n" * 300, produced=10**18, dropped={"ring_full": 10**18}, missed_ticks=10**15),
        replace(cpu, name="网络接口" * 9, collect_ms=86_400_000.0, period_s=86_399.0, detail="长" * 300),
    ]
    faces = [InterfaceStatus(name=f"eth{number}", ingress_mode="native", egress_mode="tcx") for number in range(40)]
    now = replace(whole, plugins=plugins, interfaces=faces, agent_id="a" * 300)
    before = replace(now, plugins=[replace(plugin, produced=0) for plugin in plugins])
    assert max(cell_len(row.text) for row in view(Sample(before, 0.0), Sample(now, 1.0), width)) <= width


def test_columns_stay_in_line(whole: Status, cpu: PluginStatus) -> None:
    """At 80 columns a year's figures and the largest rates stand under their headings."""
    busy = replace(cpu, name="a-plugin-of-18-let", produced=9_000_000, dropped={"ring_full": 123_456_789})
    now = replace(whole, plugins=[replace(busy, missed_ticks=9_999_999, collect_ms=59_999.0, ring_used_bytes=262_144)])
    before = replace(whole, plugins=[replace(busy, produced=0, acked=0, dropped={})])
    rows = text(view(Sample(before, 0.0), Sample(now, 1.0), 80))
    heading, row = rows[6:8]
    assert "a-plugin-of-18-let RUNNING       5s   9000k  69379k    123M 100%   60.0 s  9999k" == row
    assert (80, 80) == (len(heading), len(row))


def test_what_is_off_takes_one_line(whole: Status, cpu: PluginStatus) -> None:
    """Disabled plugins are named below the others; one that still has records to deliver is no such."""
    off = PluginStatus(name="load", state="STOPPED", enabled=False, period_s=5.0)
    draining = replace(off, name="time", in_ring=3)
    rows = text(view(None, Sample(replace(whole, plugins=[cpu, off, draining]), 0.0), 80))
    assert "disabled: load" in rows
    assert any(row.startswith("time   STOPPED") for row in rows)


def test_the_limits_and_what_is_done_about_them(whole: Status) -> None:
    """What is used of what is allowed, and the governor's latest step while it holds."""
    step = StepStatus(at="2026-01-02T03:04:05.678Z", step="pause", plugin="disk", factor=4, reason="cpu 3% of 2%")
    used = ResourceStatus(
        cpu_percent=3.0, pss_bytes=1 << 20, level="paused", cpu_limit_percent=2.0, memory_limit_bytes=64 << 20,
        detail="memory is not measured", steps=[step],
    )  # fmt: skip
    rows = view(None, Sample(replace(whole, resources=used), 0.0), 80)
    assert Row("resources   cpu 3.0% of 2%  memory 1 MiB of 64 MiB  level paused", "yellow") == rows[2]
    assert {"limits: memory is not measured", "latest step: pause disk: cpu 3% of 2%"} <= set(text(rows))


def test_trouble_is_coloured(whole: Status, cpu: PluginStatus) -> None:
    """What drops, fills or does not run stands out; what is well does not."""

    def style(plugin: PluginStatus) -> str:
        before = replace(whole, plugins=[replace(plugin, dropped={})])
        return view(Sample(before, 0.0), Sample(replace(whole, plugins=[plugin]), 1.0), 80)[7].style

    assert "" == style(cpu)
    assert "yellow" == style(replace(cpu, dropped={"ring_full": 1}))
    assert "yellow" == style(replace(cpu, ring_used_bytes=200_000))
    assert "yellow" == style(replace(cpu, state="BACKOFF"))
    assert "red" == style(replace(cpu, state="FAILED"))


def test_nothing_writes_to_the_terminal(whole: Status, cpu: PluginStatus) -> None:
    """A worker's words and names hold no control character once they are rows."""
    hostile = "x\x1b[2J\x07\n\u202e"
    now = replace(
        whole, agent_id=hostile, warnings=[hostile], plugins=[replace(cpu, name=hostile, state=hostile, detail=hostile)]
    )
    assert all(row.text.isprintable() for row in view(None, Sample(now, 0.0), 80))


@pytest.mark.parametrize(("shown", "width"), [("abc", 3), ("a…", 2), ("…", 1), ("", 0)])
def test_clip_says_that_something_is_missing(shown: str, width: int) -> None:
    """An ellipsis takes the last cell."""
    assert shown == clip("abc", width)


def test_a_low_screen_says_how_much_is_below() -> None:
    """What does not fit is counted."""
    rows = [Row(str(number)) for number in range(10)]
    assert ["0", "1", "… 8 more lines"] == text(fit(rows, 3))
    assert rows == fit(rows, 10)


# ── the answers over time ─────────────────────────────────────────────────────────────────────────────────────────


class Script:
    """An agent that answers with what is next."""

    def __init__(self, *answers: Status | ControlError) -> None:
        self.answers = list(answers)

    def __call__(self) -> Status:
        answer = self.answers.pop(0)
        if isinstance(answer, ControlError):
            raise answer
        return answer


SILENT = ControlError("timeout", "kon-agent did not answer in time")


def test_silence_is_shown_and_ends_nothing(whole: Status) -> None:
    """The latest answer stays, the reason stands above it, and goes when there is an answer again."""
    history = History(Script(whole, SILENT, later(whole, 2.0)))
    history.look(0.0)
    history.look(1.0)
    assert "no answer: kon-agent did not answer in time" == history.rows(80)[0].text
    assert Frame(5, "kon-agent did not answer in time", {}, None) == history.frame(5)
    history.look(2.0)
    assert history.rows(80)[0].text.startswith("kon-agent 9.8.7")


def test_an_agent_that_never_answered_is_an_error() -> None:
    """There is nothing to show then."""
    with pytest.raises(ControlError):
        History(Script(SILENT)).look(0.0)


def test_rates_reach_back_some_seconds(whole: Status) -> None:
    """Far enough that a plugin with a period of some seconds shows its rate, not its ticks; no further."""
    answers = [later(whole, float(second)) for second in range(31)]
    history = History(Script(*answers))
    for second in range(31):
        history.look(float(second))
    assert history.previous is not None
    assert 30 - RATE_WINDOW_S == pytest.approx(history.previous.at_s, abs=1)


def test_a_restarted_agent_begins_anew(whole: Status) -> None:
    """No rate reaches over the restart."""
    history = History(Script(whole, replace(whole, pid=7, uptime_s=0.1)))
    history.look(0.0)
    history.look(1.0)
    assert None is history.previous


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_once_is_plain(agent: FakeAgent, whole: Status) -> None:
    """One frame of text, with rates, for pipes and tests; so it is wherever there is no terminal."""
    answers = iter(later(whole, second / 10, produced=69_379_200 + second) for second in range(10))
    agent.reply = lambda _: encode_result(next(answers))
    for arguments in (["top", "--once"], ["top"]):
        shown = CliRunner().invoke(main, [*arguments, "--interval", "0.1"])
        assert 0 == shown.exit_code
        assert "\x1b" not in shown.output
        assert ["cpu", "RUNNING", "5s"] == shown.output.splitlines()[7].split()[:3]
        assert "-" != shown.output.splitlines()[7].split()[3]


def test_json_is_an_object_per_interval(agent: FakeAgent, whole: Status) -> None:
    """Each with the status as `status --json` has it, and the rates."""
    agent.reply = lambda _: encode_result(whole)
    shown = CliRunner().invoke(main, ["top", "--json", "--once", "--interval", "0.1"])
    frame = json.loads(shown.output)
    assert list(Frame.__struct_fields__) == list(frame)
    assert set(Status.__struct_fields__) == set(frame["status"])
    assert {"produced_per_s": 0.0, "acked_per_s": 0.0, "dropped_per_s": 0.0} == frame["rates"]["cpu"]


def test_no_agent_is_an_error(tmp_path: str) -> None:
    """As for every other command."""
    shown = CliRunner().invoke(main, ["top", "--socket", f"{tmp_path}/none.sock"])
    assert (1, True) == (shown.exit_code, "no kon-agent answers on" in shown.output)


# ── the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """A program, `kon-agent top` by default, on a terminal of the test's own."""

    def __init__(self, *arguments: str) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(80, 24)
        self.modes = termios.tcgetattr(self._slave)
        self.said = b""
        self.process = subprocess.Popen(
            [sys.executable, *(arguments or ("-m", "kon_agent.cli.agent", "top", "--interval", "0.1"))],
            env=environment_of(TERM="xterm-256color"),
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C and a new size are its signals
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read_until(self, is_there: Callable[[bytes], bool]) -> None:
        """Read what is written to the terminal until it is there."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_there(self.said):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0.0, left))
            assert ready, f"not within {DEADLINE_S} s; last seen: {self.said[-500:]!r}"
            self.said += os.read(self._master, 1 << 16)

    def end(self) -> int:
        """Wait for its end, reading on meanwhile; return its exit code."""
        self.read_until(lambda said: LEAVE in said)
        return self.process.wait(DEADLINE_S)

    def is_as_before(self) -> bool:
        """Whether the line discipline is what it was."""
        return termios.tcgetattr(self._slave) == self.modes

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    shown = Terminal(*arguments)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize("way", ["q", "Ctrl-C", "SIGTERM"])
def test_the_terminal_is_given_back(agent: FakeAgent, whole: Status, way: str) -> None:
    """Whatever ends it: the other screen is left, the cursor is there, lines are lines again."""
    agent.reply = lambda _: encode_result(whole)
    with terminal() as shown:
        shown.read_until(lambda said: b"HALF_OPEN" in said)
        assert ENTER in shown.said
        assert not shown.is_as_before()
        if way == "SIGTERM":
            shown.process.send_signal(signal.SIGTERM)
        else:
            shown.press(b"q" if way == "q" else b"\x03")
        assert (143 if way == "SIGTERM" else 0) == shown.end()
        assert shown.said.rindex(ENTER) < shown.said.rindex(LEAVE)
        assert shown.said.rindex(b"\x1b[?25l") < shown.said.rindex(b"\x1b[?25h")  # the cursor, hidden and shown
        assert shown.is_as_before()


FAILS = """
from kon_agent.cli.screen import Row, Screen
with Screen() as screen:
    screen.draw([Row("here")])
    raise RuntimeError("a mistake of ours")
"""


def test_an_error_gives_the_terminal_back_first() -> None:
    """Its traceback is read on the screen that was there before."""
    with terminal("-c", FAILS) as shown:
        shown.read_until(lambda said: b"RuntimeError: a mistake of ours" in said)
        assert 1 == shown.process.wait(DEADLINE_S)
        assert shown.said.index(b"here") < shown.said.index(LEAVE) < shown.said.index(b"Traceback")
        assert shown.is_as_before()


def test_an_agent_that_is_away_is_waited_for(agent: FakeAgent, whole: Status) -> None:
    """The reason is shown, and the view goes on with the next answer."""
    refusal = encode_error(ControlError("failed", "not now"))
    agent.reply = lambda _: encode_result(whole) if len(agent.requests) < 3 else refusal
    with terminal() as shown:
        shown.read_until(lambda said: b"no answer: not now" in said)
        agent.reply = lambda _: encode_result(replace(whole, agent_id="back-again"))
        shown.read_until(lambda said: b"back-again" in said)
        shown.press(b"q")
        assert 0 == shown.end()


def test_a_resized_terminal_is_filled_anew(agent: FakeAgent, whole: Status) -> None:
    """A narrower one cuts, a lower one counts what is below."""
    agent.reply = lambda _: encode_result(whole)
    with terminal() as shown:
        shown.read_until(lambda said: b"HALF_OPEN" in said)
        shown.resize(60, 5)
        shown.read_until(lambda said: b"more lines" in said)
        shown.press(b"q")
        assert 0 == shown.end()
