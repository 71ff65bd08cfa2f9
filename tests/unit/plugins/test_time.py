"""The time collector's promises."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent import clock
from kon_agent.config.schema import TimeConfig
from kon_agent.linux import clockstate
from kon_agent.linux.clockstate import ClockState, TimeState
from kon_agent.plugins.context import Context
from kon_agent.plugins.time import STEP_NS, Difference, Time, _is_step

NS_PER_S = clock.NS_PER_S
BOOTED_NS = 1_700_000_000 * NS_PER_S

DISCIPLINED = ClockState(
    is_synchronized=True,
    offset_s=-0.0015,
    frequency_ppm=-12.5,
    max_error_s=0.25,
    estimated_error_s=0.0012,
    tai_offset_s=37,
    state=TimeState.OK,
)


class Clocks:
    """A wall clock and a boot clock; each reading of the boot clock takes the next of `delays_ns`."""

    def __init__(self, delays_ns: Iterable[int] = ()) -> None:
        self.boot_ns = 100 * NS_PER_S
        self.difference_ns = BOOTED_NS
        self.delays_ns = list(delays_ns)

    def now_ns(self) -> int:
        self.boot_ns += self.delays_ns.pop(0) if self.delays_ns else 0
        return self.boot_ns

    def wall_ns(self) -> int:
        return self.boot_ns + self.difference_ns

    def context(self) -> Context:
        return Context(now_ns=self.now_ns, wall_ns=self.wall_ns)


def values(collector: Time) -> dict[str, float]:
    """Collect; return the values by name."""
    return {metric.name: metric.value for metric in collector.collect()}


def started(clocks: Clocks) -> Time:
    """Return a collector that has taken its baseline."""
    collector = Time(TimeConfig(), clocks.context())
    collector.start()
    return collector


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[ClockState | OSError], None]:
    """Return what makes adjtimex give an answer, or fail."""

    def give(state: ClockState | OSError) -> None:
        def read() -> ClockState:
            if isinstance(state, OSError):
                raise state
            return state

        monkeypatch.setattr(clockstate, "read_clock_state", read)

    return give


def test_the_discipline_is_reported(answer: Callable[[ClockState | OSError], None]) -> None:
    """Every value of the clock's state is a metric of its own, a float in the unit of its name."""
    answer(DISCIPLINED)
    assert {
        "time_clock_synchronized": 1.0,
        "time_offset_seconds": -0.0015,
        "time_frequency_ppm": -12.5,
        "time_maximum_error_seconds": 0.25,
        "time_estimated_error_seconds": 0.0012,
        "time_tai_offset_seconds": 37.0,
        "time_clock_steps_total": 0.0,
        "time_wall_minus_boot_seconds": 1_700_000_000.0,
    } == values(started(Clocks()))


def test_every_value_is_a_float(answer: Callable[[ClockState | OSError], None]) -> None:
    """Neither a bool nor an int goes to the encoder."""
    answer(DISCIPLINED)
    assert {float} == {type(value) for value in values(started(Clocks())).values()}


def test_a_refused_call_takes_only_its_own_metrics(answer: Callable[[ClockState | OSError], None]) -> None:
    """Where a container's profile refuses adjtimex, steps are counted all the same."""
    answer(PermissionError(errno.EPERM, "adjtimex: Operation not permitted"))
    assert ["time_clock_steps_total", "time_wall_minus_boot_seconds"] == list(values(started(Clocks())))


@pytest.mark.parametrize("moved_ns", [STEP_NS + 1, -STEP_NS - 1, 3600 * NS_PER_S])
def test_a_step_is_counted_once(moved_ns: int, caplog: pytest.LogCaptureFixture) -> None:
    """A wall clock set forth or back is one step, with one warning, in the cycle after it and none later."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.difference_ns += moved_ns
    with caplog.at_level(logging.WARNING):
        counts = [values(collector)["time_clock_steps_total"] for _ in range(3)]
    assert [1.0, 1.0, 1.0] == counts
    assert [f"the wall clock was set: it moved by {moved_ns / NS_PER_S:+.3f} s"] == caplog.messages


def test_steps_add_up() -> None:
    """Two steps are two, also where the second undoes the first."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.difference_ns += NS_PER_S
    values(collector)
    clocks.difference_ns -= NS_PER_S
    assert 2.0 == values(collector)["time_clock_steps_total"]


def test_a_small_correction_is_no_step() -> None:
    """The difference may move by 0.1 s between two cycles."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.difference_ns += STEP_NS
    assert 0.0 == values(collector)["time_clock_steps_total"]


def test_suspended_time_is_no_step() -> None:
    """Both clocks count an hour asleep."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.boot_ns += 3600 * NS_PER_S
    assert 0.0 == values(collector)["time_clock_steps_total"]


def test_a_held_up_reading_is_not_used() -> None:
    """Of three readings the least disturbed counts: a pause in one neither makes a step nor hides one."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.delays_ns = [0, NS_PER_S, 0, 10, 0, 5 * NS_PER_S]
    clocks.difference_ns += STEP_NS + 11
    assert 1.0 == values(collector)["time_clock_steps_total"]


def test_a_pause_in_every_reading_is_no_step() -> None:
    """A worker that is stopped for seconds within each reading is uncertain, and counts nothing."""
    clocks = Clocks()
    collector = started(clocks)
    clocks.delays_ns = [0, 9 * NS_PER_S] * 3
    assert 0.0 == values(collector)["time_clock_steps_total"]


@given(st.integers(-NS_PER_S, NS_PER_S), st.integers(0, NS_PER_S), st.integers(0, NS_PER_S), st.data())
def test_a_step_is_never_invented(moved_ns: int, width_ns: int, next_width_ns: int, data: st.DataObject) -> None:
    """Whatever the uncertainty of two readings, a step is seen only where the clock moved by more than STEP_NS."""
    low_ns = -data.draw(st.integers(0, width_ns))
    next_low_ns = moved_ns - data.draw(st.integers(0, next_width_ns))
    before = Difference(low_ns=low_ns, high_ns=low_ns + width_ns)
    after = Difference(low_ns=next_low_ns, high_ns=next_low_ns + next_width_ns)
    assert abs(moved_ns) > STEP_NS or not _is_step(before, after)


def test_this_machine_reports_its_clocks() -> None:
    """On the real clocks nothing steps, and the difference is the moment of the boot."""
    collector = Time(TimeConfig(), Context())
    collector.start()
    collected = values(collector)
    assert 0.0 == collected["time_clock_steps_total"]
    assert (clock.wall_ns() - clock.now_ns()) / NS_PER_S == pytest.approx(
        collected["time_wall_minus_boot_seconds"], abs=0.1
    )
    assert collected["time_clock_synchronized"] in (0.0, 1.0)
