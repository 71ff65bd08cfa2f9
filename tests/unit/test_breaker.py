"""The circuit breaker."""

from __future__ import annotations

import pytest

from kon_agent.breaker import Breaker, State
from kon_agent.clock import NS_PER_S


@pytest.fixture
def breaker() -> Breaker:
    """Return one that opens after 3 failures and rests 10, 20, 40 and at most 60 s."""
    return Breaker("probe", max_failures=3, first_rest_s=10, max_rest_s=60)


def fail(breaker: Breaker, times: int, now_s: int = 0) -> None:
    """Let so many attempts fail."""
    for _ in range(times):
        assert breaker.allows(now_s * NS_PER_S)
        breaker.failed(now_s * NS_PER_S)


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    """One less than the limit does not."""
    fail(breaker, 2)
    assert State.CLOSED is breaker.state
    fail(breaker, 1)
    assert breaker.is_open
    assert not breaker.allows(9 * NS_PER_S)


def test_a_success_between_them_is_forgiveness(breaker: Breaker) -> None:
    """Only failures in a row count."""
    for _ in range(5):
        fail(breaker, 2)
        breaker.succeeded()
    assert State.CLOSED is breaker.state


def test_after_a_rest_one_attempt_decides(breaker: Breaker) -> None:
    """Its success closes it, and all is as at the start."""
    fail(breaker, 3)
    assert breaker.allows(10 * NS_PER_S)
    assert State.HALF_OPEN is breaker.state
    breaker.succeeded()
    fail(breaker, 3, now_s=20)
    assert not breaker.allows(29 * NS_PER_S)
    assert breaker.allows(30 * NS_PER_S)


def test_each_failed_probe_doubles_the_rest(breaker: Breaker) -> None:
    """Up to the longest."""
    fail(breaker, 3)
    now_s, rests = 0, []
    for _ in range(5):
        rest_s = next(s for s in range(1000) if breaker.allows((now_s + s) * NS_PER_S))
        rests.append(rest_s)
        now_s += rest_s
        breaker.failed(now_s * NS_PER_S)
    assert [10, 20, 40, 60, 60] == rests


def test_its_changes_are_logged(breaker: Breaker, caplog: pytest.LogCaptureFixture) -> None:
    """From which state to which, once."""
    caplog.set_level("INFO")
    fail(breaker, 3)
    breaker.allows(10 * NS_PER_S)
    breaker.succeeded()
    breaker.succeeded()
    assert [
        "breaker of probe: closed -> open",
        "breaker of probe: open -> half_open",
        "breaker of probe: half_open -> closed",
    ] == caplog.messages
