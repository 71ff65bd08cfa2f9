"""The ledger: which sequence numbers of an epoch have been stored, and which the agent has declared lost.

Exactly-once rests on this page: the store writes records and ledger in one transaction, and only what `store`
returns as new is written. Pure; the store loads it, asks it, and persists the changes it reports.

Invariants:
* The ranges of a set are disjoint and not adjacent, so an epoch received in full is one range.
* No number is both stored and lost, nor lost for two reasons: what arrives after all is stored and its loss
  taken back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""First and last sequence number, both included."""


def count_of(ranges: Iterable[Range]) -> int:
    """Return how many numbers disjoint `ranges` hold."""
    return sum(last - first + 1 for first, last in ranges)


class RangeSet:
    """A set of non-negative integers, kept as ranges.

    Args:
        ranges: disjoint ranges in any order, as an earlier set yielded them.
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        ordered = sorted(ranges)
        self._firsts = [first for first, _ in ordered]
        self._lasts = [last for _, last in ordered]
        self._touched: dict[int, int | None] = {}
        self.count = count_of(ordered)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._firsts, self._lasts, strict=True)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._lasts[at]

    @property
    def highest(self) -> int:
        """The largest member, -1 where there is none."""
        return self._lasts[-1] if self._lasts else -1

    def absent(self, first: int, last: int) -> list[Range]:
        """Return the parts of `first..last` that are not in the set, in order."""
        gaps: list[Range] = []
        begin, end = self._overlapping(first, last)
        for at in range(begin, end):
            if first < self._firsts[at]:
                gaps.append((first, self._firsts[at] - 1))
            first = self._lasts[at] + 1
        if first <= last:
            gaps.append((first, last))
        return gaps

    def add(self, first: int, last: int) -> list[Range]:
        """Add `first..last` and return the parts that were new, in order."""
        new = self.absent(first, last)
        begin, end = self._overlapping(first - 1, last + 1)  # one wider: neighbours merge
        if begin < end:
            first, last = min(first, self._firsts[begin]), max(last, self._lasts[end - 1])
        self._replace(begin, end, [(first, last)])
        self.count += count_of(new)
        return new

    def remove(self, first: int, last: int) -> int:
        """Remove `first..last` and return how many of them had been members."""
        begin, end = self._overlapping(first, last)
        if begin == end:
            return 0
        before, after = (self._firsts[begin], first - 1), (last + 1, self._lasts[end - 1])
        kept = [(low, high) for low, high in (before, after) if low <= high]
        removed = count_of(zip(self._firsts[begin:end], self._lasts[begin:end], strict=True)) - count_of(kept)
        self._replace(begin, end, kept)
        self.count -= removed
        return removed

    def take_changes(self) -> dict[int, int | None]:
        """Return the ranges changed since the last call, first to last; to None where none begins any more."""
        changes, self._touched = self._touched, {}
        return changes

    def _overlapping(self, first: int, last: int) -> tuple[int, int]:
        """Return the slice of the ranges that share a number with `first..last`."""
        begin = bisect_right(self._firsts, first)
        if begin > 0 and self._lasts[begin - 1] >= first:
            begin -= 1
        return begin, max(begin, bisect_right(self._firsts, last))

    def _replace(self, begin: int, end: int, ranges: list[Range]) -> None:
        self._touched.update(dict.fromkeys(self._firsts[begin:end]))
        self._touched.update(ranges)
        self._firsts[begin:end] = [first for first, _ in ranges]
        self._lasts[begin:end] = [last for _, last in ranges]


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
