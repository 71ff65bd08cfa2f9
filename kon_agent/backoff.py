"""Exponential backoff with full jitter: how long to wait before the next attempt.

Full jitter (a uniform draw from zero to a doubling ceiling) keeps a thousand agents from reconnecting together.
"""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Waits of one kind of attempt.

    Args:
        base_s: the first ceiling.
        max_s: the last one.
        chance: returns a number in [0, 1).
    """

    def __init__(self, base_s: float, max_s: float, chance: Callable[[], float]) -> None:
        self._base_s = base_s
        self._max_s = max_s
        self._chance = chance
        self._failures = 0

    def next_s(self) -> float:
        """Return the wait after one more failure, in seconds."""
        ceiling = min(self._max_s, self._base_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return ceiling * self._chance()

    def reset(self) -> None:
        """An attempt succeeded: start again at the base."""
        self._failures = 0
