"""Metrics that a program has printed, line by line: what is common to every format.

A format is a function from one line to its metrics that raises `BadLine`; this module owns the bounds and the counting.

Invariants:
* No input makes `read` raise: a bad line is skipped and counted, and the first one is told with its number.
* What one call returns is bounded by MAX_SERIES, whatever was printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kon_agent.metric import Metric

MAX_LINE_BYTES = 4096  # one page, and far more than a record may be
MAX_LABELS = 32  # more is a mistake in the program's template, and a series nobody can query
MAX_SERIES = 2000  # of one run: about what a ring of the default size takes
MAX_TS_NS = 2**63 - 1  # the wire's int64
_SHOWN_CHARACTERS = 80


class BadLine(ValueError):
    """This line is not what the format says; the message says why."""


@dataclass(slots=True)
class Printed:
    """What was printed.

    Attributes:
        metrics: the values, in the order printed.
        rejected: lines that could not be read, or came after MAX_SERIES values.
        skipped: values that are no number, of lines that could be read.
        complaint: the first rejected line, in words; empty where there is none.
    """

    metrics: list[Metric] = field(default_factory=list)
    rejected: int = 0
    skipped: int = 0
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """What one line holds; nothing for a comment."""

    metrics: tuple[Metric, ...] = ()
    skipped: int = 0


def read(lines: Iterable[bytes], parse: Callable[[str], Line], first_number: int = 1) -> Printed:
    """Return what `lines` hold.

    Args:
        lines: without their ends.
        parse: the format.
        first_number: the number of the first line, for the complaint.
    """
    printed = Printed()
    for number, raw in enumerate(lines, first_number):
        try:
            line = _parse(raw, parse)
            if len(printed.metrics) + len(line.metrics) > MAX_SERIES:
                raise BadLine(f"more than {MAX_SERIES} values; print fewer, or split the plugin")
        except BadLine as reason:
            printed.rejected += 1
            printed.complaint = printed.complaint or f"line {number}: {reason}: {_show(raw)}"
            continue
        printed.metrics += line.metrics
        printed.skipped += line.skipped
    return printed


def timestamp_ns(digits: str, unit_ns: int) -> int:
    """Return a printed time stamp in nanoseconds since the epoch.

    Raises:
        BadLine: it is no integer, or not within the wire's range.
    """
    # The length first: Python refuses, and takes long over, numbers of thousands of digits.
    if len(digits) > len(str(MAX_TS_NS)) + 1 or not (digits.isascii() and digits.removeprefix("-").isdigit()):
        raise BadLine(f"{digits[:_SHOWN_CHARACTERS]!r} is no time stamp")
    ts_ns = int(digits) * unit_ns
    if not 0 <= ts_ns <= MAX_TS_NS:
        raise BadLine(f"the time stamp {digits} is out of range")
    return ts_ns


def printable(raw: bytes, limit: int) -> str:
    """Return at most `limit` characters of foreign text, with nothing in them that a terminal would obey."""
    text = raw[: 4 * limit].decode(errors="backslashreplace")
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _parse(raw: bytes, parse: Callable[[str], Line]) -> Line:
    if len(raw) > MAX_LINE_BYTES:
        raise BadLine(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        text = raw.decode().strip(" \t\r")
    except UnicodeDecodeError:
        raise BadLine("not UTF-8") from None
    return parse(text) if text and not text.startswith("#") else Line()


def _show(raw: bytes) -> str:
    return printable(raw, _SHOWN_CHARACTERS)
