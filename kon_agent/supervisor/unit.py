"""One plugin under supervision: its worker, its rings, and its totals over all of them.

Invariants:
* A worker has a ring of its own, made for it and never given to another; a dead worker's ring stays until the sender
  has drained it, and its figures then go into the totals. So the plugin's figures never go back.
* No more than MAX_WAITING_RINGS wait to be drained; while as many do, no new worker is spawned, so that a crash loop
  during an outage holds memory within a bound and loses nothing.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ExecConfig, ForeignConfig, LogConfig, PluginConfig
from kon_agent.errors import PluginError
from kon_agent.examination import source_of
from kon_agent.linux.privileges import User
from kon_agent.page import PageReader
from kon_agent.process import Child, Role, spawn
from kon_agent.ring import Pulse, Verdict
from kon_agent.spec import ORDERS_BYTES, WorkerSpec, encode_orders
from kon_agent.stderrpipe import StderrPipe
from kon_agent.supervisor import handover
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.instruments import Instrument
from kon_agent.supervisor.pace import Pace
from kon_agent.supervisor.profiles import profile_for
from kon_agent.supervisor.sharedpage import SharedPage
from kon_agent.supervisor.sharedring import SharedRing

log = logging.getLogger(__name__)

MAX_WAITING_RINGS = 8
STOP_GRACE_S = 0.4  # "disable" promises an end within 500 ms; a killed worker loses at most the record it was writing
START_PATIENCE_S = 15.0  # imports on a slow SD card, and the first cycle
MIN_DEADLINE_S = 5.0
STEER = signal.SIGUSR1  # look at your orders: they have changed


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
        instrument: what it reads besides the kernel's files.
    """

    def __init__(
        self,
        plugin: str,
        target: str,
        config: PluginConfig,
        surroundings: Surroundings,
        instrument: Instrument | None = None,
    ) -> None:
        super().__init__(f"worker {plugin}", STOP_GRACE_S)
        self.plugin = plugin
        self.target = target
        self.config = config
        self.log = surroundings.log  # how its next worker logs
        self.pace = Pace()
        self.is_wanted = config.enable
        self.ring: SharedRing | None = None
        self._around = surroundings
        self._instrument = instrument or Instrument()
        self._waiting: list[SharedRing] = []
        self._totals: Counter[str] = Counter()
        self._missed_before = 0
        self._period_s = float(config.period)
        self._stretch = 1
        self._stderr: StderrPipe | None = None
        self._orders = SharedPage(f"kon-orders-{plugin}", ORDERS_BYTES)
        self._has_new_orders = False
        self._steered_ns = 0  # before that, its worker went by another period
        self.pause_reason = ""  # why the governor does not let it run; empty: it does
        self._note_obstacle()
        self._write_orders()

    @property
    def period_s(self) -> float:
        """Seconds between its cycles, as things are."""
        return self._period_s * self._stretch

    def reconfigure(self, config: PluginConfig, now_ns: int) -> None:
        """Go on with another section: the worker is replaced."""
        self.config, self.is_wanted = config, config.enable
        self._note_obstacle()
        self._period_s = float(config.period)
        self._write_orders()
        self.restart(now_ns)

    def _note_obstacle(self) -> None:
        if isinstance(self.config, ForeignConfig):
            self.obstacle = self.config.obstacle

    @property
    def instrument(self) -> Instrument:
        """What it reads besides the kernel's files."""
        return self._instrument

    def set_period(self, period_s: float) -> None:
        """Change the period, without a new worker."""
        self._period_s = period_s
        self._steer()

    def stretch(self, factor: int) -> None:
        """Let its period be `factor` times what it should be."""
        if factor != self._stretch:
            self._stretch = factor
            self._steer()

    def pause(self, reason: str, now_ns: int) -> None:
        """Keep it from running, whatever else is wanted, until `resume`."""
        self.pause_reason = reason
        self.stop(now_ns)

    def resume(self) -> None:
        """Let it run again, if that is wanted."""
        self.pause_reason = ""

    def stop(self, now_ns: int) -> None:
        """Make its worker end; where there is none, as it has failed or waits, its instrument is let go if unwanted."""
        super().stop(now_ns)
        if self.child is None and not self.is_wanted:
            self._close_instrument()

    def _write_orders(self) -> None:
        self._orders.writer.publish(encode_orders(int(self.period_s * NS_PER_S)))

    def _steer(self) -> None:
        self._has_new_orders = True
        self._write_orders()
        # One that has not shown life yet may not be ready for a signal; it reads its orders when it is.
        if self.child is not None and self._heartbeat_ns():
            self.child.pidfd.send(STEER)

    def look(self, now_ns: int, awake_since_ns: int = 0) -> None:
        """Note a new heartbeat; replace a silent worker. One that was to run rarely was silent rightly until now."""
        if self._has_new_orders:
            self._has_new_orders, self._steered_ns = False, now_ns
        super().look(now_ns, max(awake_since_ns, self._steered_ns))
        if self._stderr is not None:
            self._stderr.pass_on(now_ns)
        if self.pace.is_due(now_ns, self.period_s):
            self.pace.note(self.figures().produced, now_ns)

    def release(self) -> None:
        """Let go of the memory; the worker is gone, or dies with us."""
        for ring in self.rings():
            ring.release()
        self._close_stderr()
        self._orders.release()
        self._close_instrument()

    def capture(self) -> handover.Plugin:
        """Return what the code that takes our place needs to go on with it."""
        return handover.Plugin(
            name=self.plugin,
            kind=self.config.type or self.plugin,
            life=self.capture_life(),
            is_wanted=self.is_wanted,
            was_enabled=self.config.enable,
            period_s=float(self._period_s),
            was_period_s=float(self.config.period),
            orders_fd=self._orders.fd,
            rings=[ring.capture() for ring in self.rings()],
            has_current=self.ring is not None,
            totals=dict(self._totals),
            missed_ticks=self._missed_before,
            stderr_fd=self._stderr.read_fd if self._stderr is not None else None,
        )

    def adopt(self, taken: handover.Plugin) -> None:
        """Go on with the worker, the rings and the figures another supervisor had for this plugin.

        What was changed by hand stays so, except where the configuration has been changed as well.

        Raises:
            KonError: what is handed over is not what it should be.
            OSError: the worker is not our child, or no memory or descriptor is left.
        """
        if taken.was_enabled == self.config.enable:
            self.is_wanted = taken.is_wanted
        if taken.was_period_s == self.config.period:
            self._period_s = taken.period_s
        self._totals.update(taken.totals)
        self._missed_before = taken.missed_ticks
        rings = [SharedRing.adopt(ring) for ring in taken.rings]
        self.ring = rings.pop() if taken.has_current else None
        self._waiting = rings
        if taken.stderr_fd is not None:
            self._stderr = StderrPipe(self.name, taken.stderr_fd)
        self.adopt_life(taken.life)
        self._orders.take_over(taken.orders_fd)
        self._steer()

    def count_missed(self, ticks: int) -> None:
        """Note ticks that no worker was there to keep."""
        self._missed_before += ticks

    def rings(self) -> list[SharedRing]:
        """Return every ring that is not drained yet, the oldest first."""
        return [*self._waiting, self.ring] if self.ring else list(self._waiting)

    def is_due(self, now_ns: int) -> bool:
        """Whether a worker should be spawned now."""
        return not self.pause_reason and super().is_due(now_ns) and len(self._waiting) < MAX_WAITING_RINGS

    @property
    def is_held_back(self) -> bool:
        """Whether no worker is spawned because too many rings wait for the sender."""
        return len(self._waiting) >= MAX_WAITING_RINGS

    def _spawn(self, now_ns: int) -> Child:
        self._open_instrument()
        ring = self.ring = SharedRing(self._around.next_ring_number(), self.plugin, self.config.ring_size)
        self._around.announce(ring)
        role = Role(
            title=f"kon-agent: worker {self.plugin}",
            body="kon_agent.worker:main",
            keep_fds=(self._around.doorbell,),
            user=self._around.user,
            profile=profile_for(self.config),
            stderr_fd=self._open_stderr(),
        )

        def specify() -> WorkerSpec:
            producer = ring.map_producer()
            try:
                source = source_of(self.config.origin) if isinstance(self.config, ForeignConfig) else b""
            except PluginError as err:
                producer.say(str(err))
                raise
            return WorkerSpec(
                name=self.plugin,
                target=self.target,
                source=source,
                config=self.config,
                producer=producer,
                doorbell=self._around.doorbell,
                grants=self._instrument.grants(),
                log=self.log,
                orders=PageReader(self._orders.map_readonly()),
            )

        child = spawn(role, prepare=specify)
        if self._stderr is not None:
            self._stderr.handed_out()
        return child

    def _open_instrument(self) -> None:
        """Make its instrument ready.

        Raises:
            OSError: it has failed in a way nobody foresaw: a death of this plugin, and no other's business.
        """
        try:
            self._instrument.open(self.config)
        except Exception as err:
            log.exception("what %s needs of the kernel cannot be made ready", self.name)
            raise OSError(f"{type(err).__name__}: {err}") from err

    def _close_instrument(self) -> None:
        try:
            self._instrument.close()
        except Exception:  # a bug of ours in one plugin's affairs; the agent goes on with the others
            log.exception("what %s needed of the kernel cannot be let go", self.name)

    def _ask_to_stop(self) -> None:
        if self.child is not None:
            self.child.pidfd.send(signal.SIGTERM)

    def _heartbeat_ns(self) -> int:
        return self.pulse().heartbeat_ns

    def _patience_ns(self) -> int:
        if not self._heartbeat_ns():
            return int((START_PATIENCE_S + self.period_s) * NS_PER_S)
        return int((self.period_s + (self.config.deadline or self._default_deadline_s())) * NS_PER_S)

    def _default_deadline_s(self) -> float:
        # A program may take its timeout; that it is killed then is not the worker's hang.
        run_s = float(self.config.timeout or self.period_s) if isinstance(self.config, ExecConfig) else 0.0
        return max(MIN_DEADLINE_S, 2 * self.period_s, run_s + MIN_DEADLINE_S)

    def _last_words(self) -> str:
        return self.ring.observer.last_words() if self.ring else ""

    def _open_stderr(self) -> int | None:
        """Return what third-party code has for standard error; None: ours will do."""
        if not isinstance(self.config, ForeignConfig):
            return None
        self._stderr = StderrPipe(self.name)
        return self._stderr.write_fd

    def _close_stderr(self) -> None:
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def _on_gone(self) -> None:
        self._close_stderr()
        if not self.is_wanted:
            self._close_instrument()
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
