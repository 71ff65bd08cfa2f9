"""Durations, sizes and shares as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.config import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("100ms", 0.1),
        ("5s", 5.0),
        ("1m", 60.0),
        ("2h", 7200.0),
        ("7d", 604800.0),
        ("1.5h", 5400.0),
        ("1m30s", 90.0),
    ],
)
def test_duration_units(text: str, seconds: float) -> None:
    """Each unit, a decimal and Go's compound spelling give their seconds."""
    assert seconds == units.parse_duration(text)


@pytest.mark.parametrize("value", [5, 5.0, "5"])
def test_bare_duration_is_seconds(value: object) -> None:
    """A number without a unit counts seconds."""
    assert 5.0 == units.parse_duration(value)


@pytest.mark.parametrize("value", ["5 parsecs", "", "s", "5S ", "-5s", True, None, math.nan, [], "1" * 500 + "s"])
def test_duration_refuses_with_examples(value: object) -> None:
    """Whatever is no duration is refused with what to write."""
    with pytest.raises(ValueError, match="is not a duration; write 100ms, 5s, 1m, 2h or 7d"):
        units.parse_duration(value)


@pytest.mark.parametrize("value", [-1, -0.5, "3651d", 1e300, 10**400])
def test_duration_out_of_range(value: object) -> None:
    """A negative duration, or one a timeout would overflow at, is refused."""
    with pytest.raises(ValueError, match="out of range"):
        units.parse_duration(value)


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        ("50MB", 50_000_000),
        ("64KiB", 65536),
        ("1GiB", 2**30),
        ("1.5GiB", 3 * 2**29),
        ("1 kb", 1000),
        ("7B", 7),
        (9, 9),
    ],
)
def test_size_units(value: object, size_bytes: int) -> None:
    """Decimal and binary units, in any case, and bare numbers give their bytes."""
    assert size_bytes == units.parse_size(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("50MBit", "is not a size; write 50MB"),
        ("64K", "is not a size"),
        (True, "is not a size"),
        (math.inf, "is not a size"),
        (-1, "out of range"),
        ("2000TiB", "out of range"),
        (1.5, "not a whole number of bytes"),
        ("0.0001KB", "not a whole number of bytes"),
    ],
)
def test_size_refuses(value: object, why: str) -> None:
    """What is no size, or none a disk has, is refused with the reason."""
    with pytest.raises(ValueError, match=why):
        units.parse_size(value)


@pytest.mark.parametrize(("value", "share"), [("2%", 0.02), ("150%", 1.5), (0.02, 0.02), ("0.5", 0.5), (2, 2.0)])
def test_share(value: object, share: float) -> None:
    """A percentage or a bare fraction gives a fraction of one core."""
    assert share == units.parse_share(value)


@pytest.mark.parametrize("value", ["2 percent", "6401%", -0.1, math.nan, False])
def test_share_refuses(value: object) -> None:
    """What is no share, or more cores than machines have, is refused."""
    with pytest.raises(ValueError, match=r"is not a share|out of range"):
        units.parse_share(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.0, "5s"), (0.1, "100ms"), (60, "1m"), (604800.0, "7d"), (90, "90s"), (1.5, "1.5s"), (0, "0s")],
)
def test_format_duration(seconds: float, text: str) -> None:
    """Durations print in the unit a reader expects."""
    assert text == units.format_duration(seconds)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(50_000_000, "50MB"), (65536, "64KiB"), (2**50, "1024TiB"), (123, "123B"), (0, "0B")],
)
def test_format_size(size_bytes: int, text: str) -> None:
    """Sizes print in the largest unit that divides them."""
    assert text == units.format_size(size_bytes)


@given(st.floats(min_value=0, max_value=units.MAX_DURATION_S))
def test_duration_round_trip(seconds: float) -> None:
    """A printed duration of any sensible precision reads back as itself."""
    seconds = round(seconds, 9)
    assert seconds == units.parse_duration(units.format_duration(seconds))


@given(st.integers(min_value=0, max_value=units.MAX_SIZE_BYTES))
def test_size_round_trip(size_bytes: int) -> None:
    """A printed size reads back as itself."""
    assert size_bytes == units.parse_size(units.format_size(size_bytes))


@given(st.floats(min_value=0, max_value=units.MAX_SHARE))
def test_share_round_trip(share: float) -> None:
    """A printed share of any sensible precision reads back as itself."""
    share = round(share, 9)
    assert share == units.parse_share(units.format_share(share))


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()))
def test_nonsense_is_a_value_error(value: object) -> None:
    """No input makes a parser raise anything but ValueError."""
    for parse in (units.parse_duration, units.parse_size, units.parse_share):
        try:
            result = parse(value)
        except ValueError:
            continue
        assert 0 <= result < math.inf
