"""Sets of sequence numbers, kept as ranges: what a spool holds, what a receiver has stored.

Invariant: the ranges of a set are disjoint and not adjacent, so an unbroken run is one range.
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
