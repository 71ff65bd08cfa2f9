"""A supervised process, plugin worker or sender: its lifecycle, its pid, and how it is made to end.

Owns the way from "should run" to a living process and back. What the process does is the subclass's business, which
says how to spawn it, how to ask it to stop, and when it counts as hung.
"""

from __future__ import annotations

import logging
import os
import random
import signal
from collections import deque

from kon_agent import clock
from kon_agent.clock import NS_PER_S
from kon_agent.lifecycle import Lifecycle, RestartPolicy, State
from kon_agent.linux.pidfd import PidFd
from kon_agent.process import Child, Exit, describe_exit
from kon_agent.supervisor.handover import Life

log = logging.getLogger(__name__)

MAX_DEATHS = 5  # that are remembered: as many as open the breaker
ABORT_GRACE_NS = NS_PER_S  # between SIGABRT, which dumps the stack, and SIGKILL


class Supervised:
    """One process that should run, or not.

    Args:
        name: what the log calls it.
        stop_grace_s: how long it may take to stop when asked; then it is killed.
    """

    def __init__(self, name: str, stop_grace_s: float) -> None:
        self.name = name
        self.is_wanted = False
        self.obstacle = ""  # why it cannot run at all here; empty: it can
        self.child: Child | None = None
        self.last_exit: str | None = None
        self.deaths: deque[tuple[int, str]] = deque(maxlen=MAX_DEATHS)  # wall time in ns, and the reason
        self.started_ns = 0
        self.lifecycle = Lifecycle(name, RestartPolicy(), random.random)
        self.stop_grace_s = stop_grace_s
        self._kill_at_ns: int | None = None
        self._kill_reason = ""

    # What a subclass says.

    def _spawn(self, now_ns: int) -> Child:
        raise NotImplementedError

    def _ask_to_stop(self) -> None:
        raise NotImplementedError

    def _heartbeat_ns(self) -> int:
        """Return when it last showed life in this incarnation; 0: not yet."""
        raise NotImplementedError

    def _patience_ns(self) -> int:
        """Return how long it may be silent."""
        raise NotImplementedError

    def _last_words(self) -> str:
        return ""

    def _on_gone(self) -> None:
        """Its process is no more."""

    # What the loop asks for.

    @property
    def pid(self) -> int | None:
        """The process's id; None where there is none."""
        return self.child.pid if self.child else None

    def is_due(self, now_ns: int) -> bool:
        """Whether it should be spawned now."""
        if not self.is_wanted or self.obstacle or self.child is not None:
            return False
        return self.lifecycle.state is State.STOPPED or self.lifecycle.is_due(now_ns)

    def spawn(self, now_ns: int) -> None:
        """Start its process; a failure to do so counts as a death."""
        self.started_ns = now_ns
        self.lifecycle.started()
        try:
            self.child = self._spawn(now_ns)
        except OSError as err:
            self._note_death(f"could not be started: {err}")
            log.error("%s %s", self.name, self.last_exit)
            self._on_gone()
            self.lifecycle.died(now_ns)

    def stop(self, now_ns: int) -> None:
        """Make it end; it is killed if it takes longer than its grace."""
        if self.child is not None and self.lifecycle.state is not State.STOPPING:
            self._ask_to_stop()
            self._kill_at_ns = now_ns + int(self.stop_grace_s * NS_PER_S)
        self.lifecycle.stop()

    def restart(self, now_ns: int) -> None:
        """Make it end and start afresh, past deaths forgotten."""
        self.lifecycle.forgive()
        self.stop(now_ns)

    def renew(self, now_ns: int, grace_s: float) -> None:
        """Replace its process by one of the present code, in its own good time: it is killed only after `grace_s`."""
        if self.child is not None and self.lifecycle.state is not State.STOPPING:
            self.stop(now_ns)
            self._kill_at_ns = now_ns + int(grace_s * NS_PER_S)

    def capture_life(self) -> Life:
        """Return what the code that takes our place must know of the process."""
        return Life(
            pid=self.pid,
            state=self.lifecycle.state if self.child is not None else State.STOPPED,
            restarts=self.lifecycle.restarts,
            last_exit=self.last_exit,
            deaths=list(self.deaths),
            started_ns=self.started_ns,
            kill_at_ns=self._kill_at_ns,
            kill_reason=self._kill_reason,
        )

    def adopt_life(self, life: Life) -> None:
        """Go on with the process another supervisor has spawned; it is our child, reaped by nobody yet.

        Raises:
            OSError: it is not, or no descriptor is left.
        """
        self.child = Child(life.pid, PidFd(life.pid)) if life.pid is not None else None
        self.lifecycle.resume(life.state, life.restarts)
        self.last_exit, self.started_ns = life.last_exit, life.started_ns
        self.deaths.extend(life.deaths)
        self._kill_at_ns, self._kill_reason = life.kill_at_ns, life.kill_reason

    def look(self, now_ns: int, awake_since_ns: int = 0) -> None:
        """Note a new heartbeat; start to kill it where it is overdue, finish where that was not enough.

        Args:
            awake_since_ns: since when the machine runs, after having stood still; silence before that says nothing.
        """
        if self.child is None:
            return
        heartbeat_ns = self._heartbeat_ns()
        if heartbeat_ns > now_ns + NS_PER_S:
            self.kill("its heartbeat lies in the future", now_ns)
        elif heartbeat_ns and self.lifecycle.state is not State.STOPPING:
            self.lifecycle.beat()
        if self._kill_at_ns is not None:
            if now_ns >= self._kill_at_ns:
                self.child.pidfd.send(signal.SIGKILL)
            return
        silent_ns = now_ns - max(heartbeat_ns, self.started_ns, awake_since_ns)
        if silent_ns > self._patience_ns():
            self.kill(f"hung: silent for {silent_ns / NS_PER_S:.1f} s", now_ns)

    def kill(self, reason: str, now_ns: int) -> None:
        """Abort it for `reason`, with a dump of its stack in the log if it still can; SIGKILL follows."""
        if self.child is None or self._kill_at_ns is not None:
            return
        log.error("%s is killed: %s", self.name, reason)
        self._kill_reason = reason
        self._kill_at_ns = now_ns + ABORT_GRACE_NS
        self.child.pidfd.send(signal.SIGABRT)

    def next_deadline_ns(self) -> int | None:
        """Return when this one needs the loop's attention next, silence aside."""
        return self._kill_at_ns if self.child is not None else self.lifecycle.retry_at_ns

    def gone(self, ended: Exit, now_ns: int) -> None:
        """Its process has been reaped."""
        assert self.child is not None
        self.child.pidfd.close()
        self.child = None
        was_wanted = self.lifecycle.state is not State.STOPPING
        reason = ": ".join(part for part in (describe_exit(ended), self._kill_reason or self._last_words()) if part)
        self._kill_at_ns, self._kill_reason = None, ""
        if was_wanted or ended.code != os.EX_OK:
            self._note_death(reason)
        self._on_gone()
        if was_wanted:
            log.error("%s died: %s", self.name, reason)
        self.lifecycle.died(now_ns)

    def _note_death(self, reason: str) -> None:
        self.last_exit = reason
        self.deaths.append((clock.wall_ns(), reason))
