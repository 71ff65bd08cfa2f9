"""The command `kon-agent doctor`: everything the agent needs, looked at, a line each, with what to do.

    doctor ── starts, waits ─▶ doctor --part: the checks, one after the other, an answer per line

The checks run in a process of their own. One that hangs, or takes its process with it, costs its own line; the next
process goes on behind it. So the command always comes to an end, and nothing it looked at can crash it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click
import msgspec

import kon_agent
from kon_agent.cli import client, tables, target
from kon_agent.config.load import check as check_file
from kon_agent.config.schema import Config
from kon_agent.control_protocol import Op, Request, Status
from kon_agent.doctor.checks import CHECKS, Check, perform
from kon_agent.doctor.finding import Finding, Verdict, fail, worst
from kon_agent.doctor.patient import Patient
from kon_agent.errors import ControlError, KonError
from kon_agent.linux import privileges

if TYPE_CHECKING:
    from rich.console import Console

START_DEADLINE_S = 30.0  # until the first answer can be expected: an interpreter on a slow SD card
STATUS_TIMEOUT_S = 2.0  # a healthy agent answers within milliseconds
NAME_COLUMNS = 24  # most names fit; a longer one pushes its line to the right

AFTER_TROUBLE = "what it looks at is broken or very slow: see the kernel's log; the other checks went on"

_READ_BYTES = 64 * 1024
_STYLES: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `doctor --json` prints.

    Attributes:
        version: of this kon-agent.
        config: the configuration's file; None: built-in defaults.
        verdict: the worst there is.
        checks: what was found, in order.
    """

    version: str
    config: str | None
    verdict: Verdict
    checks: list[Finding]


class _Answer(msgspec.Struct, frozen=True):
    """A line from the process that performs the checks; the first has no check: it has begun."""

    check: str = ""
    findings: list[Finding] = []


@click.command()
@target.control_options
@click.option("--part", hidden=True, metavar="CHECKS")
def doctor(socket_path: str | None, config_file: str | None, as_json: bool, part: str | None) -> None:
    """Look at everything the agent needs, with or without a running agent; say what to do. Exit 1 if a check fails."""
    if part is not None:
        _perform(part.split(","), _patient(socket_path, config_file))
        return
    flags = [*_flag("--socket", socket_path), *_flag("-c", config_file)]
    found: list[Finding] = []
    out = None if as_json else tables.console()
    for finding in examine(CHECKS, flags):
        found.append(finding)
        if out is not None:
            _print(finding, out)
    if out is not None:
        counts = (f"{sum(each.verdict == verdict for each in found)} {verdict}" for verdict in _STYLES)
        out.print(", ".join(counts))
    path = target.config_path(config_file)
    report = Report(version=kon_agent.__version__, config=path, verdict=worst(found), checks=found)
    target.print_json(report, as_json)
    if report.verdict == "fail":
        sys.exit(1)


def examine(checks: Sequence[Check], flags: Sequence[str]) -> Iterator[Finding]:
    """Yield what checks find, each in its time.

    Args:
        checks: which.
        flags: of the command line, for the process that performs them.
    """
    left = list(checks)
    while left:
        try:
            performer = _Performer([check.name for check in left], flags)
        except OSError as err:
            raise KonError(f"no process can be started for the checks: {err}") from err
        with performer:
            if trouble := performer.begin():
                yield fail("doctor", f"no check can be performed: {trouble}", AFTER_TROUBLE)
                return
            while left and not trouble:
                answer, trouble = performer.answer(left[0].deadline_s)
                yield from answer.findings
                if not trouble:
                    left.pop(0)
            if trouble:
                yield fail(left.pop(0).name, trouble, AFTER_TROUBLE)


class _Performer:
    """The process that performs the checks, as the command sees it; killed at the end, whatever it does then."""

    def __init__(self, names: Sequence[str], flags: Sequence[str]) -> None:
        # -P: nothing in the folder a user happens to be in is imported by root. Our own folder may be known only by it.
        command = [sys.executable, "-P", "-W", "ignore", "-m", "kon_agent.cli.agent", "doctor", *flags]
        folder = str(Path(kon_agent.__file__).parents[1])
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # an empty or relative one is where a user stands
        path = os.pathsep.join([folder, *filter(os.path.isabs, others)])
        with contextlib.ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [*command, "--part", ",".join(names)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, "PYTHONPATH": path},
            )
            stack.callback(self._end)
            self._stack = stack.pop_all()
        self._lines = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def begin(self) -> str:
        """Wait until it has begun; return what is wrong, or nothing."""
        return self.answer(START_DEADLINE_S)[1]

    def answer(self, deadline_s: float) -> tuple[_Answer, str]:
        """Return the next answer; where there is none, an empty one and why."""
        ends_s = time.monotonic() + deadline_s
        assert self._process.stdout is not None
        while b"\n" not in self._lines:
            left_s = max(0.0, ends_s - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                return _Answer(), f"hung: did not come to an end within {deadline_s:.0f} s"
            chunk = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not chunk:
                return _Answer(), f"its process ended: {self._last_words()}"
            self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        return msgspec.json.decode(line, type=_Answer), ""

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}, {said[-1]}" if said else how

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _perform(names: Sequence[str], patient: Patient) -> None:
    """Perform checks and print an answer for each."""
    _say(_Answer())
    for check in CHECKS:
        if check.name in names:
            _say(_Answer(check.name, perform(check, patient)))


def _say(answer: _Answer) -> None:
    os.write(sys.stdout.fileno(), msgspec.json.encode(answer) + b"\n")


def _patient(socket_path: str | None, config_file: str | None) -> Patient:
    """Read what is examined."""
    path = target.config_path(config_file)
    config = Config() if path is None else check_file(path)[0]
    socket = socket_path
    if socket is None:
        socket = (config or Config()).control.socket if config_file else target.socket_path(None, None)
    status: Status | None = None
    silence: ControlError | None = None
    try:
        status = client.call(socket, Request(op=Op.STATUS), Status, STATUS_TIMEOUT_S)
    except ControlError as err:
        silence = err
    return Patient(
        config=config or Config(),
        config_path=path,
        is_valid=config is not None,
        socket=socket,
        status=status,
        silence=silence,
        privileges=privileges.current_privileges(),
    )


def _flag(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]


def _print(finding: Finding, out: Console) -> None:
    from rich.text import Text

    advice = f"  → {tables.printable(finding.advice)}" if finding.advice else ""
    line = f"{tables.printable(finding.check):<{NAME_COLUMNS}} {tables.printable(finding.found)}{advice}"
    out.print(Text.assemble((f"{finding.verdict:<5}", _STYLES[finding.verdict]), line))
