"""Programs that print metrics, outside any sandbox: how they are run, judged and told of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kon_agent import clock
from kon_agent.breaker import MAX_FAILURES
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Duration, ExecConfig
from kon_agent.errors import KonError
from kon_agent.plugins.context import Context
from kon_agent.plugins.exec import MAX_ERROR_LINES, STREAM_STEADY_S, Exec
from tests.support.waiting import wait_for


class Clock:
    """The scheduling clock, which can be moved on."""

    def __init__(self) -> None:
        self.offset_ns = 0

    def now_ns(self) -> int:
        """Return the time."""
        return clock.now_ns() + self.offset_ns

    def pass_s(self, seconds: float) -> None:
        """Let so many seconds have passed."""
        self.offset_ns += int(seconds * NS_PER_S)


@pytest.fixture
def time() -> Clock:
    """Return the clock of the collectors of this test."""
    return Clock()


Make = Callable[..., Exec]


@pytest.fixture
def make(tmp_path: Path, time: Clock) -> Iterator[Make]:
    """Return what makes a collector that runs a shell script; none is left running."""
    made: list[Exec] = []

    def make(script: str, **settings: Any) -> Exec:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        config = ExecConfig(**{"command": [str(program)], "timeout": Duration(20.0), **settings})
        made.append(Exec(config, Context(now_ns=time.now_ns)))
        made[-1].start()
        return made[-1]

    yield make
    for collector in made:
        collector.stop()


def values(collector: Exec) -> dict[str, float]:
    """Return one cycle's values by name."""
    return {metric.name: metric.value for metric in collector.collect()}


# ── oneshot ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_goes_well(make: Make) -> None:
    """Its metrics, and what is always told of it."""
    found = values(make("echo 'up 1'"))
    assert 0 < found.pop("exec_duration_seconds") < 20
    assert {
        "up": 1.0,
        "exec_success": 1.0,
        "exec_exit_code": 0.0,
        "exec_rejected_lines_total": 0.0,
        "exec_breaker_open": 0.0,
    } == found


def test_every_cycle_is_a_run(make: Make, tmp_path: Path) -> None:
    """Each collect starts it once."""
    collector = make(f"echo x >>{tmp_path}/runs; echo runs $(wc -l <{tmp_path}/runs)")
    assert [1.0, 2.0, 3.0] == [values(collector)["runs"] for _ in range(3)]


def test_the_line_protocol(make: Make) -> None:
    """`format: influx` reads that, and counts the fields that are text."""
    found = values(make("echo 'disk used=5i,label=\"x\"'", format="influx"))
    assert (5.0, 1.0, 1.0) == (found["disk_used"], found["exec_skipped_fields_total"], found["exec_success"])


def test_its_surroundings(make: Make) -> None:
    """The environment is PATH, LANG and what is configured; the folder is /, the input empty."""
    script = 'read line; echo "at{input=\\"$line\\",pwd=\\"$(pwd)\\",a=\\"$A\\",home=\\"$HOME\\"} 1"'
    [metric] = [metric for metric in make(script, environment={"A": "b"}).collect() if metric.name == "at"]
    assert {"input": "", "pwd": "/", "a": "b", "home": ""} == metric.labels


def test_a_failing_program_is_told_once(make: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """What it printed counts all the same; the log has the reason once, and that it is over."""
    collector = make(f"echo up 1; test -e {tmp_path}/well || exit 3")
    caplog.set_level("INFO")
    for found in (values(collector), values(collector)):
        assert (1.0, 0.0, 3.0) == (found["up"], found["exec_success"], found["exec_exit_code"])
    (tmp_path / "well").touch()
    assert 1.0 == values(collector)["exec_success"]
    assert ["exited with 3", "works again"] == [message.partition(" ")[2] for message in caplog.messages]


def test_a_line_cut_short_by_a_crash_does_not_count(make: Make) -> None:
    """Without its newline it may be half a number; of a program that ended well it is taken."""
    assert "up" not in values(make("printf 'up 1'; exit 1"))
    assert 1.0 == values(make("printf 'up 1'"))["up"]


def test_a_program_that_is_not_there(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """It counts as failed, without an exit code; the log says why."""
    found = values(make("", command=["/no/such/program"]))
    assert (0.0, False) == (found["exec_success"], "exec_exit_code" in found)
    assert "could not be started" in caplog.text
    assert "No such file" in caplog.text


def test_a_program_replaced_by_one_that_may_not_run(make: Make) -> None:
    """A sandbox is made for the files of its time: the worker ends, and the next one's fits."""
    collector = make("echo up 1")
    values(collector)
    os.chmod(collector._config.command[0], 0o644)
    with pytest.raises(KonError, match="can no longer be run"):
        values(collector)


def test_output_that_cannot_be_read_at_all(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Some bad lines are counted; nothing but bad lines is a failure."""
    collector = make("echo up 1; echo '!'")
    assert [(1.0, 1.0), (1.0, 2.0)] == [
        (found["exec_success"], found["exec_rejected_lines_total"]) for found in (values(collector), values(collector))
    ]
    assert 1 == caplog.text.count("line 2: ")
    assert 0.0 == values(make("echo hello, world"))["exec_success"]


def test_no_output_is_no_failure(make: Make) -> None:
    """A program may have nothing to tell."""
    assert 1.0 == values(make(":"))["exec_success"]


def test_at_its_timeout_the_whole_group_is_killed(make: Make, tmp_path: Path) -> None:
    """Children included; what it had printed counts."""
    pids = tmp_path / "pids"
    found = values(make(f"sleep 1000 & echo $! $$ >{pids}; echo up 1; sleep 1000", timeout=Duration(0.4)))
    assert (1.0, 0.0, -9.0) == (found["up"], found["exec_success"], found["exec_exit_code"])
    assert 0.4 <= found["exec_duration_seconds"] < 10
    for pid in pids.read_text().split():
        wait_for(lambda: not is_alive(int(pid)), f"process {pid} is gone")  # noqa: B023 - called here


def test_a_closed_output_is_no_end(make: Make) -> None:
    """A program that closes its output and goes on is waited for."""
    assert 7.0 == values(make("echo up 1; exec >&- 2>&-; sleep 0.2; exit 7"))["exec_exit_code"]


def test_a_background_process_is_no_reason_to_wait(make: Make) -> None:
    """It holds the output open, and is ended."""
    found = values(make("sleep 1000 & echo up 1"))
    assert (1.0, 1.0) == (found["up"], found["exec_success"])
    assert found["exec_duration_seconds"] < 10


def test_too_much_output_ends_it(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """After a megabyte it is killed; the lines until then are read, within their bound."""
    found = values(make("while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1; done"))
    assert (0.0, -9.0) == (found["exec_success"], found["exec_exit_code"])
    assert "printed more than 1048576 bytes" in caplog.text


def test_its_errors_are_logged_within_bounds(make: Make, time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Some lines a minute, without what a terminal would obey, each cut; the rest is counted."""
    script = "printf '\\033[2J%01000d\\n' 1 >&2; for n in $(seq 5000); do echo $n; done >&2"
    collector = make(script)
    values(collector)
    lines = list(caplog.messages)
    assert MAX_ERROR_LINES == len(lines)
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    values(collector)
    assert MAX_ERROR_LINES == len(caplog.messages)
    time.pass_s(61)
    values(collector)
    assert f"wrote {2 * 5001 - MAX_ERROR_LINES} more lines" in caplog.text


# ── the breaker ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_program_that_keeps_failing_rests(make: Make, time: Clock, tmp_path: Path) -> None:
    """After so many failures it is not run until a rest is over; then once, and if that goes well, again always."""
    runs = tmp_path / "runs"
    collector = make(f"echo x >>{runs}; test -e {tmp_path}/well")
    assert [0.0] * (MAX_FAILURES - 1) + [1.0] * 3 == [
        values(collector)["exec_breaker_open"] for _ in range(MAX_FAILURES + 2)
    ]
    assert MAX_FAILURES == runs.read_text().count("x")
    assert "exec_exit_code" not in values(collector)
    time.pass_s(300)
    assert 1.0 == values(collector)["exec_breaker_open"]
    assert MAX_FAILURES + 1 == runs.read_text().count("x")
    (tmp_path / "well").touch()
    time.pass_s(300)
    for _ in range(3):
        found = values(collector)
        assert (1.0, 0.0) == (found["exec_success"], found["exec_breaker_open"])


# ── stream ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_read_as_it_comes(make: Make, tmp_path: Path) -> None:
    """It is started once; each cycle takes the lines there are, whole ones only."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    collector = make(f"echo a 1; printf 'b '; read x <{gate}; echo 2; read x <{gate}", mode="stream")
    seen: dict[str, float] = {}

    def has(name: str) -> bool:
        seen.update(values(collector))
        return name in seen

    wait_for(lambda: has("a"), "the first line has come")
    assert (False, 1.0) == ("b" in seen, seen["exec_success"])
    gate.write_text("go on\n")
    wait_for(lambda: has("b"), "the second line has come")
    assert 2.0 == seen["b"]
    collector.stop()


def test_a_stream_that_ends_is_started_again_later(make: Make, time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Its last lines count, its end is told, and it waits before it runs again."""
    collector = make("echo up 1", mode="stream")
    seen: dict[str, float] = {}

    def has_ended() -> bool:
        seen.update(values(collector))
        return seen["exec_success"] == 0.0

    wait_for(has_ended, "the stream has ended")
    assert (1.0, 0.0) == (seen["up"], seen["exec_exit_code"])
    assert "ended, as a stream should not" in caplog.text
    seen.clear()
    time.pass_s(61)
    wait_for(has_ended, "the stream has run again")
    assert 1.0 == seen["up"]


def test_a_steady_stream_is_forgiven(make: Make, time: Clock) -> None:
    """One that has run for long and still prints counts as well, whatever was before."""
    collector = make("while echo up 1; do sleep 0.01; done", mode="stream")
    collector._breaker.failed(time.now_ns())
    collector._note("exited with 1")
    wait_for(lambda: "up" in values(collector), "it prints")
    assert "exited with 1" == collector._trouble
    time.pass_s(STREAM_STEADY_S)
    wait_for(lambda: "up" in values(collector), "it prints")
    assert "" == collector._trouble


def test_a_stream_that_never_ends_a_line_is_bounded(make: Make) -> None:
    """Of the line no more is kept than shows that it is too long."""
    collector = make("exec tr '\\0' x </dev/zero", mode="stream")
    for _ in range(5):
        values(collector)
    assert collector._program is not None
    assert len(collector._program._output) <= 5000


def test_a_stream_of_errors_does_not_hold_a_cycle_up(make: Make) -> None:
    """However fast it writes, to either output, and whatever it leaves behind, a cycle ends."""
    collector = make("yes up 1 & yes >&2 & sleep 0.3", mode="stream")
    wait_for(lambda: 0.0 == values(collector)["exec_success"], "the stream has ended")
    assert 1.0 == values(make("yes >&2 & echo up 1"))["exec_success"]


def test_stop_ends_a_stream(make: Make, tmp_path: Path) -> None:
    """Nothing is left of it."""
    collector = make(f"echo $$ >{tmp_path}/pid; echo up 1; sleep 1000", mode="stream")
    wait_for(lambda: "up" in values(collector), "it prints")
    collector.stop()
    wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())), "it is gone")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
