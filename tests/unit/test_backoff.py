"""The backoff's promises: the ceiling doubles and ends, chance decides below it, success starts anew."""

from __future__ import annotations

import pytest

from kon_agent.backoff import Backoff

HALF = 0.5


def test_the_ceiling_doubles_up_to_the_last() -> None:
    """Each failure doubles the longest wait, until it is as long as it gets."""
    backoff = Backoff(1.0, 10.0, lambda: HALF)
    assert [0.5, 1.0, 2.0, 4.0, 5.0, 5.0] == [backoff.next_s() for _ in range(6)]


@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_chance_decides_all_of_the_wait(chance: float) -> None:
    """Full jitter: from nothing to the ceiling, so that a herd spreads out."""
    assert pytest.approx(chance * 2.0) == Backoff(2.0, 2.0, lambda: chance).next_s()


def test_success_starts_anew() -> None:
    """The first failure after a success waits as shortly as the very first."""
    backoff = Backoff(1.0, 10.0, lambda: HALF)
    for _ in range(5):
        backoff.next_s()
    backoff.reset()
    assert 0.5 == backoff.next_s()


def test_years_of_failures_are_no_overflow() -> None:
    """An agent whose server never comes back keeps trying at the same pace."""
    backoff = Backoff(0.5, 30.0, lambda: HALF)
    assert {15.0} == {backoff.next_s() for _ in range(5000)} - {0.25, 0.5, 1.0, 2.0, 4.0, 8.0}
