"""The clock state's promises: units as the kernel means them, and what counts as synchronized."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time

import pytest

from kon_agent.linux.clockstate import ClockState, TimeState, _decode, _Timex, read_clock_state
from tests.support.program import environment_of

STA_PLL = 0x0001
STA_UNSYNC = 0x0040
STA_NANO = 0x2000

DISCIPLINED = _Timex(offset=-1500, freq=-819200, maxerror=250_000, esterror=1_200, status=STA_PLL, tai=37)


def test_every_value_comes_in_base_units() -> None:
    """Errors and offset are seconds, the frequency ppm without its 16-bit fraction, TAI whole seconds."""
    expected = ClockState(
        is_synchronized=True,
        offset_s=-0.0015,
        frequency_ppm=-12.5,
        max_error_s=0.25,
        estimated_error_s=0.0012,
        tai_offset_s=37,
        state=TimeState.OK,
    )
    assert expected == _decode(DISCIPLINED, 0)


def test_the_nanosecond_flag_changes_the_unit_of_the_offset_only() -> None:
    """With STA_NANO the offset is in nanoseconds; the errors stay in microseconds."""
    state = _decode(_Timex(offset=-1500, maxerror=250_000, esterror=1_200, status=STA_NANO), 0)
    assert (-0.0000015, 0.25, 0.0012) == (state.offset_s, state.max_error_s, state.estimated_error_s)


def test_an_error_at_the_ceiling_is_not_synchronized() -> None:
    """After boot, and after the clock was set, the maximum error is 16 s: nobody vouches for the time."""
    assert not _decode(_Timex(maxerror=16_000_000, status=STA_UNSYNC), 5).is_synchronized


def test_a_clock_that_spares_the_rtc_is_synchronized() -> None:
    """A service may keep STA_UNSYNC, and so the state ERROR, set on a clock whose error it bounds."""
    state = _decode(_Timex(maxerror=15_999_999, status=STA_UNSYNC), 5)
    assert (True, TimeState.ERROR) == (state.is_synchronized, state.state)


@pytest.mark.parametrize(
    ("word", "state"),
    [(0, TimeState.OK), (1, TimeState.INSERT), (2, TimeState.DELETE), (3, TimeState.IN_PROGRESS), (4, TimeState.WAIT)],
)
def test_a_leap_second_does_not_unsynchronize(word: int, state: TimeState) -> None:
    """Whatever the kernel does about a leap second, the clock is still on time."""
    answer = _decode(DISCIPLINED, word)
    assert (True, state) == (answer.is_synchronized, answer.state)


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_long) != 8, reason="the offsets below are those of 64-bit machines")
def test_the_structure_is_the_kernels() -> None:
    """Its size and the places of its fields are those of sys/timex.h."""
    offsets = {name: getattr(_Timex, name).offset for name in ("offset", "status", "tick", "stbcnt", "tai")}
    assert {"offset": 8, "status": 40, "tick": 88, "stbcnt": 152, "tai": 160} == offsets
    assert 208 == ctypes.sizeof(_Timex)


def test_this_machine_answers() -> None:
    """The kernel's answer lies within the kernel's own bounds, and agrees with clock_gettime(2) on TAI."""
    state = read_clock_state()
    assert 0.0 <= state.max_error_s <= 16.0
    assert -500.0 <= state.frequency_ppm <= 500.0
    assert state.tai_offset_s == round(time.clock_gettime(time.CLOCK_TAI) - time.time())


def test_it_is_cheap_to_import() -> None:
    """A worker that asks once for the clock's state loads nothing of this project but the C library's binding."""
    program = (
        "import sys, kon_agent.linux.clockstate; print(*[m for m in sys.modules if m.startswith('kon_agent.linux.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment_of(), capture_output=True, text=True, check=True
    )
    assert ["kon_agent.linux.clockstate", "kon_agent.linux.libc"] == sorted(done.stdout.split())
