"""The command `kon-agent doctor`: its report, its exit code, and its patience."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from click.testing import CliRunner, Result

from kon_agent import __version__
from kon_agent.cli import agent as commands
from kon_agent.cli import doctor, target
from kon_agent.control_protocol import Status, encode_result
from kon_agent.doctor.checks import Check
from kon_agent.doctor.finding import Finding, fail, ok, warn

if TYPE_CHECKING:
    from tests.unit.cli.conftest import FakeAgent

Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run `kon-agent doctor` with these arguments, on a machine without an installed configuration."""
    monkeypatch.setattr(target, "DEFAULT_CONFIG", str(tmp_path / "absent.yaml"))
    return lambda *arguments: CliRunner().invoke(commands.main, ["doctor", *arguments])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the checks find, to be filled."""
    findings: list[Finding] = []

    def examine(checks: Iterable[Check], flags: Iterable[str]) -> Iterable[Finding]:
        return iter(findings)

    monkeypatch.setattr(doctor, "examine", examine)
    return findings


def test_a_line_for_each_finding(cli: Cli, found: list[Finding]) -> None:
    """Verdict, name, what was found and what to do; then how many of each there are."""
    found += [ok("jit", "on"), warn("clock", "drifts\x1b[2J", "run chronyd"), fail("spool", "full", "make room")]
    lines = cli().stdout.splitlines()
    assert [
        f"ok   {'jit':<24} on",
        f"warn {'clock':<24} drifts [2J  → run chronyd",
        f"fail {'spool':<24} full  → make room",
        "1 ok, 1 warn, 1 fail",
    ] == lines


@pytest.mark.parametrize(
    ("findings", "code"),
    [([ok("jit", "on")], 0), ([warn("clock", "drifts", "run chronyd")], 0), ([fail("spool", "full", "make room")], 1)],
)
def test_only_a_failure_is_one(cli: Cli, found: list[Finding], findings: list[Finding], code: int) -> None:
    """The exit code is 1 where something fails; a warning leaves it 0. The same with --json."""
    found += findings
    assert (code, code) == (cli().exit_code, cli("--json").exit_code)


def test_json_is_one_object(cli: Cli, found: list[Finding]) -> None:
    """With the worst verdict and every finding, and nothing else on standard output."""
    found += [ok("jit", "on"), warn("clock", "drifts", "run chronyd")]
    assert {
        "version": __version__,
        "config": None,
        "verdict": "warn",
        "checks": [
            {"check": "jit", "verdict": "ok", "found": "on", "advice": ""},
            {"check": "clock", "verdict": "warn", "found": "drifts", "advice": "run chronyd"},
        ],
    } == json.loads(cli("--json").stdout)


class _Scripted:
    """A stand-in for the process that performs the checks: answers for each, or trouble."""

    troubles: ClassVar[dict[str, str]] = {}
    started: ClassVar[list[list[str]]] = []

    def __init__(self, names: list[str], flags: Iterable[str]) -> None:
        self.started.append(list(names))
        self._names = list(names)

    def __enter__(self) -> _Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def begin(self) -> str:
        """Say whether it has begun."""
        return self.troubles.get("", "")

    def answer(self, deadline_s: float) -> tuple[doctor._Answer, str]:
        """Answer for the next check, or say what is wrong."""
        name = self._names.pop(0)
        trouble = self.troubles.get(name, "")
        return doctor._Answer(name, [] if trouble else [ok(name, "fine")]), trouble


def test_a_hung_check_costs_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process goes on behind it."""
    monkeypatch.setattr(doctor, "_Performer", _Scripted)
    monkeypatch.setattr(_Scripted, "troubles", {"b": "hung: 5 s"})
    started: list[list[str]] = []
    monkeypatch.setattr(_Scripted, "started", started)
    checks = [Check(name, "") for name in "abc"]
    assert [("a", "ok"), ("b", "fail"), ("c", "ok")] == [(f.check, f.verdict) for f in doctor.examine(checks, [])]
    assert [["a", "b", "c"], ["c"]] == started


def test_a_process_that_does_not_begin_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keeps it would keep the next one."""
    monkeypatch.setattr(doctor, "_Performer", _Scripted)
    monkeypatch.setattr(_Scripted, "troubles", {"": "exit code 1"})
    started: list[list[str]] = []
    monkeypatch.setattr(_Scripted, "started", started)
    (found,) = doctor.examine([Check(name, "") for name in "abc"], [])
    assert ("doctor", "fail", 1) == (found.check, found.verdict, len(started))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Have this shell script in the place of the interpreter."""
    path = tmp_path / "interpreter"

    def write(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_a_process_that_is_killed_is_told(program: Callable[[str], None]) -> None:
    """By its signal, or its code and its last words."""
    program('echo \'{"check": ""}\'; kill -SEGV $$')
    assert f"its process ended: signal {signal.SIGSEGV.value}" == _trouble(10.0)
    program('echo \'{"check": ""}\'; echo oh no >&2; exit 3')
    assert "its process ended: exit code 3, oh no" == _trouble(10.0)


def test_a_process_that_hangs_is_killed(program: Callable[[str], None], tmp_path: Path) -> None:
    """At the deadline of its check."""
    program(f'echo $$ > {tmp_path}/pid; echo \'{{"check": ""}}\'; exec sleep 100')
    begun_s = time.monotonic()
    assert "hung: did not come to an end within 0 s" == _trouble(0.2)
    assert time.monotonic() - begun_s < 10
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}")


def _trouble(deadline_s: float) -> str:
    with doctor._Performer(["kernel"], []) as performer:
        assert "" == performer.begin()
        return performer.answer(deadline_s)[1]


def test_the_checks_see_the_running_agent(cli: Cli, agent: FakeAgent, whole: Status) -> None:
    """It is asked once, and what it says of itself is what they judge."""
    agent.reply = lambda _: encode_result(whole)
    patient = doctor._patient(None, None)
    assert (agent.path, whole, None) == (patient.socket, patient.status, patient.silence)


def test_a_wrong_file_leaves_the_defaults(tmp_path: Path) -> None:
    """So that the other checks have something to go by."""
    path = tmp_path / "agent.yaml"
    path.write_text("user: 7\n")
    patient = doctor._patient(str(tmp_path / "none.sock"), str(path))
    assert (str(path), False, "not_running") == (
        patient.config_path,
        patient.is_valid,
        patient.silence and patient.silence.code,
    )
