"""Quantities as people write them: durations, sizes and CPU shares, parsed and printed. Pure.

Invariants: `parse_x(format_x(v)) == v` for every value a parser accepts; what a parser returns is finite, not
negative, and within the bound named below. Decimal arithmetic keeps `0.1s` and `100ms` the same number.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from kon_agent.config.mistake import shown
from kon_agent.config.schema import Duration, Share, Size

MAX_DURATION_S = 3650 * 86400  # ten years: far above any use, far below what a timeout in nanoseconds overflows at
MAX_SIZE_BYTES = 2**50  # one PiB: above any disk here, below every 64-bit counter
MAX_SHARE = 64.0  # cores; more is a percentage written without its sign
MAX_TEXT_CHARS = 40  # no quantity needs more digits; bounds the work on hostile text

_SECONDS = {
    "d": Decimal(86400),
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_BYTES = {
    unit + "B": base**power
    for units, base in ((("K", "M", "G", "T"), 1000), (("Ki", "Mi", "Gi", "Ti"), 1024))
    for power, unit in enumerate(units, start=1)
} | {"B": 1}
_BYTES_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES.items()}

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_BARE = re.compile(_NUMBER)
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|[smhd]))+")
_DURATION_PART = re.compile(rf"({_NUMBER})(ms|[smhd])")
_SIZE = re.compile(rf"({_NUMBER}) ?([A-Za-z]+)")
_SHARE = re.compile(rf"({_NUMBER}) ?%")


def parse_duration(value: object) -> Duration:
    """Return the seconds in `100ms`, `5s`, `1m30s`, `7d` or a bare number of seconds.

    Several parts add up, as in the durations of Go, which the original reads.

    Raises:
        ValueError: not a duration, negative, not finite, or longer than MAX_DURATION_S.
    """
    error = ValueError(f"{shown(value)} is not a duration; write 100ms, 5s, 1m, 2h or 7d")
    seconds = _bare_number(value)
    if seconds is None:
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not _DURATION.fullmatch(value):
            raise error
        seconds = sum((Decimal(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(value)), Decimal(0))
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError(f"{shown(value)} is out of range; a duration is from 0 to 3650d")
    return Duration(seconds)


def parse_size(value: object) -> Size:
    """Return the bytes in `50MB` (10^6), `64KiB` (2^10), `1.5GiB` or a bare number of bytes; any case.

    Raises:
        ValueError: not a size, negative, not a whole number of bytes, or more than MAX_SIZE_BYTES.
    """
    size = _bare_number(value)
    if size is None:
        match = _SIZE.fullmatch(value) if isinstance(value, str) and len(value) <= MAX_TEXT_CHARS else None
        factor = _BYTES_BY_LOWER.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(f"{shown(value)} is not a size; write 50MB (10^6) or 64KiB (2^10)")
        size = Decimal(match[1]) * factor
    if not 0 <= size <= MAX_SIZE_BYTES:
        raise ValueError(f"{shown(value)} is out of range; a size is from 0 to {format_size(MAX_SIZE_BYTES)}")
    if size != int(size):
        raise ValueError(f"{shown(value)} is not a whole number of bytes")
    return Size(size)


def parse_share(value: object) -> Share:
    """Return the cores in `2%` (0.02 of one core), `150%` (one and a half) or a bare fraction.

    Raises:
        ValueError: not a share, negative, not finite, or more than MAX_SHARE cores.
    """
    share = _bare_number(value)
    if share is None:
        match = _SHARE.fullmatch(value) if isinstance(value, str) and len(value) <= MAX_TEXT_CHARS else None
        if match is None:
            raise ValueError(f"{shown(value)} is not a share of a core; write 2% or 0.02")
        share = Decimal(match[1]) / 100
    if not 0 <= share <= Decimal(MAX_SHARE):
        raise ValueError(f"{shown(value)} is out of range; a share is from 0% to {format_share(MAX_SHARE)}")
    return Share(share)


def format_duration(seconds: float) -> str:
    """Return `seconds` in days, hours or minutes where they divide it, else in seconds or milliseconds."""
    exact = Decimal(repr(float(seconds)))
    for unit in ("d", "h", "m"):
        if exact and exact % _SECONDS[unit] == 0:
            return f"{_plain(exact / _SECONDS[unit])}{unit}"
    return f"{_plain(exact * 1000)}ms" if 0 < exact < 1 else f"{_plain(exact)}s"


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` in the largest unit that divides it: `50MB`, `64KiB`, `1B`."""
    for unit, factor in sorted(_BYTES.items(), key=lambda item: -item[1]):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return "0B"


def format_share(share: float) -> str:
    """Return `share`, a fraction of one core, as a percentage: `2%`."""
    return f"{_plain(Decimal(repr(float(share))) * 100)}%"


def _bare_number(value: object) -> Decimal | None:
    """Return a finite number that carries no unit, also written as text; None for everything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Decimal(value)  # of any length: the range is the caller's to check
    if isinstance(value, float):
        return Decimal(repr(value)) if math.isfinite(value) else None
    if isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and _BARE.fullmatch(value):
        return Decimal(value)
    return None


def _plain(number: Decimal) -> str:
    """Return `number` without exponent and without trailing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
