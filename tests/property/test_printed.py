"""What programs print: whatever it is, the parsers return, and what is well-formed comes back as it was meant."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.metric import Metric
from kon_agent.plugins import exposition, lineprotocol
from kon_agent.plugins.printed import MAX_SERIES, Printed
from kon_agent.wire.encode import encode_record

FORMATS = [exposition.parse, lineprotocol.parse]

names = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,20}", fullmatch=True)
label_names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,10}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
metrics = st.builds(
    Metric,
    names,
    st.floats(),
    st.dictionaries(label_names, texts, max_size=4),
    ts_ns=st.integers(0, 2**63 // 10**6 - 1).map(lambda ms: ms * 10**6),
)
near_misses = st.text(alphabet='ab1 ,=\\"{}#eni.+-\t', max_size=40).map(str.encode)


def print_exposition(metric: Metric) -> bytes:
    """Print a metric in the Prometheus text format, as its document has it."""

    def escape(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    labels = ",".join(f'{name}="{escape(value)}"' for name, value in metric.labels.items())
    ts = f" {metric.ts_ns // 10**6}" if metric.ts_ns else ""
    return f"{metric.name}{{{labels}}} {metric.value!r}{ts}".encode()


def print_line(metric: Metric) -> bytes:
    """Print a metric in the line protocol, as its document has it."""

    def escape(text: str) -> str:
        return re.sub(r"([,= ])", r"\\\1", text)

    tags = "".join(f",{escape(name)}={escape(value)}" for name, value in metric.labels.items())
    return f"{metric.name}{tags} value={metric.value!r}{f' {metric.ts_ns}' if metric.ts_ns else ''}".encode()


def same(left: Metric, right: Metric) -> bool:
    """Whether two metrics are equal, not-a-number being equal to itself."""
    values_agree = left.value == right.value or (math.isnan(left.value) and math.isnan(right.value))
    return values_agree and (left.name, left.labels, left.ts_ns) == (right.name, right.labels, right.ts_ns)


@given(st.lists(metrics, max_size=5))
def test_the_text_format_comes_back(printed_metrics: list[Metric]) -> None:
    """Every name, label text, value and millisecond survives printing and parsing."""
    printed = exposition.parse(map(print_exposition, printed_metrics))
    assert 0 == printed.rejected, printed.complaint
    assert all(same(*pair) for pair in zip(printed_metrics, printed.metrics, strict=True))


# A backslash before a separator cannot be told from an escape, a line break ends the line, and no tag may be empty.
tag_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\\n\r"), min_size=1, max_size=20)


@given(metrics, st.dictionaries(label_names, tag_texts, max_size=4))
def test_the_line_protocol_comes_back(metric: Metric, tags: dict[str, str]) -> None:
    """Every tag text, finite value and nanosecond survives printing and parsing."""
    value = metric.value if math.isfinite(metric.value) else 0.0
    meant = Metric(metric.name, value, tags, ts_ns=metric.ts_ns)
    printed = lineprotocol.parse([print_line(meant)])
    assert 0 == printed.rejected, printed.complaint
    assert [meant] == printed.metrics


@pytest.mark.parametrize("parse", FORMATS)
@given(lines=st.lists(st.one_of(st.binary(max_size=60), near_misses), max_size=20))
def test_nothing_raises_and_every_line_is_accounted_for(
    parse: Callable[[list[bytes]], Printed], lines: list[bytes]
) -> None:
    """Whatever the bytes: what comes out can be encoded, and a rejected line is counted once and told."""
    printed = parse(lines)
    for metric in printed.metrics:
        encode_record(metric, 1)
    assert 0 <= printed.rejected <= len(lines)
    assert bool(printed.rejected) == bool(printed.complaint)
    assert printed.complaint.isprintable()


@pytest.mark.parametrize("parse", FORMATS)
@given(counts=st.lists(st.integers(1, 40), max_size=120))
def test_values_are_bounded(parse: Callable[[list[bytes]], Printed], counts: list[int]) -> None:
    """However many are printed, in lines of however many, no more than MAX_SERIES come out."""
    lines = [b"m " + b",".join(b"f%d=1" % n for n in range(count)) for count in counts]
    assert len(parse(lines).metrics) <= MAX_SERIES
