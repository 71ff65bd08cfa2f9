"""InfluxDB's line protocol."""

from __future__ import annotations

import pytest

from kon_agent.metric import Metric
from kon_agent.plugins import lineprotocol
from kon_agent.plugins.printed import MAX_LABELS, MAX_LINE_BYTES, Printed


def parse(text: str) -> Printed:
    """Return what a program that prints `text` reports."""
    return lineprotocol.parse(text.encode().split(b"\n"))


def test_a_line_is_a_metric_for_each_field() -> None:
    """Tags are labels; the time stamp is the line's."""
    printed = parse("disk,host=a,path=/var used=12.5,free=37i 1700000000000000001")
    labels = {"host": "a", "path": "/var"}
    assert [
        Metric("disk_used", 12.5, labels, ts_ns=1700000000000000001),
        Metric("disk_free", 37.0, labels, ts_ns=1700000000000000001),
    ] == printed.metrics


def test_a_field_called_value_is_the_measurement_itself() -> None:
    """Its name adds nothing."""
    assert [Metric("load", 1.0)] == parse("load value=1").metrics


@pytest.mark.parametrize(
    ("expected", "word"),
    [
        (1.5, "1.5"),
        (-1.5e-7, "-1.5e-7"),
        (-37.0, "-37i"),
        (37.0, "37u"),
        (float(2**64), "18446744073709551615u"),
        *[(1.0, word) for word in ("t", "T", "true", "True", "TRUE")],
        *[(0.0, word) for word in ("f", "F", "false", "False", "FALSE")],
    ],
)
def test_values(expected: float, word: str) -> None:
    """Floats, signed and unsigned integers, truth values."""
    assert [expected] == [metric.value for metric in parse(f"m value={word}").metrics]


def test_strings_are_skipped_and_counted() -> None:
    """Whatever is in them; the other fields are read."""
    printed = parse(r'm a="x, y=\"1\" \\",b=1,c="" 5')
    assert (["m_b"], 2, 0) == ([metric.name for metric in printed.metrics], printed.skipped, printed.rejected)


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        (Metric("my_cpu_value_1", 1.0), r"my\ cpu value\ 1=1"),
        (Metric("a_b_c", 1.0, {"t a,g": "x=y z"}), r"a\,b,t\ a\,g=x\=y\ z c=1"),
        (Metric("m", 1.0, {"path": r"C:\temp"}), r"m,path=C:\temp value=1"),
        (Metric("_5xx", 1.0), "5xx value=1"),
        (Metric("a_b", 1.0), "a=b value=1"),
        (Metric("m", 1.0), "m   value=1  "),
        (Metric("m_temp_rature", 1.0, {"ort": "Köln"}), "m,ort=Köln temp€rature=1"),
    ],
)
def test_names(expected: Metric, line: str) -> None:
    """Escapes are resolved, a backslash before anything else stays; names are made fit for a metric, labels are not."""
    assert [expected] == parse(line).metrics


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("measurement", ",a=b value=1"),
        ("after the measurement", "m"),
        ("after the measurement", "m,a value=1"),
        ("after the measurement", "m,a= value=1"),
        ("expected field=value", "m value"),
        ("expected field=value", "m value=1,"),
        ("expected field=value", "m =1"),
        ("expected ',field=value'", 'm a="x"b=1'),
        ("is no number", "m value=one"),
        ("is no number", "m value=nan"),
        ("is no number", "m value=1_0"),
        ("64 bits", "m value=9223372036854775808i"),
        ("64 bits", "m value=-1u"),
        ("no time stamp", "m value=1 now"),
        ("no time stamp", "m value=1 1 2"),
        ("out of range", "m value=1 9223372036854775808"),
        ("out of range", "m value=1 -5"),
        ("given twice", "m,a=1,a=2 value=1"),
        ("more than", "m," + ",".join(f"t{n}=x" for n in range(MAX_LABELS + 1)) + " value=1"),
        ("longer than", "m value=" + "1" * MAX_LINE_BYTES),
        ("expected field=value", 'm value="no end'),
    ],
)
def test_a_bad_line_costs_itself_only(complaint: str, line: str) -> None:
    """Whole: none of its fields counts. It is told with its number; the lines around it are read."""
    printed = parse(f"before value=1\n{line}\n# a comment\n\nafter value=2")
    assert ["before", "after"] == [metric.name for metric in printed.metrics]
    assert 1 == printed.rejected
    assert printed.complaint.startswith("line 2: ")
    assert complaint in printed.complaint
