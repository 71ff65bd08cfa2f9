"""One plugin under supervision: its worker, its rings, and its totals over all of them.

Invariants:
* A worker has a ring of its own, made for it and never given to another; a dead worker's ring stays until the sender
  has drained it, and its figures then go into the totals. So the plugin's figures never go back.
* No more than MAX_WAITING_RINGS wait to be drained; while as many do, no new worker is spawned, so that a crash loop
  during an outage holds memory within a bound and loses nothing.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import LogConfig, PluginConfig
from kon_agent.linux.privileges import User
from kon_agent.process import Child, Profile, Role, spawn
from kon_agent.ring import Pulse, Verdict
from kon_agent.spec import WorkerSpec
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.sharedring import SharedRing

MAX_WAITING_RINGS = 8
STOP_GRACE_S = 0.4  # "disable" promises an end within 500 ms; a killed worker loses at most the record it was writing
START_PATIENCE_S = 15.0  # imports on a slow SD card, and the first cycle
MIN_DEADLINE_S = 5.0

Grants = Callable[[], Mapping[str, memoryview]]
"""Maps a plugin's shared memory; called in its worker before the drop."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all workers share.

    Attributes:
        user: whom they become; None without root.
        doorbell: eventfd that wakes the sender.
        log: how they log.
        announce: tells the sender of a new ring; `dismiss` of one whose producer is dead.
        next_ring_number: numbers the rings of this supervisor.
    """

    user: User | None
    doorbell: int
    log: LogConfig
    announce: Callable[[SharedRing], None]
    dismiss: Callable[[SharedRing], None]
    next_ring_number: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Figures:
    """A plugin's terms of the conservation law, over all its rings."""

    produced: int
    acked: int
    in_flight: int
    in_ring: int
    spooled: int
    dropped: dict[str, int]
    ring_used_bytes: int
    ring_size_bytes: int


class Unit(Supervised):
    """One plugin.

    Args:
        plugin: its name.
        target: its collector, `module:Class`.
        config: its section.
        surroundings: what all workers share.
        grants: what it may read besides the kernel's files.
    """

    def __init__(
        self, plugin: str, target: str, config: PluginConfig, surroundings: Surroundings, grants: Grants
    ) -> None:
        super().__init__(f"worker {plugin}", STOP_GRACE_S)
        self.plugin = plugin
        self.config = config
        self.is_wanted = config.enable
        self.ring: SharedRing | None = None
        self._target = target
        self._around = surroundings
        self._grants = grants
        self._waiting: list[SharedRing] = []
        self._totals: Counter[str] = Counter()
        self._missed_before = 0

    def rings(self) -> list[SharedRing]:
        """Return every ring that is not drained yet, the oldest first."""
        return [*self._waiting, self.ring] if self.ring else list(self._waiting)

    def is_due(self, now_ns: int) -> bool:
        """Whether a worker should be spawned now."""
        return super().is_due(now_ns) and len(self._waiting) < MAX_WAITING_RINGS

    @property
    def is_held_back(self) -> bool:
        """Whether no worker is spawned because too many rings wait for the sender."""
        return len(self._waiting) >= MAX_WAITING_RINGS

    def _spawn(self, now_ns: int) -> Child:
        ring = self.ring = SharedRing(self._around.next_ring_number(), self.plugin, self.config.ring_size)
        self._around.announce(ring)
        role = Role(
            title=f"kon-agent: worker {self.plugin}",
            body="kon_agent.worker:main",
            keep_fds=(self._around.doorbell,),
            user=self._around.user,
            profile=Profile(),
        )

        def specify() -> WorkerSpec:
            return WorkerSpec(
                name=self.plugin,
                target=self._target,
                config=self.config,
                producer=ring.map_producer(),
                doorbell=self._around.doorbell,
                grants=self._grants(),
                log=self._around.log,
            )

        return spawn(role, prepare=specify)

    def _ask_to_stop(self) -> None:
        if self.child is not None:
            self.child.pidfd.send(signal.SIGTERM)

    def _heartbeat_ns(self) -> int:
        return self.pulse().heartbeat_ns

    def _patience_ns(self) -> int:
        if not self._heartbeat_ns():
            return int((START_PATIENCE_S + self.config.period) * NS_PER_S)
        deadline = self.config.deadline
        return int((self.config.period + (deadline or max(MIN_DEADLINE_S, 2 * self.config.period))) * NS_PER_S)

    def _last_words(self) -> str:
        return self.ring.observer.last_words() if self.ring else ""

    def _on_gone(self) -> None:
        if self.ring is not None:
            self._missed_before += self.pulse().missed_ticks
            self.ring.is_closed = True
            self._around.dismiss(self.ring)
            self._waiting.append(self.ring)
            self.ring = None

    def pulse(self) -> Pulse:
        """Return the current worker's sign of life."""
        return self.ring.observer.pulse() if self.ring else Pulse(0, 0, 0, 0)

    @property
    def missed_ticks(self) -> int:
        """Ticks skipped since the supervisor started."""
        return self._missed_before + self.pulse().missed_ticks

    def settle_rings(self, now_ns: int) -> None:
        """Release rings the sender has concluded; a worker whose ring it found to be nonsense is replaced."""
        if self.ring is not None and self.ring.observer.stats().verdict is not Verdict.OPEN:
            self.kill("its ring holds what no worker writes", now_ns)
            return
        for ring in list(self._waiting):
            stats = ring.observer.stats()
            if stats.verdict is not Verdict.OPEN:
                self._totals.update(produced=stats.produced, acked=stats.acked, spooled=stats.spooled)
                self._totals.update({drop.name.lower(): count for drop, count in stats.dropped.items()})
                self._waiting.remove(ring)
                ring.release()

    def figures(self) -> Figures:
        """Return the plugin's terms of the conservation law."""
        totals = Counter(self._totals)
        in_flight = in_ring = used = 0
        for ring in self.rings():
            stats = ring.observer.stats()
            totals.update(produced=stats.produced, acked=stats.acked, spooled=stats.spooled)
            totals.update({drop.name.lower(): count for drop, count in stats.dropped.items()})
            in_flight += stats.in_flight
            in_ring += stats.in_ring
            used += stats.used_bytes
        return Figures(
            produced=totals.pop("produced", 0),
            acked=totals.pop("acked", 0),
            in_flight=in_flight,
            in_ring=in_ring,
            spooled=totals.pop("spooled", 0),
            dropped={reason: count for reason, count in sorted(totals.items()) if count},
            ring_used_bytes=used,
            ring_size_bytes=int(self.config.ring_size),
        )
