"""The schedule's promises: no drift, no catching up, every missed tick counted."""

from __future__ import annotations

from kon_agent.clock import NS_PER_S as S
from kon_agent.schedule import FIRST_TICK_MAX_NS, Schedule


def test_ticks_do_not_drift() -> None:
    """Lateness within a period does not move later ticks."""
    schedule = Schedule(100, origin_ns=0)
    due = []
    for lateness in (0, 30, 99, 1):
        due.append(schedule.due_ns)
        schedule.advance(schedule.due_ns + lateness)
    assert ([100, 200, 300, 400], 0) == (due, schedule.missed)


def test_missed_ticks_are_skipped_and_counted() -> None:
    """A cycle that overran three periods misses three ticks and causes no burst."""
    schedule = Schedule(100, origin_ns=0)
    schedule.advance(100 + 350)
    assert (500, 3) == (schedule.due_ns, schedule.missed)


def test_the_first_tick_comes_soon() -> None:
    """A long period does not keep a new collector silent."""
    assert FIRST_TICK_MAX_NS == Schedule(60 * FIRST_TICK_MAX_NS, origin_ns=0).due_ns


def test_a_shorter_period_counts_from_the_last_tick() -> None:
    """A tick that would have been by then comes at once; the ticks before a change are never counted as missed."""
    schedule = Schedule(10 * S, 0)
    schedule.advance(S)  # the first tick; the next one at 11 s
    schedule.set_period(2 * S, 2 * S)
    assert 3 * S == schedule.due_ns
    schedule.set_period(60 * S, 2 * S)
    assert 61 * S == schedule.due_ns
    schedule.set_period(5 * S, 40 * S)
    assert (40 * S, 0) == (schedule.due_ns, schedule.missed)
