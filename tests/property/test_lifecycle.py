"""The lifecycle under random events: no transition is missing, no restart is too early, too late, or too often."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import ALIVE, Lifecycle, RestartPolicy, State

POLICY = RestartPolicy(backoff_base_s=0.5, backoff_max_s=4.0, intensity=4, window_s=20.0, open_s=10.0)


class LifecycleMachine(RuleBasedStateMachine):
    """Do to a lifecycle what `Supervised` can do to it, in any order and at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = 0.0
        self.lifecycle = Lifecycle("test", POLICY, lambda: self.chance)
        self.now_ns = 0
        self.has_process = False
        self.starts = 0
        self.first_starts = 0
        self.deaths: list[int] = []  # times of unwanted ones not forgiven since

    @rule(seconds=st.floats(0.0, 30.0), chance=st.floats(0.0, 0.999))
    def pass_time(self, seconds: float, chance: float) -> None:
        self.now_ns += int(seconds * NS_PER_S)
        self.chance = chance

    def may_start(self) -> bool:
        """Repeat what `Supervised.is_due` says of one that is wanted."""
        if self.has_process:
            return False
        return self.lifecycle.state is State.STOPPED or self.lifecycle.is_due(self.now_ns)

    @precondition(may_start)
    @rule(does_fork=st.booleans())
    def spawn(self, does_fork: bool) -> None:
        self.starts += 1
        self.first_starts += self.lifecycle.state is State.STOPPED
        self.lifecycle.started()
        if does_fork:
            self.has_process = True
        else:
            self.died()

    @precondition(lambda self: self.has_process)
    @rule()
    def beat(self) -> None:
        self.lifecycle.beat()

    @precondition(lambda self: self.has_process)
    @rule()
    def die(self) -> None:
        self.has_process = False
        self.died()

    @rule()
    def stop(self) -> None:
        self.lifecycle.stop()

    @rule()
    def restart(self) -> None:
        self.lifecycle.forgive()
        self.deaths.clear()
        self.lifecycle.stop()

    def died(self) -> None:
        before = self.lifecycle.state
        self.lifecycle.died(self.now_ns)
        if before is State.STOPPING:
            assert (State.STOPPED, None) == (self.lifecycle.state, self.lifecycle.retry_at_ns)
            return
        self.deaths = [death for death in self.deaths if self.now_ns - death <= POLICY.window_s * NS_PER_S]
        self.deaths.append(self.now_ns)
        assert self.lifecycle.retry_at_ns is not None
        wait_s = (self.lifecycle.retry_at_ns - self.now_ns) / NS_PER_S
        if before is State.HALF_OPEN or len(self.deaths) >= POLICY.intensity:
            assert (State.FAILED, POLICY.open_s) == (self.lifecycle.state, wait_s)
        else:
            assert State.BACKOFF is self.lifecycle.state
            ceiling_s = min(POLICY.backoff_max_s, POLICY.backoff_base_s * 2 ** (len(self.deaths) - 1))
            assert ceiling_s / 2 - 1e-6 <= wait_s <= ceiling_s

    @invariant()
    def state_and_process_agree(self) -> None:
        assert self.has_process == self.lifecycle.is_alive == (self.lifecycle.state in ALIVE)

    @invariant()
    def a_retry_is_planned_exactly_where_one_is_due(self) -> None:
        is_waiting = self.lifecycle.state in (State.BACKOFF, State.FAILED)
        assert is_waiting == (self.lifecycle.retry_at_ns is not None)

    @invariant()
    def restarts_are_all_starts_but_the_wanted_ones(self) -> None:
        assert self.starts - self.first_starts == self.lifecycle.restarts

    @invariant()
    def the_breaker_tells_the_state(self) -> None:
        expected = {State.FAILED: "open", State.HALF_OPEN: "half_open"}.get(self.lifecycle.state, "closed")
        assert expected == self.lifecycle.breaker


LifecycleMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestLifecycle = LifecycleMachine.TestCase
