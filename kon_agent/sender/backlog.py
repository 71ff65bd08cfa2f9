"""The backlog: the spool as a second lane, with its moods. The disk may be full, failing or not there at all.

Owns the spool, the order in which its chunks are answered, and the report of both. A disk that cannot be used is told
once and tried again every RETRY_S; meanwhile records stay in their rings.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kon_agent.clock import NS_PER_S
from kon_agent.errors import SpoolError
from kon_agent.ring import Drop
from kon_agent.sender.lane import Lost, Portion, Run
from kon_agent.spec import SpoolSeat
from kon_agent.spool.disk import Folder
from kon_agent.spool.frame import Entry
from kon_agent.spool.log import Chunk, Reason, Spool
from kon_agent.spoolreport import PluginTally, Slots, SpoolMode, SpoolReport

log = logging.getLogger(__name__)

RETRY_S = 5.0  # a full disk is freed by hand or by a log rotation: no need to ask more often


@dataclass(frozen=True, slots=True)
class Parcel:
    """Spooled records and losses of one stream: `dialect.Parcel`."""

    plugin: str
    epoch: int
    runs: list[Run]
    losses: list[Lost]

    @property
    def record_count(self) -> int:
        """How many records it carries."""
        return sum(len(run.records) for run in self.runs)


@dataclass(slots=True, eq=False)
class Taken:
    """A chunk on its way, as parcels."""

    chunk: Chunk
    parcels: list[Parcel]
    rejected: Mapping[tuple[str, int], int] = field(default_factory=dict)
    is_settled: bool = False


class Backlog:
    """The spool, whatever state its disk is in.

    Args:
        seat: the way to the folder, its limits, and the page its figures go to.
        plugins: the supervisor's names; a name's place is its slot in the report.
    """

    def __init__(self, seat: SpoolSeat, plugins: Sequence[str]) -> None:
        self._folder = Folder(seat.folder_fd) if seat.folder_fd >= 0 else None
        self._limits = seat.limits
        self._slots = Slots(plugins)
        self._page = seat.writer
        self._spool: Spool | None = None
        self._taken: deque[Taken] = deque()
        self._retry_at_ns = 0
        data = seat.reader.read()
        self._report = SpoolReport.decode(data) if data is not None else SpoolReport()
        self._write_trouble = seat.obstacle
        self._read_trouble = ""
        self._is_told = False  # that there is no folder
        self._is_kept = False  # whether the last attempt to keep records succeeded

    def open(self, wall_s: float) -> None:
        """Take the folder and learn what it holds; a predecessor's progress is taken over."""
        if self._folder is None:
            if not self._is_told:
                log.warning("no spool: %s; records of an outage stay in the rings", self._write_trouble)
                self._is_told = True
            self.publish()
            return
        try:
            self._folder.lock()
            spool = Spool(self._folder, self._limits)
            spool.open(wall_s)
            spool.resume(*self._report.position)
        except (OSError, SpoolError) as err:
            self._fail_to_write(str(err), 0)
            return
        self._spool = spool
        self._recover()
        if not spool.is_empty():
            log.info("the spool holds %d records", sum(spool.pending.values()))
        self.publish()

    def know(self, plugin: str) -> None:
        """Take notice of a plugin: the supervisor has named it, after those before."""
        self._slots.give(plugin)

    def highest(self) -> dict[tuple[str, int], int]:
        """Return the highest sequence number on disk of each plugin and epoch."""
        return self._spool.highest() if self._spool else {}

    def keep(self, portions: Sequence[Portion], now_ns: int, wall_s: float) -> bool:
        """Make `portions` durable; return whether they are."""
        if now_ns < self._retry_at_ns:
            return False
        if self._spool is None:
            self.open(wall_s)
        if self._spool is None:
            self._retry_at_ns = now_ns + int(RETRY_S * NS_PER_S)
            return False
        try:
            self._spool.store([entry for portion in portions for entry in _entries(portion)], wall_s)
        except SpoolError as err:
            self._fail_to_write(str(err), now_ns)
            return False
        self._recover()
        self._is_kept = True
        self.publish()
        return True

    def retry(self, now_ns: int, wall_s: float) -> None:
        """Try a disk again that has failed, though there is nothing to keep: somebody may be waiting to see it work."""
        if not self._write_trouble or self._folder is None or now_ns < self._retry_at_ns:
            return
        if self._spool is None:
            self.open(wall_s)
            if self._spool is None:
                self._retry_at_ns = now_ns + int(RETRY_S * NS_PER_S)
            return
        try:
            self._spool.probe()
        except SpoolError as err:
            self._fail_to_write(str(err), now_ns)
        else:
            self._recover()

    def _recover(self) -> None:
        if self._write_trouble:
            log.info("the spool works again")
        self._retry_at_ns, self._write_trouble = 0, ""

    def _fail_to_write(self, why: str, now_ns: int) -> None:
        if why != self._write_trouble:
            log.error("the spool cannot be used: %s; records stay in the rings meanwhile", why)
        self._write_trouble = why
        self._retry_at_ns = now_ns + int(RETRY_S * NS_PER_S)
        self.publish()

    def insist(self) -> None:
        """Ask the disk once more, however recently it refused: there will be no other time."""
        self._retry_at_ns = 0

    def is_resting(self, now_ns: int) -> bool:
        """Whether the disk has refused and is not to be asked again yet."""
        return now_ns < self._retry_at_ns

    def is_empty(self) -> bool:
        """Whether there is nothing to deliver."""
        return self._spool is None or (self._spool.is_empty() and not self._taken)

    def has_unread(self) -> bool:
        """Whether `take` has something to give."""
        return self._spool is not None and not self._spool.is_empty()

    def take(self, max_records: int, max_bytes: int) -> Taken | None:
        """Read the next batch; None where there is none, or the disk does not give it."""
        if self._spool is None:
            return None
        while True:
            try:
                chunk = self._spool.read(max_records, max_bytes)
            except SpoolError as err:
                if str(err) != self._read_trouble:
                    log.error("the spool cannot be read: %s; what it holds is delivered later", err)
                self._read_trouble = str(err)
                self.publish()
                return None
            self._read_trouble = ""
            if chunk is None:
                return None
            taken = Taken(chunk, _parcels(chunk.entries))
            self._taken.append(taken)
            if chunk.entries:
                return taken
            taken.is_settled = True  # the end of a segment: nothing to send, but its turn has to come
            self._acknowledge()

    def settle(self, taken: Taken, rejected: Mapping[tuple[str, int], int]) -> None:
        """The server has answered for `taken`."""
        taken.is_settled, taken.rejected = True, rejected
        self._acknowledge()

    def _acknowledge(self) -> None:
        while self._taken and self._taken[0].is_settled and self._spool is not None:
            taken = self._taken.popleft()
            for parcel in taken.parcels:
                tally = self._tally(parcel.plugin)
                refused = min(taken.rejected.get((parcel.plugin, parcel.epoch), 0), parcel.record_count)
                tally.acked += parcel.record_count - refused
                tally.rejected += refused
                tally.pending -= parcel.record_count
            self._report.position = taken.chunk.number, taken.chunk.end
            self._page.publish(self._report.encode())  # first: a successor must not count these again
            self._spool.acknowledge(taken.chunk)
        self.publish()

    def lose_connection(self) -> None:
        """What was in flight will be read again."""
        if self._spool is not None:
            self._spool.rewind([taken.chunk for taken in self._taken])
        self._taken.clear()

    def show(self, is_connected: bool) -> None:
        """Publish what the spool is doing."""
        if self._write_trouble:
            mode = SpoolMode.MEMORY
        elif self.is_empty():
            mode = SpoolMode.IDLE
        elif is_connected:
            mode = SpoolMode.DRAINING
        else:
            mode = SpoolMode.SPOOLING if self._is_kept else SpoolMode.WAITING
        self._is_kept = False
        self._report.mode = mode
        self.publish()

    def publish(self) -> None:
        """Publish the spool's figures."""
        report, spool = self._report, self._spool
        report.detail = self._write_trouble or self._read_trouble
        if spool is not None:
            report.disk_bytes, report.segments = spool.bytes_on_disk(), spool.segment_count()
            report.oldest_s = spool.oldest_s() or 0.0
            for tally in report.plugins:
                tally.pending = 0
            for plugin, count in spool.pending.items():
                self._tally(plugin).pending += count
            for (plugin, reason), count in spool.dropped.items():
                field_name = {Reason.EVICTED: "evicted", Reason.CORRUPT: "corrupt", Reason.EXPIRED: "expired"}[
                    Reason(reason)
                ]
                tally = self._tally(plugin)
                setattr(tally, field_name, getattr(tally, field_name) + count)
            spool.dropped.clear()
        self._page.publish(report.encode())

    def _tally(self, plugin: str) -> PluginTally:
        return self._report.plugins[self._slots.of(plugin)]

    def close(self) -> None:
        """Finish the files in order."""
        if self._spool is not None:
            self._spool.close()
        self.publish()


def _entries(portion: Portion) -> list[Entry]:
    plugin, epoch = portion.plugin, portion.epoch
    records = [
        Entry(plugin, epoch, seq, payload)
        for run in portion.runs
        for seq, payload in enumerate(run.records, run.first_seq)
    ]
    losses = [Entry(plugin, epoch, lost.first_seq, b"", lost.count, lost.drop) for lost in portion.losses]
    return losses + records  # a torn write keeps the front: a loss without its records is harmless, not the reverse


def _parcels(entries: Sequence[Entry]) -> list[Parcel]:
    parcels: dict[tuple[str, int], Parcel] = {}
    for entry in entries:
        key = (entry.plugin, entry.epoch)
        parcel = parcels.get(key) or parcels.setdefault(key, Parcel(*key, [], []))
        if entry.is_loss:
            parcel.losses.append(Lost(entry.seq, entry.count, Drop(entry.reason)))
        elif parcel.runs and parcel.runs[-1].first_seq + len(parcel.runs[-1].records) == entry.seq:
            parcel.runs[-1].records.append(entry.payload)
        else:
            parcel.runs.append(Run(entry.seq, [entry.payload]))
    return list(parcels.values())
