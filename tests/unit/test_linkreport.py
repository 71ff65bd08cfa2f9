"""The link report's promises: what the sender says arrives, and nothing it says harms who reads it."""

from __future__ import annotations

import pytest

from kon_agent.linkreport import REPORT_BYTES, LinkReport, LinkState

CONNECTED = LinkReport(LinkState.CONNECTED, "edge:7843", 1_700_000_000_000_000_000, 1234, 2**40, 55, "")


@pytest.mark.parametrize("state", LinkState)
def test_a_report_arrives_as_it_was_given(state: LinkState) -> None:
    """Every field survives, in a fixed number of bytes."""
    report = LinkReport(state, "[::1]:7843", 1, 2, 3, 4, "the server's certificate is not from our CA")
    assert REPORT_BYTES == len(report.encode())
    assert report == LinkReport.decode(report.encode())


def test_texts_are_cut_to_their_fields() -> None:
    """A reason without end fits, its beginning kept, even where a character is cut in two."""
    report = LinkReport.decode(LinkReport(detail="ü" * 500 + "x", address="a" * 500).encode())
    assert ("a" * 128, "ü" * 128) == (report.address, report.detail)
    assert REPORT_BYTES == len(LinkReport(detail="x" + "ü" * 500).encode())


def test_a_round_trip_beyond_its_field_is_capped() -> None:
    """An absurd measurement is shown as the largest there is."""
    assert 0xFFFF_FFFF == LinkReport.decode(LinkReport(rtt_us=10**12).encode()).rtt_us


@pytest.mark.parametrize("data", [b"", b"\0" * (REPORT_BYTES - 1), b"\xff" * REPORT_BYTES, b"\x04" * REPORT_BYTES])
def test_what_is_no_report_reads_as_disconnected(data: bytes) -> None:
    """A sender that writes nonsense is one that is not connected."""
    report = LinkReport.decode(data)
    assert (LinkState.DISCONNECTED, "the sender's report is unreadable") == (report.state, report.detail)


def test_an_empty_page_is_a_report_of_nothing() -> None:
    """Zeroes are the state before the first attempt."""
    assert LinkReport() == LinkReport.decode(bytes(REPORT_BYTES))


def test_texts_are_shown_harmless() -> None:
    """Neither control characters nor broken UTF-8 reach the operator's terminal."""
    data = bytearray(CONNECTED.encode())
    data[-256:-250] = b"\x1b[2J\xff\n"
    assert " [2J\N{REPLACEMENT CHARACTER} " == LinkReport.decode(bytes(data)).detail
