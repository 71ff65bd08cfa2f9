"""A circuit breaker: stop asking what keeps failing, rest, then ask once to see whether it is well again.

Pure: the time comes in as an argument. A missing key in TRANSITIONS is the error.

    CLOSED ──too many failures in a row──▶ OPEN ──rested──▶ HALF_OPEN ──success──▶ CLOSED
                                             ▲                  │
                                             └─────failure──────┘   each time for twice as long
"""

from __future__ import annotations

import enum
import logging

from kon_agent.clock import NS_PER_S

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # in a row: fewer are weather
FIRST_REST_S = 15.0
MAX_REST_S = 300.0  # so long at most goes unnoticed that it is well again


class State(enum.Enum):
    """Whether attempts are made."""

    CLOSED = "closed"  # all of them
    OPEN = "open"  # none
    HALF_OPEN = "half_open"  # the one that decides


class Event(enum.Enum):
    """What can happen to it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    BROKE = "broke"  # failed once too often
    RESTED = "rested"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.CLOSED, Event.SUCCEEDED): State.CLOSED,
    (State.CLOSED, Event.FAILED): State.CLOSED,
    (State.CLOSED, Event.BROKE): State.OPEN,
    (State.OPEN, Event.RESTED): State.HALF_OPEN,
    (State.OPEN, Event.SUCCEEDED): State.CLOSED,  # asked all the same, for want of anything else to ask
    (State.OPEN, Event.BROKE): State.OPEN,
    (State.HALF_OPEN, Event.SUCCEEDED): State.CLOSED,
    (State.HALF_OPEN, Event.BROKE): State.OPEN,
}


class Breaker:
    """One thing's breaker: ask `allows` before an attempt, and tell how each attempt has ended.

    Args:
        name: what the log calls it.
        max_failures: failures in a row that open it.
        first_rest_s: how long it stays open at first, in seconds; doubled with every failed probe.
        max_rest_s: how long at most.
    """

    def __init__(
        self,
        name: str,
        max_failures: int = MAX_FAILURES,
        first_rest_s: float = FIRST_REST_S,
        max_rest_s: float = MAX_REST_S,
    ) -> None:
        self.name = name
        self.state = State.CLOSED
        self._max_failures = max_failures
        self._first_rest_s = first_rest_s
        self._max_rest_s = max_rest_s
        self._failures = 0
        self._rests = 0
        self._rested_ns = 0

    @property
    def is_open(self) -> bool:
        """Whether no attempt is made."""
        return self.state is State.OPEN

    def allows(self, now_ns: int) -> bool:
        """Whether to make an attempt now; after a rest, that is the probe."""
        if self.state is State.OPEN and now_ns >= self._rested_ns:
            self._set_state(Event.RESTED)
        return self.state is not State.OPEN

    def succeeded(self) -> None:
        """An attempt went well: all is forgotten."""
        self._failures = self._rests = 0
        self._set_state(Event.SUCCEEDED)

    def failed(self, now_ns: int) -> None:
        """An attempt failed at `now_ns`."""
        self._failures += 1
        if self.state is State.CLOSED and self._failures < self._max_failures:
            self._set_state(Event.FAILED)
            return
        rest_s = min(self._max_rest_s, self._first_rest_s * 2.0 ** min(self._rests, 32))
        self._rests += 1
        self._rested_ns = now_ns + int(rest_s * NS_PER_S)
        self._set_state(Event.BROKE)

    def _set_state(self, event: Event) -> None:
        old, self.state = self.state, TRANSITIONS[self.state, event]
        if old is not self.state:
            log.info("breaker of %s: %s -> %s", self.name, old.value, self.state.value)
