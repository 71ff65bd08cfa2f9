"""Frames: how messages stand in a QUIC stream, for both of our application protocols.

    | length u32, big-endian | body: `length` bytes of one protobuf message | length u32 | body …

`kon-agent/2` puts one `Frame` in a body, at most 1 MiB; the original's `kon-agent` one `BatchMetricsRequest`
or `Metric`, at most 10 MiB. Pure: bytes in, bytes out; docs/protocol.md says who sends what when.

Invariants:
* A decoder never holds more than one unfinished frame: a length over the limit is refused before its body
  arrives.
* Nothing is parsed into protobuf objects before its submessages were counted: an empty submessage is two
  bytes on the wire and some fifty in memory, so that size alone bounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from kon_agent.errors import LocalProtocolError, RemoteProtocolError
from kon_agent.wire import kon_agent_pb2 as pb

ALPN_V2 = "kon-agent/2"
ALPN_LEGACY = "kon-agent"  # the Go original's
PROTOCOL_VERSION = 2

MAX_FRAME_BYTES = 1024 * 1024  # kon-agent/2: an agent's whole window in flight (DESIGN §4), so one frame can carry it
MAX_LEGACY_FRAME_BYTES = 10 * 1024 * 1024  # the original's own limit
MAX_BATCH_RECORDS = 10_000  # ten times the default batch; what one transaction stores in well under an ack deadline
MAX_BATCH_SEGMENTS = 1_000  # far more plugins than one agent runs, epochs included
MAX_BATCH_LOSSES = 1_000  # an agent with more to declare takes several batches

_LENGTH_BYTES = 4
_SMALLEST_SUBMESSAGE_BYTES = 2  # a tag and a zero length

Tree = Mapping[int, "Tree | None"]
"""Field numbers whose submessages count, each with those of the fields inside that count as well."""

_FRAME_TREE: Tree = {3: {2: {1: None}, 3: None}}  # Frame.batch, Batch.segments, Segment.metrics; Batch.losses
_LEGACY_TREE: Tree = {1: None}  # BatchMetricsRequest.metrics


class FrameTooLargeError(RemoteProtocolError):
    """The peer sent more than the protocol allows in one frame."""


def encode_frame(body: bytes, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Return `body` with its length in front.

    Raises:
        LocalProtocolError: the body is longer than `max_bytes`, which the peer would refuse.
    """
    if len(body) > max_bytes:
        raise LocalProtocolError(f"frame body of {len(body)} bytes exceeds {max_bytes}; send it as smaller batches")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameDecoder:
    """Cut one stream's bytes into frame bodies.

    Args:
        max_bytes: the longest body accepted.
    """

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def buffered_bytes(self) -> int:
        """How much of an unfinished frame is held."""
        return len(self._buffer)

    def at_end(self) -> bool:
        """Return whether the stream may end here: no frame has been begun."""
        return not self._buffer

    def feed(self, data: bytes) -> list[bytes]:
        """Take the stream's next bytes and return the bodies they complete, in order.

        Raises:
            FrameTooLargeError: a frame announces a body longer than the limit.
        """
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            begin = start + _LENGTH_BYTES
            length = int.from_bytes(buffer[start:begin], "big")
            if length > self._max_bytes:
                raise FrameTooLargeError(f"frame of {length} bytes exceeds the limit of {self._max_bytes}")
            if len(buffer) < begin + length:
                break
            bodies.append(bytes(buffer[begin : begin + length]))
            start = begin + length
        del buffer[:start]
        return bodies


def parse_frame(body: bytes) -> pb.Frame:
    """Return the `kon-agent/2` frame in `body`.

    Raises:
        FrameTooLargeError: it holds more records, segments or losses than a batch may.
        RemoteProtocolError: it is no `Frame`, or an empty one.
    """
    _check_count(body, _FRAME_TREE, MAX_BATCH_RECORDS + MAX_BATCH_SEGMENTS + MAX_BATCH_LOSSES)
    try:
        frame: pb.Frame = pb.Frame.FromString(body)
    except DecodeError as err:
        raise RemoteProtocolError(f"frame of {len(body)} bytes is not a protobuf Frame: {err}") from err
    if frame.WhichOneof("body") is None:
        raise RemoteProtocolError(f"frame of {len(body)} bytes has none of the bodies of protocol {PROTOCOL_VERSION}")
    return frame


def parse_legacy(body: bytes) -> pb.BatchMetricsRequest:
    """Return the original's message in `body`; a single `Metric` comes back as a request that holds it.

    The two are told apart by what is in field 1: `metrics` is a submessage (wire type 2), `timestamp` a
    varint (wire type 0), and a wire type that does not fit leaves the field unknown. So a body with at least
    one metric is a request, and otherwise one that parses as a `Metric` with a name and a content is that
    metric.

    Raises:
        FrameTooLargeError: it holds more records than a batch may.
        RemoteProtocolError: it is neither, or not protobuf at all.
    """
    _check_count(body, _LEGACY_TREE, MAX_BATCH_RECORDS)
    try:
        request: pb.BatchMetricsRequest = pb.BatchMetricsRequest.FromString(body)
        metric = None if request.metrics else pb.Metric.FromString(body)
    except DecodeError as err:
        what = f"message of {len(body)} bytes is neither a BatchMetricsRequest nor a Metric"
        raise RemoteProtocolError(f"{what}: {err}") from err
    # An empty request reads as a metric too, its agent_id as the name, but has nothing a metric would have
    # besides.
    if metric is not None and metric.name and (metric.timestamp or metric.value or metric.labels or metric.payload):
        return pb.BatchMetricsRequest(metrics=[metric])
    return request


def _check_count(body: bytes, tree: Tree, limit: int) -> None:
    if len(body) <= limit * _SMALLEST_SUBMESSAGE_BYTES:
        return  # cannot hold that many: the usual case, at no cost
    if (count := _count(body, 0, len(body), tree, limit)) > limit:
        raise FrameTooLargeError(f"message of {len(body)} bytes holds more than {limit} parts ({count} and going on)")


def _count(data: bytes, pos: int, end: int, tree: Tree, limit: int) -> int:
    """Count the submessages `tree` names in `data[pos:end]`, giving up once there are more than `limit`."""
    count = 0
    while pos < end and count <= limit:
        tag, pos = _varint(data, pos, end)
        wire_type = tag & 7
        if wire_type == 2:  # LEN
            length, pos = _varint(data, pos, end)
            if tag >> 3 in tree:
                count += 1
                if (inner := tree[tag >> 3]) is not None:
                    count += _count(data, pos, min(pos + length, end), inner, limit - count)
            pos += length
        elif wire_type == 0:  # VARINT
            _, pos = _varint(data, pos, end)
        elif wire_type == 1:  # I64
            pos += 8
        elif wire_type == 5:  # I32
            pos += 4
        else:
            raise RemoteProtocolError(f"message has wire type {wire_type} at byte {pos}, which no message of ours uses")
    return count


def _varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while pos < end and shift < 64:
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7
    raise RemoteProtocolError(f"message has a broken varint at byte {pos}")
