"""The sender under supervision: its process, its orders, its report.

Whatever happens to the sender, the rings stay: a new one is told of every ring that is not drained and reads on from
the committed tails.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kon_agent import channel, clock, credentials, linkreport, spoolreport
from kon_agent.channel import Order
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Config
from kon_agent.config.server import parse_server
from kon_agent.errors import SpoolError
from kon_agent.lifecycle import State
from kon_agent.linkreport import LinkReport
from kon_agent.linux.privileges import User
from kon_agent.process import Child, Profile, Role, spawn
from kon_agent.spec import SenderSpec, SpoolSeat
from kon_agent.spool import lock, place
from kon_agent.spool.limits import Limits
from kon_agent.spoolreport import Slots, SpoolReport
from kon_agent.supervisor import handover
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.sharedpage import SharedPage
from kon_agent.supervisor.sharedring import SharedRing

log = logging.getLogger(__name__)

SILENCE_MAX_S = 15.0  # the sender shows a sign of life each second
START_PATIENCE_S = 30.0  # importing the QUIC stack on a slow SD card
EXIT_GRACE_S = 1.0  # beyond the time it was given to deliver
CLAIM_PATIENCE_S = 5.0  # an orphaned sender writes its rings to disk and exits; a slow disk takes its time
CLAIM_INTERVAL_S = 0.1
FOLDER_RETRY_S = 30.0  # how often the spool's folder is looked for again; having it takes a new sender
SENDER_NOFILE = 256  # a socket and a few files; two more for each ring while it is being mapped


@dataclass(frozen=True, slots=True)
class Parts:
    """What the sender shares with the rest.

    Attributes:
        user: whom it becomes; None without root.
        doorbell: eventfd the workers ring.
        slots: whose slot in the spool's report is which.
        rings: returns every ring that is not drained.
    """

    user: User | None
    doorbell: int
    slots: Slots
    rings: Callable[[], Iterable[SharedRing]]


class Courier(Supervised):
    """The sender's process.

    Args:
        config: the whole configuration.
        parts: what it shares with the rest.
    """

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__("sender", _grace_s(config))
        self.is_wanted = True
        self.config = config
        self._parts = parts
        self._orders: socket.socket | None = None
        self._gone_wall_ns = clock.wall_ns()
        self._is_deaf = False
        self._is_homeless = False  # the sender runs without the spool's folder
        self._look_for_folder_ns = 0
        self._page = SharedPage("kon-link", linkreport.REPORT_BYTES)
        self._spool_page = SharedPage("kon-spool", spoolreport.REPORT_BYTES)

    def reconfigure(self, config: Config, now_ns: int) -> None:
        """Go on with another configuration: the process is replaced, the rings stay."""
        self.config, self.stop_grace_s = config, _grace_s(config)
        self.restart(now_ns)

    def capture(self) -> handover.Sender:
        """Return what the code that takes our place needs to go on with it."""
        return handover.Sender(
            life=self.capture_life(),
            orders_fd=None if self._orders is None else self._orders.fileno(),
            link_page_fd=self._page.fd,
            link_bytes=linkreport.REPORT_BYTES,
            spool_page_fd=self._spool_page.fd,
            spool_bytes=spoolreport.REPORT_BYTES,
            gone_wall_ns=self._gone_wall_ns,
        )

    def adopt(self, taken: handover.Sender) -> None:
        """Go on with the sender another supervisor has spawned, and with what it reports.

        Raises:
            KonError: what is handed over is not what it should be.
            OSError: the sender is not our child, or no memory or descriptor is left.
        """
        self._page.take_over(taken.link_page_fd)
        self._spool_page.take_over(taken.spool_page_fd)
        if taken.orders_fd is not None:
            self._orders = socket.socket(fileno=taken.orders_fd)
            self._orders.setblocking(False)
        self._gone_wall_ns = taken.gone_wall_ns
        self.adopt_life(taken.life)

    def claim_spool(self) -> None:
        """See that nobody else uses the spool; a sender whose supervisor has died is given time to finish.

        Raises:
            SpoolError: another agent does; the message names its pid.
        """
        folder_fd, _ = self._open_spool()
        if folder_fd < 0:
            return  # no spool at all: the sender says why, and does without
        try:
            deadline_ns = clock.now_ns() + int(CLAIM_PATIENCE_S * NS_PER_S)
            while (pid := lock.holder(folder_fd)) is not None:
                if clock.now_ns() > deadline_ns:
                    raise SpoolError(
                        f"the spool {place.folder_path(self.config.cache.path)} is in use by pid {pid}; "
                        "stop that agent, or choose another cache.path"
                    )
                time.sleep(CLAIM_INTERVAL_S)
        finally:
            os.close(folder_fd)

    def report(self) -> LinkReport:
        """Return the sender's latest word about its connection."""
        if self.child is None:
            return LinkReport(since_ns=self._gone_wall_ns, detail=self.last_exit or "the sender is not running")
        report = self._report()
        return report if report.alive_ns >= self.started_ns else LinkReport(since_ns=self._gone_wall_ns)

    def _report(self) -> LinkReport:
        data = self._page.reader.read()
        return LinkReport.decode(data) if data is not None else LinkReport()

    def spool_report(self) -> SpoolReport:
        """Return the sender's latest word about the spool."""
        data = self._spool_page.reader.read()
        return SpoolReport.decode(data) if data is not None else SpoolReport()

    def announce(self, ring: SharedRing) -> None:
        """Tell the sender, if there is one, of a ring to consume."""
        order = Order("attach", ring.number, ring.plugin, ring.epoch, int(ring.size_bytes))
        self._order(order, ring.consumer_fds())

    def dismiss(self, ring: SharedRing) -> None:
        """Tell the sender, if there is one, that a ring's producer is dead."""
        self._order(Order("close", ring.number))

    def _order(self, order: Order, fds: tuple[int, ...] = ()) -> None:
        if self._orders is None:
            return
        try:
            channel.send(self._orders, order, fds)
        except (BrokenPipeError, ConnectionError) as err:  # gone, about to be reaped: the next one hears of all rings
            log.debug("the sender is gone: %s", err)
        except OSError as err:
            log.warning("the sender could not be given an order: %s", err)
            self._is_deaf = True

    def _spawn(self, now_ns: int) -> Child:
        ours, theirs = channel.pair()
        config, parts = self.config, self._parts
        folder_fd, obstacle = self._open_spool()
        self._is_homeless = folder_fd < 0
        self._look_for_folder_ns = now_ns + int(FOLDER_RETRY_S * NS_PER_S)
        cache = config.cache
        limits = Limits(int(cache.max_size), float(cache.max_age), int(cache.min_free))
        role = Role(
            title="kon-agent: sender",
            body="kon_agent.sender.main:main",
            keep_fds=(theirs.fileno(), parts.doorbell, *((folder_fd,) if folder_fd >= 0 else ())),
            user=parts.user,
            profile=Profile(
                write=(folder_fd,) if folder_fd >= 0 else (),
                allow=frozenset({"network"}),
                nofile=SENDER_NOFILE,
                death_signal=None,
            ),
        )

        def specify() -> SenderSpec:
            return SenderSpec(
                agent_id=config.client_id,
                servers=[parse_server(url) for url in config.servers()],
                credentials=credentials.read(config.tls),
                batch=config.batch,
                orders=theirs,
                doorbell=parts.doorbell,
                report=self._page.map_writer(),
                plugins=parts.slots.names,
                spool=SpoolSeat(folder_fd, obstacle, limits, *self._spool_page.map_both()),
                log=config.log,
            )

        try:
            child = spawn(role, prepare=specify)
        finally:
            theirs.close()
            if folder_fd >= 0:
                os.close(folder_fd)
        self._orders = ours
        for ring in parts.rings():
            self.announce(ring)
            if ring.is_closed:
                self.dismiss(ring)
        return child

    def _open_spool(self) -> tuple[int, str]:
        """Return the spool's folder, or -1 and why it cannot be had."""
        user = self._parts.user
        try:
            path = self.config.cache.path
            return place.prepare(path, user.uid if user else os.getuid(), user.gid if user else os.getgid()), ""
        except SpoolError as err:
            return -1, str(err)

    def look(self, now_ns: int, awake_since_ns: int = 0) -> None:
        """Note its heartbeat; replace it where it does not take its orders: one lost could be a ring never read."""
        if self._is_deaf:
            self.kill("it does not take its orders", now_ns)
        if self._is_homeless and self.lifecycle.state is State.RUNNING and now_ns >= self._look_for_folder_ns:
            self._look_for_folder(now_ns)
        super().look(now_ns, awake_since_ns)

    def _look_for_folder(self, now_ns: int) -> None:
        """Replace a sender that has no spool once there can be one: its folder is opened before the drop."""
        self._look_for_folder_ns = now_ns + int(FOLDER_RETRY_S * NS_PER_S)
        folder_fd, _ = self._open_spool()
        if folder_fd >= 0:
            os.close(folder_fd)
            log.info("the spool's folder can be had now: a new sender takes it")
            self.restart(now_ns)

    def _ask_to_stop(self) -> None:
        self._order(Order("stop", timeout_s=float(self.config.shutdown_timeout)))

    def _heartbeat_ns(self) -> int:
        return self.report().alive_ns

    def _patience_ns(self) -> int:
        return int((SILENCE_MAX_S if self._heartbeat_ns() else START_PATIENCE_S) * NS_PER_S)

    def _last_words(self) -> str:
        report = self._report()
        return report.detail if report.alive_ns >= self.started_ns else ""

    def _on_gone(self) -> None:
        self._gone_wall_ns = clock.wall_ns()
        self._is_deaf = False
        if self._orders is not None:
            self._orders.close()
            self._orders = None

    def release(self) -> None:
        """Let go of what is left once the process is gone."""
        self._page.release()
        self._spool_page.release()


def _grace_s(config: Config) -> float:
    return config.shutdown_timeout + EXIT_GRACE_S
