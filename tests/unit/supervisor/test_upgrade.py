"""An upgrade up to the change: the installed code promises that it can go on, or nothing has happened."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.errors import ControlError
from kon_agent.process import Exit, reap
from kon_agent.supervisor import handover, upgrade
from kon_agent.supervisor.handover import Handover
from kon_agent.supervisor.upgrade import QUIET_MAX_S, REHEARSAL_MAX_S, Rehearsal, Succession
from tests.unit.supervisor.fakes import START_NS
from tests.unit.supervisor.test_handover import ALL, open_descriptors

DEADLINE_S = 10.0
PROMISE = """print('{"version": "9.9.9"}')"""
Say = Callable[[str], None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Return what makes the installed code a line of Python; `fd` in it is what it is given."""

    def install(code: str) -> None:
        def command(fd: int | None = None, *, is_rehearsal: bool = False) -> list[str]:
            return [sys.executable, "-c", f"import os, sys; fd = {fd}\n{code}"]

        monkeypatch.setattr(handover, "command", command)

    return install


def wait_for_end() -> Exit:
    """Return the end of our only child."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if ended := reap():
            return ended[0]
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    raise AssertionError("it has not ended in time")


def rehearse(now_ns: int = START_NS) -> Rehearsal:
    """Return a rehearsal that has ended."""
    rehearsal = Rehearsal(ALL, START_NS)
    assert rehearsal.gone(wait_for_end(), now_ns)
    return rehearsal


def test_a_promise_is_kept_in_mind(say: Say) -> None:
    """Whatever else it has said before, the last line is what counts; nothing stays open."""
    before = open_descriptors()
    say(f"print('a warning', file=sys.stderr)\n{PROMISE}")
    rehearsal = rehearse()
    rehearsal.outcome()
    assert ("9.9.9", before) == (rehearsal.version, open_descriptors())


def test_it_is_given_the_state(say: Say) -> None:
    """It inherits the descriptor its command names, and reads there what it would take over."""
    say("""import json; print(json.dumps({"version": json.loads(os.pread(fd, 1 << 20, 0))["version"]}))""")
    assert ALL.version == rehearse().version


def test_it_is_given_nothing_else(say: Say) -> None:
    """None of the descriptors of the running agent is open in it."""
    secret, other = os.pipe2(os.O_CLOEXEC)
    say(f"sys.exit(0 if not os.path.exists('/proc/self/fd/{secret}') else 1)\n")
    rehearsal = rehearse()
    assert "exited with 0" in str(rehearsal.refusal)
    os.close(secret)
    os.close(other)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no way')", "exited with 1: .*RuntimeError: no way"),
        ("pass", "exited with 0: it said nothing"),
        ("print('ready')", "exited with 0: ready"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL: it said nothing"),
        ("print('x' * 1000000)", "exited with 1: "),
    ],
)
def test_anything_but_a_promise_is_a_refusal(say: Say, code: str, reason: str) -> None:
    """The answer says how it ended, and the end of what it said."""
    before = open_descriptors()
    say(code)
    rehearsal = rehearse()
    with pytest.raises(ControlError, match=f"the installed code cannot take over: {reason}") as failure:
        rehearsal.outcome()
    assert ("refused", None, before) == (failure.value.code, rehearsal.version, open_descriptors())
    assert not rehearsal.is_time(START_NS, is_quiet=True)


def test_one_that_takes_too_long_is_killed(say: Say) -> None:
    """A rehearsal that hangs is a refusal after a minute."""
    say("import signal; signal.pause()")
    rehearsal = Rehearsal(ALL, START_NS)
    rehearsal.look(START_NS + int(REHEARSAL_MAX_S * NS_PER_S))
    assert [] == reap()
    late_ns = START_NS + int(REHEARSAL_MAX_S * NS_PER_S) + 1
    rehearsal.look(late_ns)
    rehearsal.gone(wait_for_end(), late_ns)
    with pytest.raises(ControlError, match="killed by SIGKILL after 60 s"):
        rehearsal.outcome()


def test_another_child_is_not_it(say: Say) -> None:
    """Whoever else ends, the rehearsal goes on."""
    say(PROMISE)
    rehearsal = Rehearsal(ALL, START_NS)
    ended = wait_for_end()
    assert not rehearsal.gone(Exit(ended.pid + 1, code=0), START_NS)
    assert None is rehearsal.version
    assert rehearsal.gone(ended, START_NS)


def test_others_are_answered_first(say: Say) -> None:
    """The change waits for control connections that wait, but not for long."""
    say(PROMISE)
    rehearsal = rehearse()
    assert rehearsal.is_time(START_NS, is_quiet=True)
    assert not rehearsal.is_time(START_NS + int(QUIET_MAX_S * NS_PER_S), is_quiet=False)
    assert rehearsal.is_time(START_NS + int(QUIET_MAX_S * NS_PER_S) + 1, is_quiet=False)


class Supervisor:
    """A supervisor that notes what it is asked for."""

    def __init__(self) -> None:
        self.is_ending = False
        self.ends_meanwhile = False
        self.questions: list[Callable[[], None] | None] = []

    def capture(self, question: Callable[[], None] | None) -> Handover:
        self.questions.append(question)
        return ALL

    def is_asked_for_nothing_but(self, question: Callable[[], None]) -> bool:
        return True

    def take_signals(self) -> None:
        self.is_ending = self.ends_meanwhile


def run_to_the_change(supervisor: Supervisor) -> tuple[Succession, Callable[[], None]]:
    """Return an upgrade whose rehearsal has gone well, and the question how it goes."""
    succession = Succession(supervisor, (signal.SIGUSR2,))
    question = succession.begin(START_NS)
    succession.gone(wait_for_end(), START_NS)
    return succession, question


def test_the_change(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals wait for the new code, which is to answer who asked; where it cannot be executed all is as before."""
    say(PROMISE)
    blocked = []

    def refuse(given: Handover) -> None:
        blocked.append(signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        raise FileNotFoundError("python")

    monkeypatch.setattr(handover, "execute", refuse)
    supervisor = Supervisor()
    succession, question = run_to_the_change(supervisor)
    succession.advance(START_NS)
    assert ([True], [None, question]) == (blocked, supervisor.questions)
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(ControlError, match="cannot be executed: python"):
        question()
    succession.begin(START_NS)  # and may be tried again
    wait_for_end()


def test_a_stop_goes_before(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that came while the installed code rehearsed is obeyed, not lost with the pipe it waits in."""
    say(PROMISE)
    monkeypatch.setattr(handover, "execute", lambda given: pytest.fail("it was executed"))
    supervisor = Supervisor()
    supervisor.ends_meanwhile = True
    succession, question = run_to_the_change(supervisor)
    succession.advance(START_NS)
    with pytest.raises(ControlError, match="about to stop"):
        question()
    with pytest.raises(ControlError, match="about to stop"):
        succession.begin(START_NS)


def test_one_at_a_time(say: Say) -> None:
    """A second upgrade is refused while the first is under way."""
    say(PROMISE)
    succession, _ = run_to_the_change(Supervisor())
    with pytest.raises(ControlError, match="under way"):
        succession.begin(START_NS)


def test_what_cannot_even_be_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with an upgrade, the agent goes on; nothing stays open."""
    before = open_descriptors()
    monkeypatch.setattr(handover, "command", lambda *_, **__: ["/no/such/python"])
    with pytest.raises(ControlError, match="cannot be tried"):
        Succession(Supervisor(), ()).begin(START_NS)
    monkeypatch.setattr(upgrade, "Rehearsal", lambda *_: 1 / 0)
    with pytest.raises(ControlError, match="cannot be tried"):
        Succession(Supervisor(), ()).begin(START_NS)
    assert before == open_descriptors()
