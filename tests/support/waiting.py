"""Waiting for a condition, with a deadline. The only place in the harness that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 15.0  # far beyond what anything here takes; only a machine under load comes near
POLL_S = 0.02

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of `condition`.

    Args:
        what: the condition in words, for the message.
        deadline_s: seconds until that is a failure; the condition is looked at once more then.

    Raises:
        AssertionError: it did not come true; names its last value.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        is_over = time.monotonic() > deadline
        value = condition()
        if value:
            return value
        assert not is_over, f"not within {deadline_s:g} s: {what}; last seen: {value!r}"
        time.sleep(POLL_S)
