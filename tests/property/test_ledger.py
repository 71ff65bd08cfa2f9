"""The ledger against a plain model: a set of integers says the same, whatever the order of arrivals."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kon_agent.ranges import RangeSet, count_of
from kon_agent.receiver.ledger import EpochLedger

NUMBERS = st.integers(0, 40)
RANGES = st.tuples(NUMBERS, NUMBERS).map(lambda pair: (min(pair), max(pair)))
REASONS = st.integers(1, 3)
STORE = st.tuples(st.just("store"), RANGES, st.just(0))
LOSE = st.tuples(st.just("lose"), RANGES, REASONS)


def numbers(ranges: object) -> set[int]:
    return {n for first, last in ranges for n in range(first, last + 1)}  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.booleans(), RANGES)))
def test_range_set_is_a_set(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    """Adding and removing ranges gives what a plain set gives, and the changes reported are exact."""
    ranges = RangeSet()
    model: set[int] = set()
    persisted: dict[int, int | None] = {}
    for is_add, (first, last) in steps:
        span = set(range(first, last + 1))
        assert span - model == numbers(ranges.absent(first, last))
        if is_add:
            assert span - model == numbers(ranges.add(first, last))
            model |= span
        else:
            assert len(span & model) == ranges.remove(first, last)
            model -= span
        persisted.update(ranges.take_changes())

        assert model == numbers(ranges)
        assert len(model) == ranges.count == count_of(ranges)
        assert max(model, default=-1) == ranges.highest
        assert all((n in model) == (n in ranges) for n in range(42))
        listed = list(ranges)
        assert all(last + 1 < first for (_, last), (first, _) in pairwise(listed))
        assert listed == sorted((f, e) for f, e in persisted.items() if e is not None)


@given(st.lists(st.one_of(STORE, LOSE)))
def test_every_number_has_one_fate(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    """A number is stored, lost for the first reason given, or missing; a stored one is never new twice."""
    ledger, duplicates = EpochLedger(), 0
    stored: set[int] = set()
    lost: dict[int, int] = {}
    for verb, (first, last), reason in steps:
        span = set(range(first, last + 1))
        if verb == "store":
            assert span - stored == numbers(ledger.store(first, last))
            duplicates += len(span & stored)
            stored |= span
            lost = {n: why for n, why in lost.items() if n not in span}
        else:
            fresh = span - stored - set(lost)
            assert len(fresh) == ledger.lose(first, last, reason)
            lost |= dict.fromkeys(fresh, reason)

        assert stored == numbers(ledger.stored)
        assert lost == {n: why for why, ranges in ledger.lost.items() for n in numbers(ranges)}
        assert duplicates == ledger.duplicates_refused
        assert max([-1, *stored, *lost]) + 1 - len(stored | set(lost)) == ledger.missing
