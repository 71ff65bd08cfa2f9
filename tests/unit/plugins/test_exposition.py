"""The Prometheus text format."""

from __future__ import annotations

import math

import pytest

from kon_agent.metric import Metric
from kon_agent.plugins import exposition
from kon_agent.plugins.printed import MAX_LABELS, MAX_LINE_BYTES, MAX_SERIES, Printed


def parse(text: str) -> Printed:
    """Return what a program that prints `text` reports."""
    return exposition.parse(text.encode().split(b"\n"))


def only(line: str) -> Metric:
    """Return the one metric of a line that must be good."""
    printed = parse(line)
    assert ("", 1) == (printed.complaint, len(printed.metrics))
    return printed.metrics[0]


SAMPLE = """\
# HELP http_requests_total The total number of HTTP requests.
# TYPE http_requests_total counter
http_requests_total{method="post",code="200"} 1027 1395066363000
http_requests_total{method="post",code="400"}    3 1395066363000

# Escaping in label values:
msdos_file_access_time_seconds{path="C:\\\\DIR\\\\FILE.TXT",error="Cannot find file:\\n\\"FILE.TXT\\""} 1.458255915e9
metric_without_timestamp_and_labels 12.47
something_weird{problem="division by zero"} +Inf -0
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{le="0.05"} 24054
http_request_duration_seconds_bucket{le="+Inf"} 144320
http_request_duration_seconds_sum 53423
http_request_duration_seconds_count 144320
# TYPE rpc_duration_seconds summary
rpc_duration_seconds{quantile="0.5"} 4773
"""


def test_the_format_s_own_kinds() -> None:
    """Counters, gauges, histograms and summaries come out as the series they are printed as, in order."""
    printed = parse(SAMPLE)
    assert ("", 0) == (printed.complaint, printed.rejected)
    found = {(metric.name, *metric.labels.values()): metric for metric in printed.metrics}
    assert 10 == len(found)
    assert 1395066363 * 10**9 == found["http_requests_total", "post", "200"].ts_ns
    assert 24054.0 == found["http_request_duration_seconds_bucket", "0.05"].value
    assert 4773.0 == found["rpc_duration_seconds", "0.5"].value
    files = found["msdos_file_access_time_seconds", "C:\\DIR\\FILE.TXT", 'Cannot find file:\n"FILE.TXT"']
    assert (1.458255915e9, 0) == (files.value, files.ts_ns)


@pytest.mark.parametrize(
    ("expected", "word"),
    [(math.inf, "+Inf"), (-math.inf, "-Inf"), (math.inf, "inf"), (0.5, ".5"), (2.0, "2."), (-1e-7, "-1e-7")],
)
def test_numbers(expected: float, word: str) -> None:
    """All that strtod-like printers make."""
    assert expected == only(f"a {word}").value


def test_not_a_number() -> None:
    """NaN is a value."""
    assert math.isnan(only("a NaN").value)


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ({}, "a{} 1"),
        ({"b": "c"}, 'a{b="c",} 1'),
        ({"b": "c", "d": ""}, '  a { b = "c" ,\td="" }\t1  '),
        ({"b": "},=#"}, 'a{b="},=#"}1'),
        ({"b": "ü"}, 'a{b="ü"} 1\r'),
    ],
)
def test_labels(labels: dict[str, str], line: str) -> None:
    """Blanks between the parts are free, a last comma too; any text may be a value."""
    assert labels == only(line).labels


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("metric's name", "1a 1"),
        ("space or '{'", "a-b 1"),
        ("space or '{'", "a"),
        ("expected a value", 'a{b="c"}'),
        ("expected a value", "a 1 2 3"),
        ("is no number", "a 1_000"),
        ("is no number", "a one"),
        ("is no number", "a 0x10"),
        ("no time stamp", "a 1 now"),
        ("no time stamp", "a 1 " + "9" * 3000),
        ("out of range", "a 1 -1"),
        ("out of range", "a 1 9999999999999999"),
        ("labels are not", 'a{b="c" 1'),
        ("labels are not", "a{b=c} 1"),
        ("labels are not", "a{,} 1"),
        ("labels are not", 'a{b="c"d="e"} 1'),
        ("labels are not", 'a{b="c\\"} 1'),
        ("given twice", 'a{b="c",b="d"} 1'),
        ("unknown escape", 'a{b="\\t"} 1'),
        ("more than", "a{" + ",".join(f'l{n}="x"' for n in range(MAX_LABELS + 1)) + "} 1"),
        ("longer than", "a" * MAX_LINE_BYTES + " 1"),
    ],
)
def test_a_bad_line_costs_itself_only(complaint: str, line: str) -> None:
    """It is counted, and told with its number and text; the lines around it are read."""
    printed = parse(f"before 1\n# a comment\n{line}\nafter 2")
    assert ["before", "after"] == [metric.name for metric in printed.metrics]
    assert 1 == printed.rejected
    assert printed.complaint.startswith("line 3: ")
    assert complaint in printed.complaint
    assert len(printed.complaint) < 300


def test_the_first_bad_line_is_told() -> None:
    """Further ones are counted."""
    printed = parse("1\n2\n3")
    assert 3 == printed.rejected
    assert printed.complaint.startswith("line 1:")


def test_bytes_that_are_no_text() -> None:
    """Not UTF-8: rejected, and shown without what a terminal would obey."""
    printed = exposition.parse([b"\xff\x1b[2J 1"])
    assert 1 == printed.rejected
    assert printed.complaint.isprintable()


def test_no_more_than_so_many_series() -> None:
    """What comes after the last one that fits is counted."""
    printed = parse("a 1\n" * (MAX_SERIES + 5))
    assert (MAX_SERIES, 5) == (len(printed.metrics), printed.rejected)
    assert f"more than {MAX_SERIES}" in printed.complaint
