"""The promises of supervision: who should run does, who hangs is killed, who is told to end ends."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import State
from kon_agent.process import Child
from kon_agent.supervisor.child import ABORT_GRACE_NS, Supervised
from tests.unit.supervisor.fakes import START_NS, ended, fake_child, killed, sent

GRACE_S = 2.0
PATIENCE_NS = 10 * NS_PER_S


class Process(Supervised):
    """A supervised process that is not there."""

    def __init__(self) -> None:
        super().__init__("test", GRACE_S)
        self.is_wanted = True
        self.heartbeat_ns = 0
        self.refusal: OSError | None = None
        self.asked_to_stop = 0
        self.times_gone = 0
        self.words = ""

    def _spawn(self, now_ns: int) -> Child:
        if self.refusal is not None:
            raise self.refusal
        return fake_child()

    def _ask_to_stop(self) -> None:
        self.asked_to_stop += 1

    def _heartbeat_ns(self) -> int:
        return self.heartbeat_ns

    def _patience_ns(self) -> int:
        return PATIENCE_NS

    def _last_words(self) -> str:
        return self.words

    def _on_gone(self) -> None:
        self.times_gone += 1


def running() -> Process:
    """Return a process that has shown its first heartbeat."""
    process = Process()
    process.spawn(START_NS)
    process.heartbeat_ns = START_NS
    process.look(START_NS)
    return process


def test_it_is_due_where_it_should_run_and_can() -> None:
    """Wanted, unobstructed, and not there."""
    process = Process()
    assert process.is_due(START_NS)
    process.obstacle = "no BPF here"
    assert not process.is_due(START_NS)
    process.obstacle, process.is_wanted = "", False
    assert not process.is_due(START_NS)
    process.is_wanted = True
    process.spawn(START_NS)
    assert not process.is_due(START_NS)


def test_the_first_heartbeat_makes_it_run() -> None:
    """Spawned is not running yet."""
    process = Process()
    process.spawn(START_NS)
    states = []
    for process.heartbeat_ns in (0, START_NS + 1):
        process.look(START_NS + 1)
        states.append(process.lifecycle.state)
    assert [State.STARTING, State.RUNNING] == states


def test_a_failure_to_start_counts_as_a_death() -> None:
    """No process left in the system is waited for like any other death, and told."""
    process = Process()
    process.refusal = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    process.spawn(START_NS)
    assert (State.BACKOFF, None, 1) == (process.lifecycle.state, process.pid, process.times_gone)
    assert "could not be started" in (process.last_exit or "")
    assert not process.is_due(START_NS)
    assert process.is_due(process.next_deadline_ns() or 0)


def test_a_silent_one_is_aborted_then_killed() -> None:
    """First the signal that dumps its stack, then the one nobody survives."""
    process = running()
    late_ns = START_NS + PATIENCE_NS
    process.look(late_ns)
    assert [] == sent(process.child)
    process.look(late_ns + 1)
    assert [signal.SIGABRT] == sent(process.child)
    assert late_ns + 1 + ABORT_GRACE_NS == process.next_deadline_ns()
    process.look(late_ns + ABORT_GRACE_NS)
    assert [signal.SIGABRT] == sent(process.child)
    process.look(late_ns + 1 + ABORT_GRACE_NS)
    assert [signal.SIGABRT, signal.SIGKILL] == sent(process.child)


def test_a_heartbeat_in_the_future_is_a_lie() -> None:
    """A worker cannot buy itself silence in advance."""
    process = running()
    process.heartbeat_ns = START_NS + 2 * NS_PER_S
    process.look(START_NS)
    assert [signal.SIGABRT] == sent(process.child)
    process.gone(killed(process.child, signal.SIGABRT), START_NS)
    assert "killed by SIGABRT: its heartbeat lies in the future" == process.last_exit


def test_a_hung_ones_reason_is_told() -> None:
    """Why it was killed is more than by what."""
    process = running()
    process.look(START_NS + PATIENCE_NS + NS_PER_S)
    process.gone(killed(process.child), START_NS + PATIENCE_NS + NS_PER_S)
    assert "killed by SIGKILL: hung: silent for 11.0 s" == process.last_exit


def test_the_dead_are_told_with_their_last_words() -> None:
    """What it said before it died is shown with how it died."""
    process = running()
    process.words = "ImportError: nowhere"
    process.gone(ended(process.child, 70), START_NS)
    assert (process.last_exit or "").endswith(": ImportError: nowhere")
    assert (State.BACKOFF, None) == (process.lifecycle.state, process.child)


def test_an_end_nobody_asked_for_is_a_death_even_with_success() -> None:
    """Exit code 0 of a process that should run is none."""
    process = running()
    process.gone(ended(process.child), START_NS)
    assert (State.BACKOFF, "exited with 0") == (process.lifecycle.state, process.last_exit)


def test_stopping_asks_then_kills() -> None:
    """It has its grace, once."""
    process = running()
    process.stop(START_NS)
    process.stop(START_NS + NS_PER_S)
    assert (1, []) == (process.asked_to_stop, sent(process.child))
    deadline_ns = START_NS + int(GRACE_S * NS_PER_S)
    assert deadline_ns == process.next_deadline_ns()
    process.look(deadline_ns)
    assert [signal.SIGKILL] == sent(process.child)


def test_one_that_stops_is_not_aborted_for_its_silence() -> None:
    """What is on its way out need not beat, and its beats do not make it run again."""
    process = running()
    process.stop(START_NS)
    process.look(START_NS + 1)
    assert (State.STOPPING, []) == (process.lifecycle.state, sent(process.child))


def test_a_wanted_end_is_no_last_exit() -> None:
    """Stopped in good order leaves nothing to explain; stopped by force does."""
    process = running()
    process.stop(START_NS)
    process.gone(ended(process.child), START_NS)
    assert (State.STOPPED, None) == (process.lifecycle.state, process.last_exit)
    process.spawn(START_NS)
    process.stop(START_NS)
    process.gone(killed(process.child), START_NS)
    assert "killed by SIGKILL" == process.last_exit


def test_stopping_what_waits_ends_the_waiting() -> None:
    """One that is not there needs no grace."""
    process = running()
    process.gone(killed(process.child), START_NS)
    process.stop(START_NS)
    assert (State.STOPPED, None, 0) == (process.lifecycle.state, process.next_deadline_ns(), process.asked_to_stop)


def test_a_restart_comes_at_once_and_forgives() -> None:
    """Asked for by a person: no backoff, and no breaker for what was before."""
    process = running()
    for _ in range(5):
        process.gone(killed(process.child), START_NS)
        process.spawn(START_NS)
    assert "half_open" == process.lifecycle.breaker
    process.restart(START_NS)
    process.gone(ended(process.child), START_NS)
    assert process.is_due(START_NS)
    process.spawn(START_NS)
    process.gone(killed(process.child), START_NS)
    assert "closed" == process.lifecycle.breaker


def test_a_new_incarnation_owes_nothing_to_the_old() -> None:
    """The kill that was planned for one process never hits its successor."""
    process = running()
    process.kill("a test", START_NS)
    process.gone(killed(process.child), START_NS)
    process.heartbeat_ns = 0
    process.spawn(START_NS + NS_PER_S)
    process.look(START_NS + ABORT_GRACE_NS + NS_PER_S)
    assert ([], None) == (sent(process.child), process.next_deadline_ns())


def test_its_descriptor_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reaped process's pidfd is closed."""
    process = running()
    assert process.child is not None
    closed: list[int] = []
    monkeypatch.setattr(process.child.pidfd, "close", lambda: closed.append(1))
    process.gone(killed(process.child), START_NS)
    assert [1] == closed
