"""The loop's promises: it sleeps when nothing is to be done, minds its own children only, and comes to its end."""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import State
from kon_agent.process import Child, Exit
from kon_agent.supervisor import main
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.main import LOOK_INTERVAL_S, STARTING_INTERVAL_S, Phase, Supervisor
from kon_agent.supervisor.network import NEVER_NS
from kon_agent.supervisor.upgrade import Succession
from tests.unit.supervisor.fakes import START_NS, fake_child


class Process(Supervised):
    """A supervised process that is not there, can be held back, and does not react to signals."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 1.0)
        self.is_wanted = True
        self.is_held_back = False
        self.heartbeat_ns = 0

    def is_due(self, now_ns: int) -> bool:
        return super().is_due(now_ns) and not self.is_held_back

    def _spawn(self, now_ns: int) -> Child:
        self.heartbeat_ns = now_ns
        return fake_child()

    def _ask_to_stop(self) -> None:
        pass

    def _heartbeat_ns(self) -> int:
        return self.heartbeat_ns

    def _patience_ns(self) -> int:
        return 10 * NS_PER_S

    def settle_rings(self, now_ns: int) -> None:
        pass


class Selector:
    """Keeps how long the loop was ready to wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def register(self, *_: object) -> None:
        pass

    def unregister(self, *_: object) -> None:
        pass

    def select(self, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        self.waits.append(timeout_s)
        return []


@pytest.fixture
def loop() -> Iterator[Supervisor]:
    """Return a supervisor of one plugin and a sender, without anything around them."""
    made = Supervisor.__new__(Supervisor)
    made._phase = Phase.RUNNING
    made._selector = cast(Any, Selector())
    made._watched, made._leaving = {}, []
    made._succession = Succession(made, ())
    made._looked_ns = made._awake_since_ns = 0
    made.units = {"cpu": cast(Any, Process("worker cpu"))}
    made.courier = cast(Any, Process("sender"))
    made.regulation = cast(Any, SimpleNamespace(due_ns=0))
    made.network = cast(Any, SimpleNamespace(due_ns=NEVER_NS))
    yield made


def turn(loop: Supervisor, now_ns: int) -> float:
    """Do one turn and return how long it would have waited at its end, seconds."""
    loop._spawn_due(now_ns)
    loop._look(now_ns)
    loop._wait(now_ns)
    return cast(Any, loop._selector).waits[-1]  # type: ignore[no-any-return]


def test_all_is_spawned_then_the_loop_rests(loop: Supervisor) -> None:
    """Once everything runs it looks at the heartbeats now and then."""
    assert LOOK_INTERVAL_S == turn(loop, START_NS)
    assert {loop.units["cpu"].pid, loop.courier.pid} == set(loop._watched)


def test_it_wakes_for_the_next_try(loop: Supervisor) -> None:
    """A dead worker is tried again when its wait is over, not at the next look."""
    turn(loop, START_NS)
    unit = loop.units["cpu"]
    unit.gone(Exit(unit.pid or 0, code=1), START_NS)
    unit.lifecycle.retry_at_ns = START_NS + NS_PER_S // 4
    assert 0.25 == turn(loop, START_NS)
    turn(loop, START_NS + NS_PER_S // 4)
    assert State.RUNNING is unit.lifecycle.state


def test_a_worker_held_back_does_not_make_it_spin(loop: Supervisor) -> None:
    """A try that is overdue and cannot be made is no reason to hurry."""
    turn(loop, START_NS)
    unit = cast(Any, loop.units["cpu"])
    unit.gone(Exit(unit.pid, code=1), START_NS)
    unit.is_held_back = True
    assert LOOK_INTERVAL_S == turn(loop, START_NS + 5 * NS_PER_S)


def test_one_that_cannot_be_killed_does_not_make_it_spin(loop: Supervisor) -> None:
    """A process in an uninterruptible sleep, a dead disk's, is waited for like any other."""
    turn(loop, START_NS)
    unit = loop.units["cpu"]
    unit.stop(START_NS)
    waits = [turn(loop, START_NS + seconds * NS_PER_S) for seconds in range(2, 5)]
    assert min(waits) >= STARTING_INTERVAL_S


def test_a_stranger_among_its_children_is_ignored(loop: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever started us may have left us children, and process 1 of a container inherits every orphan."""
    turn(loop, START_NS)
    unit = loop.units["cpu"]
    monkeypatch.setattr(main, "reap", lambda _: [Exit(1, code=0), Exit(unit.pid or 0, code=1)])
    loop._reap(START_NS)
    assert (State.BACKOFF, State.RUNNING) == (unit.lifecycle.state, loop.courier.lifecycle.state)


def test_no_worker_is_started_while_it_ends(loop: Supervisor) -> None:
    """A plugin enabled meanwhile cannot keep it from ending; a sender that dies before its turn is replaced."""
    loop._phase = Phase.STOPPING_WORKERS
    loop._spawn_due(START_NS)
    assert None is loop.units["cpu"].pid
    assert None is not loop.courier.pid


def test_a_machine_that_slept_kills_nobody(loop: Supervisor) -> None:
    """Silence during a suspend, or while the whole tree was stopped, is not held against anyone."""
    turn(loop, NS_PER_S)
    awake_ns = NS_PER_S + 3600 * NS_PER_S
    turn(loop, awake_ns)
    assert None is loop.courier.next_deadline_ns()
    for second in range(1, 12):
        turn(loop, awake_ns + second * NS_PER_S)
    assert None is not loop.courier.next_deadline_ns()
