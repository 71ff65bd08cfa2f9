"""How fast something grows: counts seen now and then, as a rate over the latest whole interval. Pure."""

from __future__ import annotations

from kon_agent.clock import NS_PER_S

MIN_INTERVAL_S = 5.0  # shorter, a batch more or less would be all one sees


class Pace:
    """The rate of one count that never goes back."""

    def __init__(self) -> None:
        self.per_s: float | None = None  # None: not known yet
        self._count = 0
        self._since_ns = 0

    def is_due(self, now_ns: int, interval_s: float) -> bool:
        """Whether to look at the count again.

        Args:
            interval_s: how often the count moves at least; it is looked at no more often than that.
        """
        return now_ns - self._since_ns >= max(MIN_INTERVAL_S, interval_s) * NS_PER_S

    def note(self, count: int, now_ns: int) -> None:
        """Take note of the count at `now_ns`."""
        if self._since_ns:
            self.per_s = (count - self._count) * NS_PER_S / (now_ns - self._since_ns)
        self._count, self._since_ns = count, now_ns
