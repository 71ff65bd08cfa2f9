"""Event-style collectors between two waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from kon_agent.errors import NoData, PluginError
from kon_agent.plugins.events import EventRun, Wish


def running(*wishes: Any) -> EventRun:
    """Return a run that yields these."""

    def run() -> Iterator[Any]:
        waiting = list(wishes)
        while waiting:
            yield waiting.pop(0)

    return EventRun(run)  # type: ignore[arg-type]


def test_what_is_yielded_is_what_is_waited_for() -> None:
    """Nothing: a period; a number: seconds; something open: its descriptor."""
    reader, writer = os.pipe()
    with open(reader, "rb") as source, open(writer, "wb"):
        events = running(None, 0.5, 0, source)
        assert [Wish(), Wish(seconds=0.5), Wish(seconds=0.0), Wish(fd=reader)] == [
            events.resume(False) for _ in range(4)
        ]


def test_a_yield_is_answered() -> None:
    """With whether the source was ready."""
    answers = []

    def run() -> Iterator[Any]:
        while True:
            answers.append((yield))

    events = EventRun(run)  # type: ignore[arg-type]
    for is_ready in (False, True, False):
        events.resume(is_ready)
    assert [True, False] == answers


@pytest.mark.parametrize("wanted", ["text", -1, True, float("inf"), float("nan"), object()])
def test_a_senseless_wish_is_told(wanted: Any) -> None:
    """It names what was yielded and what may be."""
    with pytest.raises(PluginError, match="yield nothing, seconds, or something open"):
        running(wanted).resume(False)


def test_an_end_is_a_mistake() -> None:
    """A run goes on until it is closed."""
    with pytest.raises(PluginError, match="has ended by itself"):
        running().resume(False)


def test_no_data_begins_anew() -> None:
    """After a period's wait."""
    begun = []

    def run() -> Iterator[Any]:
        begun.append(1)
        raise NoData("not yet")
        yield

    events = EventRun(run)  # type: ignore[arg-type]
    assert [Wish(), Wish()] == [events.resume(False), events.resume(False)]
    assert 2 == len(begun)


def test_closing_runs_what_is_in_finally() -> None:
    """A collector can put things away; closing one that has not begun is nothing."""
    done = []

    def run() -> Iterator[Any]:
        try:
            yield
        finally:
            done.append("closed")

    events = EventRun(run)  # type: ignore[arg-type]
    events.close()
    events.resume(False)
    events.close()
    assert ["closed"] == done
