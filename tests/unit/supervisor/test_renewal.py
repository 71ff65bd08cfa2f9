"""Children are replaced one at a time, the sender first, each worker between two of its ticks."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kon_agent import __version__
from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import State
from kon_agent.process import Child, Exit
from kon_agent.ring import Pulse
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.renewal import FRESH_NS, WORKER_GRACE_S, Renewal, is_between_ticks, missed_between
from tests.unit.supervisor.fakes import START_NS, fake_child
from tests.unit.supervisor.test_handover import ALL

MS = 1_000_000


class Process(Supervised):
    """A supervised process that is not there, with a pulse in the test's hands."""

    def __init__(self, name: str, period_s: float = 5.0) -> None:
        super().__init__(name, 1.0)
        self.is_wanted = True
        self.period_s = period_s
        self.pause_reason = ""
        self.tick_ns = 0
        self.missed = 0
        self.asked = 0

    def _spawn(self, now_ns: int) -> Child:
        self.tick_ns = 0
        return fake_child()

    def _ask_to_stop(self) -> None:
        self.asked += 1

    def _heartbeat_ns(self) -> int:
        return self.tick_ns

    def _patience_ns(self) -> int:
        return 60 * NS_PER_S

    def pulse(self) -> Pulse:
        return Pulse(self.tick_ns, 1 if self.tick_ns else 0, 0, 0)

    def count_missed(self, ticks: int) -> None:
        self.missed += ticks

    def begin(self, now_ns: int) -> None:
        """Spawn it."""
        self.spawn(now_ns)

    def tick(self, now_ns: int) -> None:
        """Have it show life."""
        self.tick_ns = now_ns
        self.look(now_ns)

    def end(self, now_ns: int) -> None:
        """Have it end in order."""
        assert self.pid is not None
        self.gone(Exit(self.pid, code=0), now_ns)


class Agent:
    """A sender and two workers that have been taken over, all alive."""

    def __init__(self) -> None:
        self.sender = Process("sender")
        self.units = {name: Process(name) for name in ("cpu", "memory")}
        for process in (self.sender, *self.units.values()):
            process.begin(START_NS)
            process.tick(START_NS)
        self.renewal = Renewal(ALL, cast(Any, self.sender), cast(Any, self.units), "kept", START_NS)

    def asked(self) -> list[str]:
        """Return who has been asked to end."""
        return [process.name for process in (self.sender, *self.units.values()) if process.asked]

    def replace(self, process: Process, now_ns: int, tick_ns: int | None = None) -> None:
        """Have a process end, and its successor live and tick."""
        self.renewal.advance(now_ns)
        process.end(now_ns)
        self.renewal.advance(now_ns)
        process.begin(now_ns)
        self.renewal.advance(now_ns)
        process.tick(tick_ns or now_ns)


@pytest.mark.parametrize(
    ("age_ms", "period_s", "is_so"),
    [
        (10, 0.1, True),  # it has just kept one
        (80, 0.1, False),  # the next one is due in 20 ms
        (500, 5.0, True),  # 4.5 s are enough for a successor
        (4000, 5.0, False),  # 1 s is not
        (0, 3600.0, True),
    ],
)
def test_when_a_worker_may_be_replaced(age_ms: int, period_s: float, is_so: bool) -> None:
    """Just after a tick, or long before the next one."""
    pulse = Pulse(START_NS, 1, 0, 0)
    assert is_so is is_between_ticks(pulse, period_s, START_NS + age_ms * MS)


def test_a_worker_that_has_not_begun_is_waited_for() -> None:
    """Its first tick is about to come."""
    assert not is_between_ticks(Pulse(0, 0, 0, 0), 5.0, START_NS)


def test_a_long_cycle_brings_the_next_tick_near() -> None:
    """The next tick counts from the beginning of the last cycle, the heartbeat from its end."""
    pulse = Pulse(START_NS, 1, 0, 4 * NS_PER_S)
    assert is_between_ticks(pulse, 5.0, START_NS + FRESH_NS)
    assert not is_between_ticks(pulse, 5.0, START_NS + FRESH_NS + 1)


@pytest.mark.parametrize(("gap_s", "missed"), [(0.3, 0), (5.0, 0), (9.9, 0), (10.0, 1), (15.1, 2)])
def test_ticks_nobody_kept_are_counted(gap_s: float, missed: int) -> None:
    """A tick is missed once the next one has come as well."""
    assert missed == missed_between(START_NS, START_NS + int(gap_s * NS_PER_S), 5.0)


def test_the_sender_goes_first_then_one_at_a_time() -> None:
    """Nobody is asked to end before the successor of the one before runs."""
    agent = Agent()
    now_ns = START_NS + 10 * MS
    agent.renewal.advance(now_ns)
    assert ["sender"] == agent.asked()
    agent.replace(agent.sender, now_ns)
    agent.renewal.advance(now_ns)
    assert ["sender", "cpu"] == agent.asked()
    agent.replace(agent.units["cpu"], now_ns)
    assert ["sender", "cpu"] == agent.asked()
    agent.renewal.advance(now_ns)
    assert ["sender", "cpu", "memory"] == agent.asked()
    agent.replace(agent.units["memory"], now_ns)
    assert None is agent.renewal.outcome()
    agent.renewal.advance(now_ns)
    outcome = agent.renewal.outcome()
    assert outcome is not None
    assert ("1.2.3", __version__, ["cpu", "memory"], {}, {}, "kept") == (
        outcome.before,
        outcome.after,
        outcome.replaced,
        outcome.missed_ticks,
        outcome.troubled,
        outcome.counters,
    )
    assert [1, 1, 1] == [process.asked for process in (agent.sender, *agent.units.values())]
    assert 0 == agent.units["cpu"].lifecycle.restarts


def test_a_worker_gets_the_time_its_cycle_takes() -> None:
    """It is killed much later than one that is disabled."""
    agent = Agent()
    agent.replace(agent.sender, START_NS)
    agent.renewal.advance(START_NS)
    assert START_NS + int(WORKER_GRACE_S * NS_PER_S) == agent.units["cpu"].next_deadline_ns()


def test_one_that_is_being_stopped_is_left_alone() -> None:
    """A plugin disabled meanwhile gets the grace of a disabled one, not that of a renewed one."""
    agent = Agent()
    cpu = agent.units["cpu"]
    cpu.stop(START_NS)
    deadline_ns = cpu.next_deadline_ns()
    cpu.renew(START_NS, WORKER_GRACE_S)
    assert (1, deadline_ns) == (cpu.asked, cpu.next_deadline_ns())


def test_missed_ticks_are_told_and_counted() -> None:
    """A successor that came late owes its plugin a figure."""
    agent = Agent()
    agent.replace(agent.sender, START_NS)
    agent.replace(agent.units["cpu"], START_NS, START_NS + 12 * NS_PER_S)
    agent.units["memory"].tick(START_NS + 12 * NS_PER_S)
    agent.replace(agent.units["memory"], START_NS + 12 * NS_PER_S)
    agent.renewal.advance(START_NS + 12 * NS_PER_S)
    outcome = agent.renewal.outcome()
    assert outcome is not None
    assert ({"cpu": 1}, 1) == (outcome.missed_ticks, agent.units["cpu"].missed)


def test_a_successor_that_dies_does_not_hold_up_the_rest() -> None:
    """The next one has its turn, and the outcome names the one that does not run."""
    agent = Agent()
    agent.replace(agent.sender, START_NS)
    cpu = agent.units["cpu"]
    agent.renewal.advance(START_NS)
    cpu.end(START_NS)
    cpu.begin(START_NS)
    cpu.gone(Exit(cpu.pid or 0, code=70), START_NS)
    assert State.BACKOFF is cpu.lifecycle.state
    agent.replace(agent.units["memory"], START_NS)
    agent.renewal.advance(START_NS)
    outcome = agent.renewal.outcome()
    assert outcome is not None
    assert outcome.troubled["cpu"].startswith("exited with 70")


def test_one_that_died_meanwhile_is_not_replaced_again() -> None:
    """Its successor runs the new code already."""
    agent = Agent()
    agent.replace(agent.sender, START_NS)
    cpu = agent.units["cpu"]
    cpu.gone(Exit(cpu.pid or 0, signum=9), START_NS)
    agent.replace(agent.units["memory"], START_NS)
    agent.renewal.advance(START_NS)
    outcome = agent.renewal.outcome()
    assert outcome is not None
    assert (0, ["memory"]) == (cpu.asked, outcome.replaced)
