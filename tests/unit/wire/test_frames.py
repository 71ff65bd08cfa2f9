"""Framing: bytes cut as they should be, however they arrive, and refused before they cost anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.errors import LocalProtocolError, RemoteProtocolError
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import (
    MAX_BATCH_RECORDS,
    MAX_FRAME_BYTES,
    FrameDecoder,
    FrameTooLargeError,
    encode_frame,
    parse_frame,
    parse_legacy,
)


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 9)))
def test_bodies_come_out_however_the_bytes_are_cut(bodies: list[bytes], sizes: list[int]) -> None:
    """A decoder returns the bodies that were framed, in order, whatever the pieces they arrive in."""
    data = b"".join(encode_frame(body) for body in bodies)
    decoder, out = FrameDecoder(), []
    for size in sizes:
        out += decoder.feed(data[:size])
        data = data[size:]
    out += decoder.feed(data)
    assert bodies == out
    assert decoder.at_end()


def test_an_unfinished_frame_is_no_end() -> None:
    """A stream that ends inside a frame, or inside its length, is not at an end."""
    decoder = FrameDecoder()
    decoder.feed(b"\0\0\0\3ab")
    assert not decoder.at_end()
    assert 6 == decoder.buffered_bytes
    assert [b"abc"] == decoder.feed(b"c\0")
    assert not decoder.at_end()


def test_an_overlong_frame_is_refused_on_its_length() -> None:
    """Four bytes are enough to refuse a frame; the longest allowed one passes."""
    assert [bytes(8)] == FrameDecoder(8).feed(encode_frame(bytes(8)))
    with pytest.raises(FrameTooLargeError, match="9 bytes exceeds the limit of 8"):
        FrameDecoder(8).feed(b"\0\0\0\x09")


def test_we_send_no_overlong_frame() -> None:
    """What the peer would refuse is our own error."""
    with pytest.raises(LocalProtocolError, match="send it as smaller batches"):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x0a\x05a", pb.Metric(name="x").SerializeToString()])
def test_what_is_no_frame_is_the_peers_error(body: bytes) -> None:
    """Neither nothing, nor rubbish, nor another message passes for a frame."""
    with pytest.raises(RemoteProtocolError):
        parse_frame(body)


def test_records_are_counted_before_they_are_parsed() -> None:
    """Empty records, two bytes each, are refused by their number although they fit the frame."""

    def frame(records: int) -> bytes:
        segment = b"\x0a\x00" * records
        segment = b"\x12" + _varint(len(segment)) + segment
        return b"\x1a" + _varint(len(segment)) + segment

    assert MAX_BATCH_RECORDS == len(parse_frame(frame(MAX_BATCH_RECORDS)).batch.segments[0].metrics)
    with pytest.raises(FrameTooLargeError, match="holds more than"):
        parse_frame(frame(500_000))
    with pytest.raises(FrameTooLargeError, match="holds more than"):
        parse_legacy(b"\x0a\x00" * (MAX_BATCH_RECORDS + 1))


@given(st.binary(max_size=60).map(lambda junk: junk + bytes(25_000)) | st.binary(max_size=80))
def test_nothing_but_our_own_errors_comes_out(body: bytes) -> None:
    """Whatever the bytes, parsing returns a message or raises the peer's error."""
    for parse in (parse_frame, parse_legacy):
        try:
            parse(body)
        except RemoteProtocolError:
            continue


def test_the_originals_two_messages_are_told_apart() -> None:
    """A batch is a batch; a metric alone becomes a batch of one; an empty batch is no metric."""
    metric = pb.Metric(timestamp=7, name="load", value=1.5, labels={"a": "b"})
    batch = pb.BatchMetricsRequest(agent_id="edge", timestamp=9, metrics=[metric, metric])
    empty = pb.BatchMetricsRequest(agent_id="edge", timestamp=9)
    assert batch == parse_legacy(batch.SerializeToString())
    assert pb.BatchMetricsRequest(metrics=[metric]) == parse_legacy(metric.SerializeToString())
    assert "edge" == parse_legacy(empty.SerializeToString()).agent_id
    assert not parse_legacy(empty.SerializeToString()).metrics
    with pytest.raises(RemoteProtocolError, match="neither a BatchMetricsRequest nor a Metric"):
        parse_legacy(b"\x0b")


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
