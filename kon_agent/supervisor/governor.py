"""The governor: keeps the whole process tree within `limits` by asking less of its plugins, and gives back what it can.

Pure: readings and the time come in, steps come out; whoever called carries them out. The ladder, from the top:

    NORMAL ─▶ STRETCH_2 ─▶ STRETCH_4 ─▶ PAUSED      every period times 1, 2, 4; then plugins are paused, one after
           ◀─           ◀─           ◀─             another: the lowest priority first, among equals the costliest

CPU. What exceeds the limit runs into a bucket that leaks at the limit's rate. The bucket holds BUCKET_S of the limit:
so a spike passes unpunished, twice the limit is noticed after BUCKET_S and a whole core at the next reading, and over
any time T between two steps the tree uses at most limit * (T + BUCKET_S). When the bucket is full, the first rung
whose use, reckoned from what each plugin used meanwhile, lies below AIM of the limit is taken at once; the bucket is
then empty, and a reckoning that was too hopeful is corrected when it is full again. A plugin that would exceed the
limit by itself even at four times its period, such as a busy loop, is paused without making the others pay for it.

A paused plugin comes back when the minute has room for what its start costs, as soon as what it used before fits; or
else, when its hold is over and the minute has room for a failure too, on probation: it is watched closely, and paused
again, with twice the hold, if the bucket fills or the tree exceeds the limit meanwhile. Periods go back to normal when
the use this leads to fits. Nothing is given back while the tree has still to make up for what it used too much.

Memory. The periods do not change it: after MEMORY_PATIENCE_S above the limit the next plugin is paused, and it comes
back when there is room for it.

Invariants: the heartbeat plugin is never in a reading, so nothing is ever done to it. The cost of starting a process,
within bounds, fills no bucket; it counts in the savings. Each step is logged and remembered with its reason.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kon_agent.clock import NS_PER_S
from kon_agent.supervisor.ladder import CPU, MEMORY, RUNGS, Level, Limits, Move, Pause, Step
from kon_agent.supervisor.reading import Rates, Reading

log = logging.getLogger(__name__)

BUCKET_S = 10.0  # 0.2 s of CPU at 2 %: a slow cycle or a reload passes, a busy loop does not live to its second reading
SUSPECT_BUCKET_S = 4.0  # while a plugin is on probation: what brought it there is most likely to show again
AIM = 0.8  # of the limit: what a step is to lead to; reckoning is not exact
ROOM = 0.7  # of the limit: above that nothing is tried that may cost more
SETTLE_S = 1.5  # after a step readings still hold the old use: a worker takes STOP_GRACE_S to end
HOLD_S = 12.0  # between a step and the next one back up: two periods of most plugins
MAX_HOLD_S = 48.0  # ... after periods had to be stretched again
PROBATION_S = 15.0  # how long a plugin that has come back is under suspicion
PAUSE_S = 45.0  # before a plugin whose former use does not fit is tried all the same
MAX_PAUSE_S = 90.0  # so that all are back within three minutes after the cause has gone
FIT_SHARE = 3  # of its hold: a plugin that fits waits a third
FORGIVE_S = 600.0  # holds grow with failures no further apart
START_COST_S = 0.3  # of CPU: a fork, the drop of privileges, a few imports
OVERSHOOT_S = 0.45  # of CPU: until a busy loop has been seen, and a worker told to stop has ended
MAX_IDLE_S = 180.0  # until a plugin is tried although no minute has room for its failure
MINUTE_S = 60.0  # over which the limit is to hold, come what may
DEBT_S = 30.0  # of the limit: debts beyond would delay the recovery without end
GRACE_S = 15.0  # after the start: every process is being started
MEMORY_PATIENCE_S = 20.0  # every process has been measured anew meanwhile
MEMORY_AIM = 0.95  # of the limit: room for a plugin is what lies below
RECENT_S = 20.0  # what "uses" means when periods go back to normal: four periods of most plugins
MAX_READINGS = 120  # of a bucket that neither fills nor empties
MAX_STEPS = 10  # remembered; the log and the metrics have them all

NEVER_NS = -(10**18)


class Governor:
    """The ladder and where on it the tree is.

    Args:
        limits: what the tree may use.
        now_ns: now; nothing is held against anyone for GRACE_S.
    """

    def __init__(self, limits: Limits, now_ns: int) -> None:
        self.limits = limits
        self.level = Level.NORMAL
        self.factor = 1
        self.paused: dict[str, Pause] = {}
        self.steps: deque[Step] = deque(maxlen=MAX_STEPS)
        self.counts: Counter[Move] = Counter(dict.fromkeys(Move, 0))
        self._graced_ns = self._settled_ns = now_ns + int(GRACE_S * NS_PER_S)
        self._loosened_ns = self._tightened_ns = now_ns
        self._relaxed_ns = NEVER_NS
        self._hold_s = HOLD_S
        self._acquitted_ns = self._failed_ns = NEVER_NS
        self._bucket_s = self._savings_s = self._spent_s = 0.0
        self._minute: deque[tuple[int, float]] = deque()  # when, and what was spent: the sum is `_spent_s`
        self._episode: deque[Reading] = deque(maxlen=MAX_READINGS)  # while the bucket is not empty
        self._recent: deque[Reading] = deque()  # the last RECENT_S since the last step
        self._probation: dict[str, int] = {}  # until when
        self._last_pause: dict[str, Pause] = {}
        self._lean: dict[str, int] = {}  # the least memory each plugin was seen with
        self._heavy_since_ns: int | None = None
        self._at_bottom: dict[str, str] = {}  # what cannot be kept though nothing is left to pause, by cause

    # What is shown.

    @property
    def detail(self) -> str:
        """What is being done and what cannot be done, in words; empty at the top of the ladder."""
        periods = [f"periods x{self.factor}"] if self.factor > 1 else []
        names = [f"paused: {', '.join(self.paused)}"] if self.paused else []
        return "; ".join([*periods, *names, *self._at_bottom.values()])

    @property
    def is_watching(self) -> bool:
        """Whether a plugin is on probation: readings should come quickly."""
        return bool(self._probation)

    # What is decided.

    def set_limits(self, limits: Limits) -> None:
        """Go by other limits from now on."""
        self.limits = limits
        self._bucket_s = self._savings_s = 0.0
        self._episode.clear()
        self._heavy_since_ns = None

    def decide(self, reading: Reading, now_ns: int) -> list[Step]:
        """Return the steps to take now, most often none."""
        steps = self._let_go(reading, now_ns)
        self._note(reading, now_ns)
        if not steps and now_ns >= self._settled_ns:
            steps = (
                self._tighten(reading, now_ns)
                or self._tighten_memory(reading, now_ns)
                or self._end_probation(reading, now_ns)
            )
            steps = steps or self._loosen(reading, now_ns)
        return steps

    def _note(self, reading: Reading, now_ns: int) -> None:
        for name, use in reading.plugins.items():
            if use.memory_bytes:
                self._lean[name] = min(use.memory_bytes, self._lean.get(name, use.memory_bytes))
        if now_ns < self._graced_ns:
            return
        limit_s = self.limits.cpu * reading.span_s
        used_s = sum(use.cpu_s for use in reading.uses())
        spent_s = used_s + sum(use.start_s for use in reading.uses())
        self._savings_s += limit_s - spent_s
        self._savings_s = min(self.limits.cpu * MINUTE_S, max(-self.limits.cpu * DEBT_S, self._savings_s))
        self._minute.append((now_ns, spent_s))
        self._spent_s += spent_s
        while now_ns - self._minute[0][0] >= MINUTE_S * NS_PER_S:
            self._spent_s -= self._minute.popleft()[1]
        if now_ns < self._settled_ns:
            return
        self._bucket_s = max(0.0, self._bucket_s + used_s - limit_s)
        if self._bucket_s:
            self._episode.append(reading)
        else:
            self._episode.clear()
        self._recent.append(reading)
        while sum(each.span_s for each in self._recent) - self._recent[0].span_s >= RECENT_S:
            self._recent.popleft()

    def _let_go(self, reading: Reading, now_ns: int) -> list[Step]:
        """Forget what is no longer wanted, and try afresh what has been given another period or priority."""
        known: tuple[dict[str, Any], ...] = (self._probation, self._lean, self._last_pause)
        for by_name in known:
            for name in by_name.keys() - reading.terms.keys():
                del by_name[name]
        for name, pause in self.paused.items():
            if name in reading.terms and reading.terms[name] != pause.terms:
                self.paused[name] = replace(pause, hold_s=0.0, cpu=0.0, terms=reading.terms[name])
        return [
            self._resume(name, "it is no longer wanted", now_ns, is_tried=False)
            for name in list(self.paused)
            if name not in reading.terms
        ]

    # Down the ladder.

    def _tighten(self, reading: Reading, now_ns: int) -> list[Step]:
        limit = self.limits.cpu
        if self._bucket_s <= limit * (SUSPECT_BUCKET_S if self._probation else BUCKET_S):
            return []
        rates = Rates.of(self._episode, self.factor)
        if rates.total <= limit:
            return []  # a cycle that is long but rare; the bucket leaks
        left = self._pausable(reading)
        suspects = self._probation.keys() & left.keys()
        culprits = suspects | {name for name in left if rates.plugins[name] * self.factor / max(RUNGS) > limit}
        steps = []
        for name in sorted(culprits, key=lambda name: _rank(name, left, rates.plugins)):
            share = rates.plugins[name]
            why = f"{_percent(rates.total)} of a core is used, {_percent(share)} by it; the limit is {_percent(limit)}"
            steps.append(self._pause(name, CPU, why, share, reading, now_ns))
        if not suspects:
            steps += self._descend(rates, reading, culprits, now_ns)
        self._bucket_s = 0.0
        self._episode.clear()
        if not steps:
            self._hit_bottom(CPU, f"{_percent(rates.total)} of a core is used above limits.cpu, {_percent(limit)}")
        return steps

    def _descend(self, rates: Rates, reading: Reading, gone: set[str], now_ns: int) -> list[Step]:
        """Take the rungs that are needed to come below AIM of the limit."""
        limit, before = self.limits.cpu, self.factor
        why = f"{_percent(rates.total)} of a core is used; the limit is {_percent(limit)}"
        gone = gone.union(self.paused)  # one that has been told to end may still be there
        left = self._pausable(reading)
        steps: list[Step] = []
        while left and self.factor < max(RUNGS) and rates.at(before / self.factor, gone) > AIM * limit:
            steps.append(self._stretch(self.factor * 2, Move.STRETCH, why, now_ns))
        scale = before / self.factor
        chosen: list[str] = []
        for name in sorted(left, key=lambda name: _rank(name, left, rates.plugins)):
            if rates.at(scale, gone.union(chosen)) <= AIM * limit:
                break
            chosen.append(name)
        for name in chosen[-2::-1]:  # who need not go, as the last one chosen uses so much, stays
            if rates.at(scale, gone.union(chosen) - {name}) <= AIM * limit:
                chosen.remove(name)
        return steps + [self._pause(name, CPU, why, rates.plugins[name] * scale, reading, now_ns) for name in chosen]

    def _tighten_memory(self, reading: Reading, now_ns: int) -> list[Step]:
        held = sum(use.memory_bytes for use in reading.uses())
        limit = self.limits.memory_bytes
        if not reading.is_memory_known or held <= limit:
            self._heavy_since_ns = None
            self._at_bottom.pop(MEMORY, None)
            return []
        if self._heavy_since_ns is None:
            self._heavy_since_ns = now_ns
        if now_ns - self._heavy_since_ns < MEMORY_PATIENCE_S * NS_PER_S:
            return []
        self._heavy_since_ns = now_ns  # the next one, if need be, after another wait
        why = f"{in_mib(held)} of memory is used; the limit is {in_mib(limit)}"
        sizes = {name: reading.plugins[name].memory_bytes for name in self._pausable(reading)}
        if not sizes:
            self._hit_bottom(MEMORY, f"{in_mib(held)} is used above limits.memory, {in_mib(limit)}")
            return []
        name = min(sizes, key=lambda name: _rank(name, reading.terms, sizes))
        share = Rates.of(self._recent, self.factor).plugins.get(name, 0.0)
        return [self._pause(name, MEMORY, why, share, reading, now_ns)]

    def _pausable(self, reading: Reading) -> dict[str, tuple[int, float]]:
        return {
            name: reading.terms[name] for name in reading.plugins if name in reading.terms and name not in self.paused
        }

    def _hit_bottom(self, cause: str, text: str) -> None:
        if cause not in self._at_bottom:
            log.warning("governor: %s, and nothing is left to pause: raise it", text)
        self._at_bottom[cause] = f"{text}, and nothing is left to pause"

    # Back up.

    def _end_probation(self, reading: Reading, now_ns: int) -> list[Step]:
        """Acquit who has served its probation, unless the tree as a whole does not fit since it is back."""
        over = [name for name, until_ns in self._probation.items() if now_ns >= until_ns]
        if not over:
            return []
        rates = Rates.of(self._recent, self.factor)
        if rates.total > self.limits.cpu:
            why = (
                f"{_percent(rates.total)} of a core is used since it is back; the limit is {_percent(self.limits.cpu)}"
            )
            return [self._pause(name, CPU, why, rates.plugins.get(name, 0.0), reading, now_ns) for name in over]
        for name in over:
            del self._probation[name]
            before = self._last_pause[name]
            if 2 * rates.plugins.get(name, 0.0) < before.cpu * before.factor / self.factor:
                self._acquitted_ns = now_ns
        return []

    def _loosen(self, reading: Reading, now_ns: int) -> list[Step]:
        rates, limit = Rates.of(self._recent, self.factor), self.limits.cpu
        if rates.total <= AIM * limit:
            self._at_bottom.pop(CPU, None)
        held_s = (now_ns - max(self._tightened_ns, self._loosened_ns)) / NS_PER_S
        if self._probation or held_s < HOLD_S or rates.total > ROOM * limit or self._savings_s < 0:
            return []
        for name in sorted(self.paused, key=lambda name: (-self.paused[name].terms[0], self.paused[name].since_ns)):
            if reason := self._reason_to_resume(name, rates.total, reading, now_ns):
                return [self._resume(name, reason, now_ns)]
        if self.factor > 1 and held_s >= self._hold_s and rates.at(2.0) <= AIM * limit:
            return [self._stretch(self.factor // 2, Move.RELAX, f"{_percent(rates.total)} of a core is used", now_ns)]
        return []

    def _reason_to_resume(self, name: str, use: float, reading: Reading, now_ns: int) -> str:
        """Return why a paused plugin may come back now; empty: it may not."""
        pause = self.paused[name]
        held = sum(each.memory_bytes for each in reading.uses())
        has_memory = held + self._lean.get(name, 0) <= MEMORY_AIM * self.limits.memory_bytes
        waited_s = (now_ns - pause.since_ns) / NS_PER_S
        if reading.is_memory_known and not has_memory:
            return ""
        if pause.cause == MEMORY:
            return f"{in_mib(held)} of memory is used" if waited_s >= pause.hold_s / FIT_SHARE else ""
        expected = use + pause.cpu * pause.factor / self.factor
        fits = expected <= AIM * self.limits.cpu
        if waited_s >= pause.hold_s / FIT_SHARE and fits and self._can_afford(START_COST_S, use, now_ns):
            return f"{_percent(use)} of a core is used and {_percent(expected)} expected"
        # Where another has come back meanwhile and uses far less than before, what was wrong is probably over.
        is_risky = self._acquitted_ns < pause.since_ns
        if waited_s < pause.hold_s or (is_risky and now_ns - self._failed_ns < MINUTE_S * NS_PER_S):
            return ""
        risk_s = self.limits.cpu * SUSPECT_BUCKET_S + OVERSHOOT_S if is_risky else 0.0
        if self._can_afford(START_COST_S + risk_s, use, now_ns):
            return f"{_percent(use)} of a core is used; on probation after {waited_s:.0f} s"
        return ""

    def _can_afford(self, cost_s: float, use: float, now_ns: int) -> bool:
        """Whether so much CPU can be spent at once without a minute above the limit, the last one or the next.

        Where no minute has room for it, because the limit is small: now and then all the same, after idle ones.
        """
        minute_s = self.limits.cpu * MINUTE_S
        idle_s = (now_ns - max(self._tightened_ns, self._loosened_ns)) / NS_PER_S
        spent_s = max(self._spent_s, use * MINUTE_S)
        return spent_s + cost_s <= minute_s or (idle_s >= MAX_IDLE_S and self._savings_s >= minute_s)

    # The steps themselves.

    def _stretch(self, factor: int, move: Move, why: str, now_ns: int) -> Step:
        if move is Move.STRETCH:
            is_again = now_ns - self._relaxed_ns < FORGIVE_S * NS_PER_S
            self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s) if is_again else HOLD_S
            self._relaxed_ns = NEVER_NS
        else:
            self._relaxed_ns = now_ns
        self.factor = factor
        return self._taken(Step(now_ns, move, "", factor, why))

    def _pause(self, name: str, cause: str, why: str, cpu: float, reading: Reading, now_ns: int) -> Step:
        last = self._last_pause.get(name)
        is_again = last is not None and now_ns - last.since_ns < FORGIVE_S * NS_PER_S
        hold_s = min(MAX_PAUSE_S, 2 * last.hold_s) if last is not None and is_again else PAUSE_S
        if self._probation.pop(name, None) is not None:
            self._failed_ns = now_ns
        pause = Pause(now_ns, hold_s, cause, cpu, self.factor, reading.terms[name])
        self.paused[name] = self._last_pause[name] = pause
        return self._taken(Step(now_ns, Move.PAUSE, name, self.factor, why))

    def _resume(self, name: str, why: str, now_ns: int, is_tried: bool = True) -> Step:
        del self.paused[name]
        if is_tried:
            self._probation[name] = now_ns + int(PROBATION_S * NS_PER_S)
        return self._taken(Step(now_ns, Move.RESUME, name, self.factor, why))

    def _taken(self, step: Step) -> Step:
        self.steps.append(step)
        self.counts[step.move] += 1
        if step.move in (Move.STRETCH, Move.PAUSE):
            log.warning("governor: %s", step)
            self._tightened_ns = step.at_ns
            self._settled_ns = max(self._settled_ns, step.at_ns + int(SETTLE_S * NS_PER_S))
        else:
            log.info("governor: %s", step)
            self._loosened_ns = step.at_ns
        self._recent.clear()
        self._set_level(Level.PAUSED if self.paused else RUNGS[self.factor])
        return step

    def _set_level(self, level: Level) -> None:
        old, self.level = self.level, level
        if old is not level:
            log.info("governor: %s -> %s", old.value, level.value)


def _rank(name: str, terms: Mapping[str, tuple[int, float]], uses: Mapping[str, float]) -> tuple[int, float, str]:
    """Return the place of a plugin among those to pause: low priority first, among equals the costliest."""
    return terms[name][0], -uses.get(name, 0.0), name


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def in_mib(size_bytes: int) -> str:
    """Return bytes as `70.1 MiB`, or `64 MiB`."""
    return f"{size_bytes / (1 << 20):.1f}".removesuffix(".0") + " MiB"
