"""The governor's promises, on a tree that is not there: within the limit, back when there is room, no idle step."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kon_agent.clock import NS_PER_S
from kon_agent.supervisor.governor import GRACE_S, HOLD_S, MAX_STEPS, MEMORY_PATIENCE_S, PAUSE_S
from kon_agent.supervisor.ladder import Level, Limits, Move, Step
from tests.unit.supervisor.plant import MIB, START_NS, Plant, Plugin

LIMIT = 0.02
SETTLED_S = 30.0  # after the onset of a storm: what was used before the first steps is in no window from then on
RECOVERY_S = 180.0
STORM_S = 150.0
WORST = 1.25  # a failed probation in the minute in which the others get their periods back (1.22 found by search)


def ordinary(**more: Plugin) -> dict[str, Plugin]:
    """Return what a default agent runs, and more."""
    return {"cpu": Plugin(0.005), "disk": Plugin(0.008), "memory": Plugin(0.003), **more}


def kinds(steps: list[Step]) -> list[tuple[Move, str]]:
    """Return what was done to whom."""
    return [(step.move, step.plugin) for step in steps]


def test_a_healthy_tree_is_left_alone() -> None:
    """No step in an hour of ordinary work, starts of workers included."""
    plant = Plant(ordinary())
    assert [] == plant.run(3600)
    assert (Level.NORMAL, "") == (plant.governor.level, plant.governor.detail)


def test_a_spike_is_forgiven() -> None:
    """A fifth of a second once, such as a reload, is no reason to slow anyone."""
    plant = Plant(ordinary(), base=0.0)
    plant.run(60)
    plant.base = 0.2
    plant.turn(1.0)
    plant.base = 0.0
    assert [] == plant.run(60)


def test_a_long_but_rare_cycle_is_none_of_its_business() -> None:
    """Half a second each minute is less than the limit, though it comes at once."""
    plant = Plant(ordinary(report=Plugin(0.5, period_s=60.0)))
    assert [] == plant.run(1800)


def test_nothing_happens_while_all_is_being_started() -> None:
    """Whatever is used in the first GRACE_S is the start's."""
    plant = Plant({"cpu": Plugin(is_busy=True)})
    assert [] == plant.run(GRACE_S - 1)
    assert [(Move.PAUSE, "cpu")] == kinds(plant.run(5))


def test_periods_are_stretched_before_anyone_is_paused() -> None:
    """What fits at four times the period is not paused; the steps taken lead below the limit."""
    plant = Plant(ordinary(process=Plugin(0.25)))
    steps = plant.run(120)
    assert [(Move.STRETCH, ""), (Move.STRETCH, "")] == kinds(steps)[:2]
    assert not {Move.PAUSE, Move.RESUME} & {step.move for step in steps}
    assert plant.worst_minute(START_NS + int(SETTLED_S * NS_PER_S)) <= 1.1 * LIMIT


def test_the_lowest_priority_is_paused_first() -> None:
    """Among those of one priority the costliest; no more than is needed."""
    plant = Plant(
        {
            "vital": Plugin(0.030, period_s=1.0, priority=90),
            "dear": Plugin(0.060, period_s=1.0, priority=20),
            "cheap": Plugin(0.015, period_s=1.0, priority=20),
        }
    )
    paused = [step.plugin for step in plant.run(80) if step.move is Move.PAUSE]
    assert ["dear"] == paused
    assert (Level.PAUSED, 4) == (plant.governor.level, plant.governor.factor)


def test_nobody_is_paused_in_vain() -> None:
    """Where the costliest has the higher priority, those below it stay if pausing them would not have helped."""
    plant = Plant(ordinary(wild=Plugin(0.02, period_s=0.1, priority=90)))
    assert {"wild"} == {step.plugin for step in plant.run(60)} - {""}


def test_a_busy_loop_is_paused_and_nobody_else_pays() -> None:
    """A worker that exceeds the limit by itself at any period goes, whatever its priority; periods stay."""
    plant = Plant(ordinary(hog=Plugin(priority=100)))
    plant.run(60)
    onset_ns = plant.now_ns
    plant.plugins["hog"].is_busy = True
    steps = plant.run(400)
    assert {"hog"} == {step.plugin for step in steps}
    assert onset_ns + 2 * NS_PER_S >= steps[0].at_ns
    assert 1 == plant.governor.factor
    assert plant.worst_minute(onset_ns + int(SETTLED_S * NS_PER_S)) <= 1.1 * LIMIT


def test_a_failed_probation_doubles_the_hold() -> None:
    """Each return of a plugin that has not changed comes later, and ends within a second."""
    plant = Plant(ordinary(hog=Plugin(is_busy=True)))
    steps = [step for step in plant.run(400) if step.plugin == "hog"]
    pauses = [step.at_ns for step in steps if step.move is Move.PAUSE]
    resumes = [step.at_ns for step in steps if step.move is Move.RESUME]
    holds_s = [(resume - pause) / NS_PER_S for pause, resume in zip(pauses, resumes, strict=False)]
    assert PAUSE_S <= holds_s[0] < 1.5 * PAUSE_S <= holds_s[1]
    tries_s = [(pause - resume) / NS_PER_S for resume, pause in zip(resumes, pauses[1:], strict=False)]
    assert max(tries_s) <= 1.0


def test_all_is_back_after_a_storm() -> None:
    """Three minutes after its end no plugin is paused and every period is what it should be."""
    names = ("cgroup", "exec", "process")
    plant = Plant(ordinary(**{name: Plugin(0.02) for name in names}))
    plant.run(60)
    for name in names:
        plant.plugins[name].period_s = 0.1
    assert Level.PAUSED is (plant.run(120), plant.governor.level)[1]
    for name in names:
        plant.plugins[name].period_s = 5.0
    plant.run(RECOVERY_S)
    assert (Level.NORMAL, 1, {}) == (plant.governor.level, plant.governor.factor, plant.governor.paused)


def test_a_plugin_given_another_period_is_tried_afresh() -> None:
    """A paused plugin need not serve its hold once it has been set up differently."""
    plant = Plant(ordinary(process=Plugin(0.05, period_s=0.1)))
    plant.run(60)
    assert ["process"] == list(plant.governor.paused)
    plant.plugins["process"].period_s = 30.0
    assert (Move.RESUME, "process") in kinds(plant.run(PAUSE_S))


def test_a_paused_plugin_that_is_disabled_is_let_go() -> None:
    """It is not paused any more: if it is enabled later it starts at once."""
    plant = Plant(ordinary(hog=Plugin(is_busy=True)))
    plant.run(20)
    plant.plugins["hog"].is_wanted = False
    assert [(Move.RESUME, "hog")] == kinds(plant.run(2))
    assert Level.NORMAL is plant.governor.level


def test_a_limit_below_the_base_ends_at_the_bottom_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """All is paused, one warning names the limit to raise, and nothing is ever tried again."""
    plant = Plant(ordinary(), cpu=0.001, base=0.004)
    with caplog.at_level(logging.WARNING):
        plant.run(120)
        assert [] == plant.run(1800)
    assert 1 == sum("nothing is left to pause" in record.message for record in caplog.records)
    assert "above limits.cpu, 0.1 %" in plant.governor.detail


def test_other_limits_are_gone_by_at_once() -> None:
    """A raised limit brings back what was paused under the lower one."""
    plant = Plant(ordinary(), cpu=0.001, base=0.004)
    plant.run(60)
    plant.governor.set_limits(Limits(0.05, 1 << 40))
    plant.run(RECOVERY_S)
    assert (Level.NORMAL, "") == (plant.governor.level, plant.governor.detail)


def test_too_much_memory_pauses_one_at_a_time() -> None:
    """Periods do not change it; the largest of the lowest priority goes, and the next only if that was not enough."""
    plant = Plant(ordinary(big=Plugin(memory_bytes=30 * MIB)), memory_bytes=64 * MIB)
    assert [] == plant.run(GRACE_S)
    steps = plant.run(3 * MEMORY_PATIENCE_S)
    assert [(Move.PAUSE, "big")] == kinds(steps)
    assert "91 MiB of memory is used; the limit is 64 MiB" == steps[0].reason


def test_a_plugin_paused_for_memory_waits_for_room() -> None:
    """It is not tried while it would not fit, and comes back when it does."""
    plant = Plant(ordinary(big=Plugin(memory_bytes=30 * MIB)), memory_bytes=64 * MIB)
    plant.run(600)
    assert ["big"] == list(plant.governor.paused)
    plant.governor.set_limits(Limits(LIMIT, 128 * MIB))
    assert [(Move.RESUME, "big")] == kinds(plant.run(RECOVERY_S))


def test_memory_that_does_not_add_up_is_no_reason() -> None:
    """Where PSS may not be read, resident sets count shared pages many times over."""
    plant = Plant(ordinary(), memory_bytes=1)
    plant.is_memory_known = False
    assert [] == plant.run(300)


def test_every_step_is_logged_remembered_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The log has each step and each change of level; status the last ones; the metrics all by kind."""
    plant = Plant(ordinary(hog=Plugin(is_busy=True)))
    with caplog.at_level(logging.INFO):
        steps = plant.run(900)
    assert len(steps) == sum(record.message in {f"governor: {step}" for step in steps} for record in caplog.records)
    assert "governor: normal -> paused" in {record.message for record in caplog.records}
    assert steps[-MAX_STEPS:] == list(plant.governor.steps)
    assert len(steps) == plant.governor.counts.total()
    assert "paused: hog" == plant.governor.detail


PLUGINS = st.builds(
    Plugin,
    cost_s=st.floats(0.0005, 0.08),
    period_s=st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 5.0]),
    priority=st.sampled_from([10, 50, 90]),
    is_busy=st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(storm=st.lists(PLUGINS, max_size=5), limit=st.sampled_from([0.02, 0.05, 0.2]))
def test_any_storm_is_weathered(storm: list[Plugin], limit: float) -> None:
    """Once settled, no minute exceeds the limit by much, steps are few, and after the storm all comes back."""
    wild = {f"p{number}": plugin for number, plugin in enumerate(storm)}
    plant = Plant(ordinary(**wild), cpu=limit)
    for plugin in wild.values():
        plugin.is_wanted, plugin.start_ns = False, None
    assert [] == plant.run(60)
    onset_ns = plant.now_ns
    for plugin in wild.values():
        plugin.is_wanted = True
    plant.run(SETTLED_S)
    steps = plant.run(STORM_S)
    assert plant.worst_minute(onset_ns + int(SETTLED_S * NS_PER_S)) <= WORST * limit
    assert len(steps) <= 2 * STORM_S / HOLD_S
    for plugin in wild.values():
        plugin.is_busy, plugin.cost_s, plugin.period_s = False, 0.0005, 5.0
    plant.run(RECOVERY_S)
    assert (Level.NORMAL, {}) == (plant.governor.level, plant.governor.paused)
