"""The schedule's promises: no drift, no catching up, every missed tick counted."""

from __future__ import annotations

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
