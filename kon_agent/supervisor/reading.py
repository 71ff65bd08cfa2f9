"""What the process tree has used, as the governor reads it: sums between two readings, and rates over several. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

MIN_EPISODE_S = 5.0  # a use is averaged over at least so long: one bad second is no rate
MAX_CYCLE_S = 60.0  # a use is averaged over a cycle of its plugin, but over no more than this


@dataclass(frozen=True, slots=True)
class Use:
    """What one running plugin took since the reading before, and what it holds.

    Attributes:
        cpu_s: seconds of CPU, the cost of its start left out.
        start_s: that cost.
        memory_bytes: proportional set size.
    """

    cpu_s: float = 0.0
    start_s: float = 0.0
    memory_bytes: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.cpu_s + other.cpu_s, self.start_s + other.start_s, self.memory_bytes + other.memory_bytes)


@dataclass(frozen=True, slots=True)
class Reading:
    """The whole tree since the reading before.

    Attributes:
        span_s: how long that was.
        base: supervisor and heartbeat plugin: what no step changes.
        sender: its work follows the plugins'.
        plugins: each running plugin that may be paused.
        terms: each plugin that is wanted and may be paused, running or not: its priority and its period, seconds.
        is_memory_known: whether the memory figures add up; a supervisor that may not read its children's does not know.
    """

    span_s: float
    base: Use
    sender: Use
    plugins: Mapping[str, Use]
    terms: Mapping[str, tuple[int, float]]
    is_memory_known: bool = True

    def uses(self) -> list[Use]:
        """Return the use of every process."""
        return [self.base, self.sender, *self.plugins.values()]


@dataclass(frozen=True, slots=True)
class Rates:
    """What is used, in cores, by whom."""

    base: float
    sender: float
    plugins: Mapping[str, float]

    @classmethod
    def of(cls, readings: Collection[Reading], factor: int) -> Rates:
        """Average over the readings; a plugin over one of its cycles at least, so that one cycle is no rate."""
        span_s = max(MIN_EPISODE_S, sum(reading.span_s for reading in readings))
        sums: dict[str, float] = {}
        cycles: dict[str, float] = {}
        for reading in readings:
            for name, use in reading.plugins.items():
                sums[name] = sums.get(name, 0.0) + use.cpu_s
            cycles |= {name: min(MAX_CYCLE_S, period_s * factor) for name, (_, period_s) in reading.terms.items()}
        return cls(
            base=sum(reading.base.cpu_s for reading in readings) / span_s,
            sender=sum(reading.sender.cpu_s for reading in readings) / span_s,
            plugins={name: used_s / max(span_s, cycles.get(name, 0.0)) for name, used_s in sums.items()},
        )

    @property
    def total(self) -> float:
        """What all use."""
        return self.base + self.sender + sum(self.plugins.values())

    def at(self, scale: float, without: Collection[str] = ()) -> float:
        """Return what would be used at `scale` times the cycles, without some; the sender has the less to do."""
        everything = sum(self.plugins.values())
        left = sum(rate for name, rate in self.plugins.items() if name not in without)
        return self.base + scale * (left + self.sender * (left / everything if everything else 1.0))
