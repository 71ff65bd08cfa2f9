"""The ledger: which sequence numbers of an epoch have been stored, and which the agent has declared lost.

Exactly-once rests on this page: the store writes records and ledger in one transaction, and only what `store`
returns as new is written. Pure; the store loads it, asks it, and persists the changes it reports.

Invariants:
* An epoch received in full is one range.
* No number is both stored and lost, nor lost for two reasons: what arrives after all is stored and its loss
  taken back.
"""

from __future__ import annotations

from collections.abc import Iterable

from kon_agent.ranges import Range, RangeSet, count_of


class EpochLedger:
    """What has become of the sequence numbers of one epoch of one plugin of one agent.

    Attributes:
        stored: the numbers stored.
        lost: the numbers declared lost, by reason.
        duplicates_refused: how many records arrived again after having been stored.
    """

    def __init__(
        self,
        stored: Iterable[Range] = (),
        lost: dict[int, list[Range]] | None = None,
        duplicates_refused: int = 0,
    ) -> None:
        self.stored = RangeSet(stored)
        self.lost = {reason: RangeSet(ranges) for reason, ranges in (lost or {}).items()}
        self.duplicates_refused = duplicates_refused

    def store(self, first: int, last: int) -> list[Range]:
        """Enter `first..last` as stored and return what was not yet; the rest counts as refused."""
        new = self.stored.add(first, last)
        self.duplicates_refused += last - first + 1 - count_of(new)
        for ranges in self.lost.values():
            ranges.remove(first, last)
        return new

    def lose(self, first: int, last: int, reason: int) -> int:
        """Enter as lost what of `first..last` is neither stored nor lost yet; return how many that is."""
        new = self.stored.absent(first, last)
        for ranges in self.lost.values():
            new = [part for low, high in new for part in ranges.absent(low, high)]
        for low, high in new:
            self.lost.setdefault(reason, RangeSet()).add(low, high)
        return count_of(new)

    @property
    def missing(self) -> int:
        """How many numbers from 0 to the highest heard of are neither stored nor declared lost."""
        highest = max([self.stored.highest, *(ranges.highest for ranges in self.lost.values())])
        return highest + 1 - self.stored.count - sum(ranges.count for ranges in self.lost.values())
