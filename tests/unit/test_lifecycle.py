"""The lifecycle's promises: every state listed, deaths lead to backoff, too many to an open breaker."""

from __future__ import annotations

from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import ALIVE, TRANSITIONS, Event, Lifecycle, RestartPolicy, State

POLICY = RestartPolicy(backoff_base_s=1.0, backoff_max_s=8.0, intensity=5, window_s=60.0, open_s=30.0)


def running(chance: float = 0.0) -> Lifecycle:
    """Return the lifecycle of a process that has shown its first heartbeat."""
    lifecycle = Lifecycle("test", POLICY, lambda: chance)
    lifecycle.started()
    lifecycle.beat()
    return lifecycle


def test_every_state_is_reached_and_left() -> None:
    """No state is a dead end, none is unreachable."""
    assert set(State) == {state for state, _ in TRANSITIONS}
    assert set(State) == set(TRANSITIONS.values())


def test_a_process_that_exists_can_always_die_and_be_stopped() -> None:
    """Death and stop are events of every state in which there is a process."""
    for state in ALIVE:
        assert {(state, Event.DIED), (state, Event.STOP)} <= TRANSITIONS.keys()


def test_backoff_doubles_and_is_capped() -> None:
    """The wait after each death in the window is twice the one before, up to the maximum."""
    lifecycle, waits, now_ns = running(chance=0.999999), [], 0
    for _ in range(4):
        lifecycle.died(now_ns)
        assert lifecycle.retry_at_ns is not None
        waits.append(round((lifecycle.retry_at_ns - now_ns) / NS_PER_S))
        now_ns = lifecycle.retry_at_ns
        lifecycle.started()
    assert [1, 2, 4, 8] == waits


def test_too_many_deaths_open_the_breaker() -> None:
    """The fifth death within the window rests the process, and one probe decides after it."""
    lifecycle, now_ns = running(), 0
    for _ in range(5):
        lifecycle.died(now_ns)
        now_ns = lifecycle.retry_at_ns or 0
        state = lifecycle.state
        lifecycle.started()
    assert (State.FAILED, State.HALF_OPEN, "half_open") == (state, lifecycle.state, lifecycle.breaker)
    lifecycle.beat()
    assert (State.RUNNING, "closed") == (lifecycle.state, lifecycle.breaker)


def test_a_failed_probe_opens_the_breaker_again() -> None:
    """A process that dies half-open rests once more."""
    lifecycle, now_ns = running(), 0
    for _ in range(5):
        lifecycle.died(now_ns)
        now_ns = lifecycle.retry_at_ns or 0
        lifecycle.started()
    lifecycle.died(now_ns)
    assert (State.FAILED, now_ns + 30 * NS_PER_S) == (lifecycle.state, lifecycle.retry_at_ns)


def test_old_deaths_are_forgotten() -> None:
    """Deaths further apart than the window never open the breaker."""
    lifecycle = running()
    for number in range(20):
        lifecycle.died(number * 61 * NS_PER_S)
        assert State.BACKOFF is lifecycle.state
        lifecycle.started()


def test_a_wanted_end_is_no_death() -> None:
    """A stopped process is not tried again and counts no restart."""
    lifecycle = running()
    lifecycle.stop()
    lifecycle.died(0)
    assert (State.STOPPED, None, 0) == (lifecycle.state, lifecycle.retry_at_ns, lifecycle.restarts)


def test_restarts_count_replacements_only() -> None:
    """The first start is none."""
    lifecycle = running()
    assert 0 == lifecycle.restarts
    lifecycle.died(0)
    lifecycle.started()
    assert 1 == lifecycle.restarts
