"""InfluxDB's line protocol, one line at a time.

    disk,host=a,path=/var used=12.5,free=37i,label="x" 1700000000000000000
    └─┬┘└── tags ───────┘ └── fields ────────────────┘ └ nanoseconds since the epoch, optional
   measurement

Each field that is a number or a truth value is a metric `measurement_field`; one called `value` is the measurement's
own. `37i` is signed, `37u` unsigned, `t T true True TRUE f F …` are 1 and 0. A string is no metric: it is skipped and
counted. A backslash takes a following comma, space or (not in a measurement) `=` literally, within a string a quote or
a backslash; before anything else it stands for itself. Characters that no metric's name may have become `_`.
Source: docs.influxdata.com, "Line protocol reference".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kon_agent.metric import Metric
from kon_agent.plugins import printed
from kon_agent.plugins.printed import MAX_LABELS, BadLine, Line, Printed

# Possessive, so that a hostile line costs one pass.
_MEASUREMENT = re.compile(r"(?:\\.|[^\\, ])++")
_TAG = re.compile(r",((?:\\.|[^\\,= ])++)=((?:\\.|[^\\,= ])++)")
_FIELD = re.compile(r'((?:\\.|[^\\,= ])++)=("(?:\\.|[^\\"])*+"|[^", ]++)(,?)')
_FLOAT = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_INTEGER = re.compile(r"(-?[0-9]{1,20})([iu])")
_UNFIT = re.compile(r"[^a-zA-Z0-9_:]")
_RANGES = {"i": (-(2**63), 2**63 - 1), "u": (0, 2**64 - 1)}
_TRUTH = dict.fromkeys(("t", "T", "true", "True", "TRUE"), 1.0) | dict.fromkeys(
    ("f", "F", "false", "False", "FALSE"), 0.0
)
_OWN_FIELD = "value"


def parse(lines: Iterable[bytes], first_number: int = 1) -> Printed:
    """Return what `lines` hold; `first_number` is the first one's in what the program has printed."""
    return printed.read(lines, _parse_line, first_number)


def _parse_line(text: str) -> Line:
    found = _MEASUREMENT.match(text)
    if found is None:
        raise BadLine("does not begin with a measurement")
    measurement = re.sub(r"\\([, ])", r"\1", found[0])
    tags, position = _parse_tags(text, found.end())
    if text[position : position + 1] != " ":
        raise BadLine("expected ',tag=value' or a space and fields after the measurement")
    fields, position = _parse_fields(text, _skip_spaces(text, position))
    rest = text[position:].strip(" ")
    if rest and text[position] != " ":
        raise BadLine("expected ',field=value', or a space and a time stamp, after the fields")
    ts_ns = printed.timestamp_ns(rest, 1) if rest else 0
    metrics = tuple(
        Metric(_metric_name(measurement, field), value, tags, ts_ns=ts_ns)
        for field, value in fields
        if value is not None
    )
    return Line(metrics, skipped=len(fields) - len(metrics))


def _parse_tags(text: str, position: int) -> tuple[dict[str, str], int]:
    tags: dict[str, str] = {}
    while (tag := _TAG.match(text, position)) is not None:
        key = _unescape(tag[1])
        if key in tags:
            raise BadLine(f"the tag {key!r} is given twice")
        if len(tags) == MAX_LABELS:
            raise BadLine(f"more than {MAX_LABELS} tags")
        tags[key] = _unescape(tag[2])
        position = tag.end()
    return tags, position


def _parse_fields(text: str, position: int) -> tuple[list[tuple[str, float | None]], int]:
    fields: list[tuple[str, float | None]] = []
    while True:
        field = _FIELD.match(text, position)
        if field is None:
            raise BadLine("expected field=value")
        fields.append((_unescape(field[1]), _parse_value(field[2])))
        position = field.end()
        if not field[3]:
            return fields, position


def _parse_value(text: str) -> float | None:
    """Return a field's number; None for a string."""
    if text.startswith('"'):
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if integer := _INTEGER.fullmatch(text):
        number = int(integer[1])
        low, high = _RANGES[integer[2]]
        if not low <= number <= high:
            raise BadLine(f"{text} does not fit 64 bits")
        return float(number)
    if not _FLOAT.fullmatch(text):
        raise BadLine(f"{text!r} is no number, truth value or quoted string")
    return float(text)


def _metric_name(measurement: str, field: str) -> str:
    name = _UNFIT.sub("_", measurement if field == _OWN_FIELD else f"{measurement}_{field}")
    return f"_{name}" if name[0].isdigit() else name


def _skip_spaces(text: str, position: int) -> int:
    while text[position : position + 1] == " ":
        position += 1
    return position


def _unescape(text: str) -> str:
    return re.sub(r"\\([,= ])", r"\1", text)
