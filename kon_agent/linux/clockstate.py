"""What the kernel's clock discipline knows of the wall clock: adjtimex(2) with `modes` 0, which any process may call.

Synchronized means that the maximum error lies below the kernel's ceiling of 16 s. The kernel starts at the ceiling,
raises the error by 500 ppm while nobody disciplines the clock, and returns to the ceiling whenever the clock is set
(kernel/time/ntp.c: NTP_PHASE_LIMIT, second_overflow, ntp_clear). The flag STA_UNSYNC, and with it the state ERROR,
says less: chronyd without `rtcsync` and systemd-timesyncd with a local-time RTC keep it set on a synchronized clock,
so that the kernel leaves the RTC alone. timedatectl(1) decides the same way.
"""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass

from kon_agent.linux.libc import check, libc

MAX_ERROR_LIMIT_US = 16_000_000  # NTP_PHASE_LIMIT, include/linux/timex.h

_STA_NANO = 0x2000  # linux/timex.h: the offset is in nanoseconds, otherwise in microseconds
_FREQUENCY_SCALE = 1 << 16  # ppm with a 16-bit fraction, adjtimex(2)


class TimeState(enum.IntEnum):
    """What adjtimex(2) returns: what is to become of the next leap second, or ERROR."""

    OK = 0
    INSERT = 1
    DELETE = 2
    IN_PROGRESS = 3
    WAIT = 4
    ERROR = 5


@dataclass(frozen=True, slots=True)
class ClockState:
    """The wall clock's discipline at one moment.

    Attributes:
        is_synchronized: whether something keeps the clock on time; the module says what counts.
        offset_s: what the kernel's phase-locked loop has yet to correct, seconds; 0 where chronyd steers itself.
        frequency_ppm: the correction of the local oscillator's rate, parts per million.
        max_error_s: the bound of the error, seconds; 16 is the ceiling and says nothing.
        estimated_error_s: the error the time service expects, seconds.
        tai_offset_s: TAI minus UTC, seconds; 0 where nobody has set it.
        state: the kernel's own word.
    """

    is_synchronized: bool
    offset_s: float
    frequency_ppm: float
    max_error_s: float
    estimated_error_s: float
    tai_offset_s: int
    state: TimeState


def read_clock_state() -> ClockState:
    """Return the state of the wall clock.

    Raises:
        OSError: the call is filtered (a container's seccomp profile) or missing in this kernel.
    """
    answer = _Timex()  # modes 0: nothing is set
    return _decode(answer, check(libc.adjtimex(ctypes.byref(answer)), "adjtimex"))


class _Timex(ctypes.Structure):
    """struct timex, sys/timex.h; microseconds but where _STA_NANO says otherwise."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("precision", ctypes.c_long),
        ("tolerance", ctypes.c_long),
        ("time", ctypes.c_long * 2),
        ("tick", ctypes.c_long),
        ("ppsfreq", ctypes.c_long),
        ("jitter", ctypes.c_long),
        ("shift", ctypes.c_int),
        ("stabil", ctypes.c_long),
        ("jitcnt", ctypes.c_long),
        ("calcnt", ctypes.c_long),
        ("errcnt", ctypes.c_long),
        ("stbcnt", ctypes.c_long),
        ("tai", ctypes.c_int),
        ("reserved", ctypes.c_int * 11),
    )


libc.adjtimex.restype = ctypes.c_int
libc.adjtimex.argtypes = (ctypes.POINTER(_Timex),)


def _decode(answer: _Timex, state: int) -> ClockState:
    return ClockState(
        is_synchronized=answer.maxerror < MAX_ERROR_LIMIT_US,
        offset_s=answer.offset / (1e9 if answer.status & _STA_NANO else 1e6),
        frequency_ppm=answer.freq / _FREQUENCY_SCALE,
        max_error_s=answer.maxerror / 1e6,
        estimated_error_s=answer.esterror / 1e6,
        tai_offset_s=answer.tai,
        state=TimeState(state),
    )
