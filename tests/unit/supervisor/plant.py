"""A process tree that is not there: plugins that use what their cycles cost, under a governor's orders."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kon_agent.clock import NS_PER_S
from kon_agent.supervisor.governor import Governor
from kon_agent.supervisor.ladder import Limits, Move, Step
from kon_agent.supervisor.reading import Reading, Use

MIB = 1 << 20
START_NS = 1000 * NS_PER_S
BASE = 0.002  # cores: supervisor and heartbeat plugin
SENDER_PER_CYCLE_S = 0.0003
IMPORT_S = 0.25  # of CPU, at the start of a worker
STOP_S = 0.4  # how long a busy loop goes on after it has been told to stop; others end with their cycle


@dataclass
class Plugin:
    """One plugin: what its cycles cost, seconds; whether it is in a busy loop instead; what memory it holds."""

    cost_s: float = 0.005
    period_s: float = 5.0
    priority: int = 50
    is_busy: bool = False
    memory_bytes: int = 7 * MIB
    is_wanted: bool = True
    start_ns: int | None = field(default=None, init=False)  # None: it does not run
    stop_ns: int | None = field(default=None, init=False)
    due_ns: int = field(default=0, init=False)

    def live(self, from_ns: int, to_ns: int, factor: int) -> tuple[float, float, int]:
        """Return the CPU it used between two times, that of its start, and how many cycles it ended."""
        if self.start_ns is None:
            return 0.0, 0.0, 0
        is_new = self.start_ns >= from_ns
        end_ns = min(to_ns, self.stop_ns or to_ns)
        span_s = max(0, end_ns - max(from_ns, self.start_ns)) / NS_PER_S
        used_s, cycles = 0.0, 0
        if self.is_busy:
            used_s = span_s
        else:
            if is_new:
                self.due_ns = self.start_ns + int(min(self.period_s, 1.0) * NS_PER_S)
            while self.due_ns <= end_ns and used_s + self.cost_s <= span_s:
                used_s, cycles = used_s + self.cost_s, cycles + 1
                self.due_ns += int(self.period_s * factor * NS_PER_S)
            self.due_ns = max(self.due_ns, end_ns - int(self.period_s * factor * NS_PER_S))
        if self.stop_ns is not None and to_ns >= self.stop_ns:
            self.start_ns = self.stop_ns = None
        return used_s, IMPORT_S if is_new else 0.0, cycles


class Plant:
    """The tree, its governor, and the minute behind them."""

    def __init__(
        self, plugins: dict[str, Plugin], cpu: float = 0.02, memory_bytes: int = 1 << 40, base: float = BASE
    ) -> None:
        self.now_ns = START_NS
        self.base = base
        self.is_memory_known = True
        self.plugins = plugins
        self.governor = Governor(Limits(cpu, memory_bytes), self.now_ns)
        self.steps: list[Step] = []
        self.history: deque[tuple[int, float, float]] = deque()  # time, span, CPU with the starts' cost
        for plugin in plugins.values():
            plugin.start_ns = self.now_ns if plugin.is_wanted else None

    def run(self, seconds: float) -> list[Step]:
        """Let time pass; return the steps taken meanwhile."""
        before, end_ns = len(self.steps), self.now_ns + int(seconds * NS_PER_S)
        while self.now_ns < end_ns:
            self.turn(0.25 if self.governor.is_watching else 1.0)
        return self.steps[before:]

    def turn(self, span_s: float) -> None:
        """Let one interval pass, read, and do as the governor says."""
        then_ns, self.now_ns = self.now_ns, self.now_ns + int(span_s * NS_PER_S)
        uses, cycles, total_s = {}, 0, 0.0
        for name, plugin in self.plugins.items():
            runs = plugin.start_ns is not None
            used_s, start_s, ended = plugin.live(then_ns, self.now_ns, self.governor.factor)
            cycles += ended
            total_s += used_s + start_s
            if runs:
                uses[name] = Use(used_s, start_s, plugin.memory_bytes)
        base_s, sender_s = self.base * span_s, cycles * SENDER_PER_CYCLE_S
        self.history.append((self.now_ns, span_s, total_s + base_s + sender_s))
        wanted = {name: (each.priority, each.period_s) for name, each in self.plugins.items() if each.is_wanted}
        reading = Reading(
            span_s, Use(base_s, 0.0, 20 * MIB), Use(sender_s, 0.0, 20 * MIB), uses, wanted, self.is_memory_known
        )
        taken = self.governor.decide(reading, self.now_ns)
        self.steps += taken
        for step in taken:
            self.obey(step)
        for name, plugin in self.plugins.items():
            is_to_run = plugin.is_wanted and name not in self.governor.paused
            if is_to_run and plugin.start_ns is None:
                plugin.start_ns, plugin.stop_ns = self.now_ns, None
            if not is_to_run and plugin.start_ns is not None and plugin.stop_ns is None:
                plugin.stop_ns = self.now_ns + int((STOP_S if plugin.is_busy else plugin.cost_s) * NS_PER_S)

    def obey(self, step: Step) -> None:
        """Check that what is ordered makes sense."""
        assert step.move in (Move.STRETCH, Move.RELAX) or step.plugin in self.plugins

    def worst_minute(self, since_ns: int) -> float:
        """Return the largest use, in cores, of any whole minute that began at `since_ns` or later."""
        worst, window, window_s, used_s = 0.0, deque[tuple[float, float]](), 0.0, 0.0
        for at_ns, span_s, spent_s in self.history:
            if at_ns - int(span_s * NS_PER_S) < since_ns:
                continue
            window.append((span_s, spent_s))
            window_s, used_s = window_s + span_s, used_s + spent_s
            while window_s - window[0][0] >= 60.0:
                gone_span_s, gone_s = window.popleft()
                window_s, used_s = window_s - gone_span_s, used_s - gone_s
            if window_s >= 60.0:
                worst = max(worst, used_s / window_s)
        return worst

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return (self.now_ns - START_NS) / NS_PER_S
