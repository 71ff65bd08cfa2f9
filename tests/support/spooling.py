"""A spool and its books: everything stored, acknowledged and declared lost, and the law that binds them.

The caller's side of a spool, as the sender is: what `store` refuses is stored again with the next entries, chunks are
acknowledged in order, and each record is known by its identity and payload.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from kon_agent.errors import SpoolError
from kon_agent.spool.disk import Disk
from kon_agent.spool.frame import Entry
from kon_agent.spool.limits import Limits
from kon_agent.spool.log import Chunk, Spool

Identity = tuple[str, int, int]


def identity(entry: Entry) -> Identity:
    """Return a record's identity."""
    return entry.plugin, entry.epoch, entry.seq


def members(loss: Entry) -> list[Identity]:
    """Return the identities a loss stands for."""
    return [(loss.plugin, loss.epoch, seq) for seq in range(loss.seq, loss.last + 1)]


class Books:
    """One folder's spool, opened and reopened, with the books of all its lives.

    Args:
        disk: the folder.
        limits: what the spool may take.
    """

    def __init__(self, disk: Disk, limits: Limits) -> None:
        self.disk = disk
        self.limits = limits
        self.offered: dict[Identity, bytes] = {}  # ever given to `store`
        self.stored: set[Identity] = set()  # `store` returned
        self.acked: set[Identity] = set()
        self.lost: dict[Identity, int] = {}  # declared, by reason; for what had not been acknowledged
        self.known_lost: dict[Identity, int] = {}  # losses of the caller's own, stored like records
        self.refused: list[Entry] = []
        self.lives = 0
        self.earlier_drops: list[int] = []  # of each life before this one
        self.has_crashed = False
        self.in_flight: deque[Chunk] = deque()
        self.spool = Spool(disk, limits)

    def open(self, now_s: float = 0.0) -> None:
        """Begin a life."""
        self.lives += 1
        self.earlier_drops.append(sum(self.spool.dropped.values()))
        self.in_flight.clear()
        self.spool = Spool(self.disk, self.limits)
        self.spool.open(now_s)

    def store(self, entries: Sequence[Entry], now_s: float = 0.0) -> bool:
        """Store `entries`, those refused before first; return whether they are."""
        entries = [*self.refused, *entries]
        for entry in entries:
            if entry.is_loss:
                self.known_lost.update(dict.fromkeys(members(entry), entry.reason))
            else:
                self.offered[identity(entry)] = entry.payload
        self.refused = entries
        try:
            self.spool.store(entries, now_s)
        except SpoolError:
            self.check()
            return False
        self.refused = []
        self.stored.update(identity(entry) for entry in entries if not entry.is_loss)
        self.check()
        return True

    def read(self, max_records: int = 50, max_bytes: int = 1 << 16) -> Chunk | None:
        """Read a chunk and hold it against what was stored."""
        try:
            chunk = self.spool.read(max_records, max_bytes)
        except SpoolError:
            return None
        if chunk is not None:
            self.in_flight.append(chunk)
            for entry in chunk.entries:
                if not entry.is_loss:
                    assert self.offered.get(identity(entry)) == entry.payload, entry
                    if not self.has_crashed:
                        assert identity(entry) in self.stored, "what was refused is never delivered"
        self.check()
        return chunk

    def acknowledge(self) -> None:
        """Acknowledge the oldest chunk in flight."""
        chunk = self.in_flight.popleft()
        for entry in chunk.entries:
            if entry.is_loss:
                for each in members(entry):
                    if each not in self.acked and each not in self.known_lost:
                        self.lost.setdefault(each, entry.reason)
                continue
            if self.lives == 1:
                assert identity(entry) not in self.acked, "acknowledged twice"
            self.acked.add(identity(entry))
            self.lost.pop(identity(entry), None)  # as the receiver does: what arrives is stored
        self.spool.acknowledge(chunk)
        self.check()

    def rewind(self) -> None:
        """Lose the connection."""
        self.spool.rewind(list(self.in_flight))
        self.in_flight.clear()
        self.check()

    def drain(self) -> None:
        """Read and acknowledge everything."""
        for _ in range(100_000):
            if self.read() is None and self.spool.is_empty():
                return
            if self.in_flight:
                self.acknowledge()
        raise AssertionError("the spool never becomes empty")

    def check(self) -> None:
        """Hold the counts against the books, as far as they can be exact: not after a crash."""
        assert self.spool.undeclared == 0
        assert all(count >= 0 for count in self.spool.pending.values()), self.spool.pending
        if self.lives > 1:
            return
        stored = Counter(plugin for plugin, _, _ in self.stored)
        gone = Counter(plugin for plugin, _, _ in self.acked)
        for (plugin, _), count in self.spool.dropped.items():
            gone[plugin] += count
        for plugin in {*stored, *gone, *self.spool.pending}:
            held = stored[plugin] - gone[plugin]
            assert held == self.spool.pending[plugin], f"{plugin}: {held} held, {self.spool.pending} pending"

    def close_books(self) -> None:
        """Everything stored has been acknowledged or declared lost, and nothing is held any more."""
        missing = self.stored - self.acked - set(self.lost)
        assert not missing, f"{len(missing)} missing: {sorted(missing)[:5]}"
        assert not +self.spool.pending, self.spool.pending
        if not self.has_crashed:
            assert set(self.lost) <= self.stored, "nobody loses what he never had"
        if self.lives == 1:
            lost = Counter((plugin, reason) for (plugin, _, _), reason in self.lost.items())
            assert lost == +self.spool.dropped
