"""The life of one supervised process, as data: states, the events that move them, and when it may try again.

Pure: time and chance come in as arguments, nothing is spawned or killed here. A missing key in TRANSITIONS is the
error, so an event that cannot happen in a state is a bug found, not a state invented.

    STOPPED ──start──▶ STARTING ──beat──▶ RUNNING
                          │ died             │ died
                          ▼                  ▼
                       BACKOFF ◀─────────────┘       too many deaths: FAILED (breaker open)
                          │ retry                       │ retry
                          └──▶ STARTING                 └──▶ HALF_OPEN ──beat──▶ RUNNING
                                                                │ died ──▶ FAILED
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kon_agent.clock import NS_PER_S

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a supervised process is in its life."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"  # spawned, no heartbeat yet
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"  # died, waits for its next try
    STOPPING = "STOPPING"  # told to end, not yet gone
    FAILED = "FAILED"  # breaker open: died too often, rests
    HALF_OPEN = "HALF_OPEN"  # the one try after that rest


class Event(enum.Enum):
    """What can happen to it."""

    START = "start"
    BEAT = "beat"
    DIED = "died"
    BROKE = "broke"  # died once too often
    STOP = "stop"
    RETRY = "retry"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.START): State.STARTING,
    (State.STARTING, Event.BEAT): State.RUNNING,
    (State.STARTING, Event.DIED): State.BACKOFF,
    (State.STARTING, Event.BROKE): State.FAILED,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.RUNNING, Event.BEAT): State.RUNNING,
    (State.RUNNING, Event.DIED): State.BACKOFF,
    (State.RUNNING, Event.BROKE): State.FAILED,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.BACKOFF, Event.RETRY): State.STARTING,
    (State.BACKOFF, Event.STOP): State.STOPPED,
    (State.STOPPING, Event.BEAT): State.STOPPING,
    (State.STOPPING, Event.DIED): State.STOPPED,
    (State.STOPPING, Event.BROKE): State.STOPPED,
    (State.STOPPING, Event.STOP): State.STOPPING,
    (State.STOPPED, Event.STOP): State.STOPPED,
    (State.FAILED, Event.RETRY): State.HALF_OPEN,
    (State.FAILED, Event.STOP): State.STOPPED,
    (State.HALF_OPEN, Event.BEAT): State.RUNNING,
    (State.HALF_OPEN, Event.DIED): State.FAILED,
    (State.HALF_OPEN, Event.BROKE): State.FAILED,
    (State.HALF_OPEN, Event.STOP): State.STOPPING,
}

ALIVE = frozenset({State.STARTING, State.RUNNING, State.STOPPING, State.HALF_OPEN})
"""The states in which a process exists."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How soon and how often to try again.

    Attributes:
        backoff_base_s, backoff_max_s: the wait doubles from base to max with every death in the window.
        intensity: deaths within `window_s` that open the breaker.
        window_s: how long a death counts.
        open_s: how long an open breaker rests before its one probe.
    """

    backoff_base_s: float = 0.5
    backoff_max_s: float = 30.0
    intensity: int = 5
    window_s: float = 60.0
    open_s: float = 60.0


class Lifecycle:
    """One supervised process's state and its prospects.

    Args:
        name: what the log calls it.
        policy: how soon and how often to try again.
        chance: returns a number in [0, 1), for jitter.
    """

    def __init__(self, name: str, policy: RestartPolicy, chance: Callable[[], float]) -> None:
        self.name = name
        self.state = State.STOPPED
        self.restarts = 0
        self.retry_at_ns: int | None = None
        self._policy = policy
        self._chance = chance
        self._deaths: deque[int] = deque(maxlen=policy.intensity)

    def resume(self, state: State, restarts: int) -> None:
        """Go on from where another has left off; the deaths it has seen are no business of ours."""
        self.state, self.restarts = state, restarts

    @property
    def is_alive(self) -> bool:
        """Whether a process exists."""
        return self.state in ALIVE

    @property
    def breaker(self) -> str:
        """The breaker as users name it: closed, open or half_open."""
        return {State.FAILED: "open", State.HALF_OPEN: "half_open"}.get(self.state, "closed")

    def started(self) -> None:
        """A process was spawned: the first one, or the one that was due."""
        if self.state is State.STOPPED:
            self._set_state(Event.START)
        else:
            self.restarts += 1
            self._set_state(Event.RETRY)
        self.retry_at_ns = None

    def beat(self) -> None:
        """It has shown a new heartbeat."""
        self._set_state(Event.BEAT)

    def stop(self) -> None:
        """It is to end, or not to be tried again."""
        self.retry_at_ns = None
        self._set_state(Event.STOP)

    def died(self, now_ns: int) -> None:
        """It is gone. Unless that was wanted, `retry_at_ns` says when to try again."""
        if self.state is State.STOPPING:
            self._set_state(Event.DIED)
            return
        window_ns = int(self._policy.window_s * NS_PER_S)
        while self._deaths and now_ns - self._deaths[0] > window_ns:
            self._deaths.popleft()
        self._deaths.append(now_ns)
        broke = len(self._deaths) >= self._policy.intensity
        self._set_state(Event.BROKE if broke else Event.DIED)
        wait_s = self._policy.open_s if self.state is State.FAILED else self._backoff_s()
        self.retry_at_ns = now_ns + int(wait_s * NS_PER_S)

    def is_due(self, now_ns: int) -> bool:
        """Whether the wait for the next try is over."""
        return self.retry_at_ns is not None and now_ns >= self.retry_at_ns

    def forgive(self) -> None:
        """Forget past deaths: somebody has looked and wants it tried afresh."""
        self._deaths.clear()

    def _backoff_s(self) -> float:
        ceiling = min(self._policy.backoff_max_s, self._policy.backoff_base_s * 2.0 ** (len(self._deaths) - 1))
        return ceiling * (0.5 + 0.5 * self._chance())  # half fixed, half jitter: a herd spreads, a restart stays prompt

    def _set_state(self, event: Event) -> None:
        old, self.state = self.state, TRANSITIONS[self.state, event]
        if old is not self.state:
            log.info("%s: %s -> %s", self.name, old.value, self.state.value)
