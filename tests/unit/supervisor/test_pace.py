"""A rate is over a whole interval, and unknown before there was one."""

from __future__ import annotations

from kon_agent.clock import NS_PER_S
from kon_agent.supervisor.pace import MIN_INTERVAL_S, Pace

START_NS = 1000 * NS_PER_S


def test_the_first_count_says_nothing() -> None:
    """A rate takes two."""
    pace = Pace()
    assert pace.is_due(START_NS, 1.0)
    pace.note(100, START_NS)
    assert None is pace.per_s


def test_a_rate_is_growth_over_time() -> None:
    """Per second, over the time that really passed; nothing more is nought."""
    pace = Pace()
    pace.note(100, START_NS)
    pace.note(130, START_NS + 6 * NS_PER_S)
    assert 5.0 == pace.per_s
    pace.note(130, START_NS + 12 * NS_PER_S)
    assert 0.0 == pace.per_s


def test_it_waits_for_what_moves_rarely() -> None:
    """Between two moves of the count there would be bursts and gaps."""
    pace = Pace()
    pace.note(1, START_NS)
    assert not pace.is_due(START_NS + int(MIN_INTERVAL_S * NS_PER_S) - 1, 0.1)
    assert pace.is_due(START_NS + int(MIN_INTERVAL_S * NS_PER_S), 0.1)
    assert not pace.is_due(START_NS + 59 * NS_PER_S, 60.0)
    assert pace.is_due(START_NS + 60 * NS_PER_S, 60.0)
