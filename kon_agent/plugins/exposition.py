"""The Prometheus text format, version 0.0.4, one line at a time.

    http_requests_total{method="post",code="200"} 1027 1395066363000
    └── name ─────────┘└── labels, optional ─────┘ └value └ milliseconds since the epoch, optional

Lines that begin with `#` are HELP, TYPE or comments; a histogram and a summary are the plain series they are printed
as (`_bucket{le=…}`, `{quantile=…}`, `_sum`, `_count`). Source: prometheus.io, "Exposition formats".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kon_agent.metric import Metric
from kon_agent.plugins import printed
from kon_agent.plugins.printed import MAX_LABELS, BadLine, Line, Printed

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*+")
# Possessive, so that a hostile line costs one pass.
_LABEL = re.compile(r'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"[ \t]*+([,}])')
_END_OF_LABELS = re.compile(r"[ \t]*+}")
_ESCAPE = re.compile(r"\\(.)")
_VALUE = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?|[+-]?Inf|NaN", re.IGNORECASE)
_ESCAPED = {"\\": "\\", '"': '"', "n": "\n"}
_NS_PER_MS = 1_000_000


def parse(lines: Iterable[bytes], first_number: int = 1) -> Printed:
    """Return what `lines` hold; `first_number` is the first one's in what the program has printed."""
    return printed.read(lines, _parse_line, first_number)


def _parse_line(text: str) -> Line:
    name = _NAME.match(text)
    if name is None:
        raise BadLine("does not begin with a metric's name")
    position = name.end()
    while text[position : position + 1] in (" ", "\t"):
        position += 1
    labels: dict[str, str] = {}
    if text[position : position + 1] == "{":
        labels, position = _parse_labels(text, position + 1)
    elif position == name.end():
        raise BadLine("expected a space or '{' after the metric's name")
    fields = text[position:].split()
    if not 1 <= len(fields) <= 2:
        raise BadLine("expected a value and at most a time stamp")
    if not _VALUE.fullmatch(fields[0]):
        raise BadLine(f"{fields[0]!r} is no number")
    ts_ns = printed.timestamp_ns(fields[1], _NS_PER_MS) if len(fields) == 2 else 0
    return Line((Metric(name[0], float(fields[0]), labels, ts_ns=ts_ns),))


def _parse_labels(text: str, position: int) -> tuple[dict[str, str], int]:
    """Return the labels that begin at `position`, and where they end."""
    labels: dict[str, str] = {}
    # A comma may follow the last label, too.
    while (end := _END_OF_LABELS.match(text, position)) is None:
        label = _LABEL.match(text, position)
        if label is None:
            raise BadLine("labels are not name=\"value\" with ',' between and '}' after them")
        name, value, delimiter = label.groups()
        if name in labels:
            raise BadLine(f"the label {name!r} is given twice")
        if len(labels) == MAX_LABELS:
            raise BadLine(f"more than {MAX_LABELS} labels")
        labels[name] = _ESCAPE.sub(_unescape, value)
        position = label.end()
        if delimiter == "}":
            return labels, position
    return labels, end.end()


def _unescape(escape: re.Match[str]) -> str:
    if escape[1] not in _ESCAPED:
        raise BadLine(f'unknown escape {escape[0]!r}; there are \\\\, \\" and \\n')
    return _ESCAPED[escape[1]]
