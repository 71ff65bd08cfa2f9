"""Measuring and governing, carried out: reads the meter, asks the governor, and does to the units what it says.

Owns the rhythm: once a second, more often while a plugin is on probation. A worker above its own memory limit is
replaced here, whatever the tree as a whole uses.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterable, Mapping

from kon_agent import clock
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import LimitsConfig
from kon_agent.control_protocol import ResourceStatus, StepStatus
from kon_agent.lifecycle import State
from kon_agent.linux import cgroup
from kon_agent.linux.cgroup import Delegated
from kon_agent.supervisor.child import Supervised
from kon_agent.supervisor.governor import Governor, in_mib
from kon_agent.supervisor.ladder import Level, Limits, Move, Step
from kon_agent.supervisor.meter import SENDER_START_CPU_S, Account, Meter, Subject
from kon_agent.supervisor.profiles import profile_for
from kon_agent.supervisor.reading import Reading, Use
from kon_agent.supervisor.unit import Unit
from kon_agent.telemetry import GovernorSample

log = logging.getLogger(__name__)

INTERVAL_NS = NS_PER_S
WATCHING_INTERVAL_NS = NS_PER_S // 4
FIRST_NS = 900_000_000  # just before the agent plugin's first tick, and so before all that follow
GROUP_FACTOR = 2  # times the limit: the kernel's bound is to stop what is out of hand, not to make a cycle late
GROUP_MIN_CPU = 0.25  # cores: a worker's start would take minutes at the limit itself
HEARTBEAT_PLUGIN = "agent"  # tells the world how the agent fares: never slowed, never paused


class Regulation:
    """The meter, the governor, and when it is their turn.

    Args:
        limits: what the tree may use.
        now_ns: now.
        group: the control group whose kernel limits back ours; None where there is none.
    """

    def __init__(self, limits: LimitsConfig, now_ns: int, group: Delegated | None = None) -> None:
        self.meter = Meter()
        self.due_ns = now_ns + FIRST_NS
        self._governor = Governor(_limits(limits), now_ns)
        self._group = group
        self._grouped: set[int] = set()  # workers that have been moved there
        self._limit_group()

    def set_limits(self, limits: LimitsConfig) -> None:
        """Go by other limits from now on."""
        self._governor.set_limits(_limits(limits))
        self._limit_group()

    def tick(self, units: Mapping[str, Unit], others: Iterable[Supervised], sender: Supervised, now_ns: int) -> None:
        """Measure and govern if it is time.

        Args:
            units: every plugin by name.
            others: processes to count that nothing is done about, such as workers of plugins that were removed.
            sender: the sender.
        """
        if now_ns < self.due_ns:
            return
        subjects = [Subject("supervisor", os.getpid()), *filter(None, map(_subject, units.values()))]
        subjects += [Subject(other.name, other.pid) for other in others if other.pid is not None]
        if sender.pid is not None:
            subjects.append(Subject(sender.name, sender.pid, "", _is_starting(sender), SENDER_START_CPU_S))
        self._admit(subjects)
        accounts = self.meter.measure(subjects, now_ns)
        _replace_the_heavy(units, accounts, now_ns)
        terms = _terms(units, self._governor.factor)
        for step in self._governor.decide(_reading(self.meter.span_s, terms, accounts, sender), now_ns):
            self._take(step, units, now_ns)
        for name, unit in units.items():  # also the one that has just been added
            if name != HEARTBEAT_PLUGIN:
                unit.stretch(self._governor.factor)
        self.due_ns = now_ns + (WATCHING_INTERVAL_NS if self._governor.is_watching else INTERVAL_NS)

    def _limit_group(self) -> None:
        limits = self._governor.limits
        if self._group is not None:
            try:
                self._group.limit(max(GROUP_MIN_CPU, GROUP_FACTOR * limits.cpu), limits.memory_bytes)
            except OSError as err:
                self._lose_group(err)

    def _admit(self, subjects: Iterable[Subject]) -> None:
        """Move workers that are new to the group with the kernel's limits."""
        group = self._group
        if group is None:
            return
        workers = {each.pid for each in subjects if each.plugin not in ("", HEARTBEAT_PLUGIN)}
        for pid in workers - self._grouped:
            try:
                group.admit(pid)
            except ProcessLookupError:  # it has ended since
                continue
            except OSError as err:
                self._lose_group(err)
                return
        self._grouped = workers

    def _lose_group(self, err: OSError) -> None:
        log.warning("the control group is used no longer: %s; the limits are kept without the kernel's help", err)
        self._group = None

    def _take(self, step: Step, units: Mapping[str, Unit], now_ns: int) -> None:
        unit = units.get(step.plugin)
        if unit is not None and step.move is Move.PAUSE:
            unit.pause(f"paused by the governor: {step.reason}", now_ns)
        elif unit is not None and step.move is Move.RESUME:
            unit.resume()

    def status(self, now_ns: int) -> ResourceStatus:
        """Return what the tree uses and what is done about it."""
        governor = self._governor
        wall_ns = clock.wall_ns() - now_ns
        return ResourceStatus(
            cpu_percent=self.meter.cpu_percent,
            pss_bytes=self.meter.pss_bytes,
            level=governor.level.value,
            cpu_limit_percent=100 * governor.limits.cpu,
            memory_limit_bytes=governor.limits.memory_bytes,
            detail=governor.detail,
            steps=[
                StepStatus(
                    at=datetime.datetime.fromtimestamp((wall_ns + step.at_ns) / NS_PER_S, datetime.UTC).isoformat(
                        timespec="milliseconds"
                    ),
                    step=step.move.value,
                    plugin=step.plugin or None,
                    factor=step.factor,
                    reason=step.reason,
                )
                for step in governor.steps
            ],
        )

    def sample(self) -> GovernorSample:
        """Return what telemetry reports of the governor."""
        governor = self._governor
        return GovernorSample(
            level=list(Level).index(governor.level),
            factor=governor.factor,
            paused=sorted(governor.paused),
            steps={move.value: governor.counts[move] for move in Move},
            cpu_limit_percent=100 * governor.limits.cpu,
            memory_limit_bytes=governor.limits.memory_bytes,
        )


def own_group() -> Delegated | None:
    """Return our control group, divided for the workers, where it has been delegated. Call before the first fork."""
    try:
        return cgroup.claim(os.getpid())
    except OSError as err:
        log.warning("the control group cannot be divided: %s; the limits are kept without the kernel's help", err)
        return None


def _limits(config: LimitsConfig) -> Limits:
    return Limits(cpu=float(config.cpu), memory_bytes=int(config.memory))


def _is_starting(process: Supervised) -> bool:
    return process.lifecycle.state in (State.STARTING, State.HALF_OPEN)


def _subject(unit: Unit) -> Subject | None:
    if unit.pid is None:
        return None
    has_programs = "exec" in profile_for(unit.config).allow
    return Subject(unit.name, unit.pid, unit.plugin, _is_starting(unit), has_programs=has_programs)


def _terms(units: Mapping[str, Unit], factor: int) -> dict[str, tuple[int, float]]:
    return {
        name: (unit.config.priority, unit.period_s / factor)
        for name, unit in units.items()
        if name != HEARTBEAT_PLUGIN and unit.is_wanted and not unit.obstacle
    }


def _reading(
    span_s: float, terms: Mapping[str, tuple[int, float]], accounts: Iterable[Account], sender: Supervised
) -> Reading:
    base, of_sender, plugins, is_exact = Use(), Use(), dict[str, Use](), True
    for account in accounts:
        use = Use(account.used_s, account.start_s, account.pss_bytes)
        is_exact = is_exact and account.is_exact
        if account.subject.plugin not in ("", HEARTBEAT_PLUGIN):
            plugins[account.subject.plugin] = use
        elif account.subject.pid == sender.pid:
            of_sender = use
        else:
            base = base + use
    return Reading(span_s, base, of_sender, plugins, terms, is_exact)


def _replace_the_heavy(units: Mapping[str, Unit], accounts: Iterable[Account], now_ns: int) -> None:
    for account in accounts:
        unit = units.get(account.subject.plugin)
        if unit is None or unit.pid != account.subject.pid or account.pss_at_ns != now_ns:
            continue
        limit = int(unit.config.memory_limit)
        if account.pss_bytes > limit:
            unit.kill(f"uses {in_mib(account.pss_bytes)} of its memory_limit {in_mib(limit)}", now_ns)
