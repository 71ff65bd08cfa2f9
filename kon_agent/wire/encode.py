"""Encoding without decoding: records become bytes once, in the worker, and are only ever concatenated afterwards.

A protobuf message is the concatenation of its fields, so a `Segment` is its header fields followed by its records, each
already encoded as a member of field 1 (`0a`, length, Metric). The same members make a `BatchMetricsRequest` for the
original's protocol. Nothing here parses anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kon_agent.metric import Metric
from kon_agent.wire import kon_agent_pb2 as pb

_LENGTH_DELIMITED = 2  # wire type LEN, protobuf encoding


def encode_record(metric: Metric, ts_ns: int, is_clock_unsynced: bool = False) -> bytes:
    """Return `metric` as an encoded member of field 1: what ring, spool and wire carry.

    Args:
        ts_ns: the time stamp of a metric that brings none of its own, nanoseconds since the epoch.
        is_clock_unsynced: the clock has not been set since the machine started: the time stamp may be years off.

    Raises:
        TypeError, ValueError: a name, label or value of the wrong type.
    """
    message = pb.Metric(
        timestamp=metric.ts_ns or ts_ns,
        name=metric.name,
        value=metric.value,
        labels=metric.labels,
        type=int(metric.type),  # type: ignore[arg-type]
        clock_unsynced=is_clock_unsynced,
    )
    return field(1, message.SerializeToString())


def encode_segment(plugin: str, epoch: int, first_seq: int, records: Sequence[bytes]) -> bytes:
    """Return a `Segment` of consecutive records, `first_seq` being the first one's sequence number."""
    header = pb.Segment(plugin=plugin, epoch=epoch, first_seq=first_seq, count=len(records))
    return header.SerializeToString() + b"".join(records)


def encode_batch(batch_id: int, segments: Iterable[bytes], losses: Iterable[pb.Loss] = ()) -> bytes:
    """Return a `Frame` holding a `Batch` of encoded segments and declared losses."""
    parts = [pb.Batch(batch_id=batch_id).SerializeToString()]
    parts += [field(2, segment) for segment in segments]
    parts += [field(3, loss.SerializeToString()) for loss in losses]
    return field(3, b"".join(parts))


def encode_legacy_batch(agent_id: str, ts_ns: int, records: Sequence[bytes]) -> bytes:
    """Return the original's `BatchMetricsRequest` of the same records."""
    header = pb.BatchMetricsRequest(agent_id=agent_id, timestamp=ts_ns)
    return header.SerializeToString() + b"".join(records)


def field(number: int, data: bytes) -> bytes:
    """Return `data` as length-delimited field `number`."""
    return varint(number << 3 | _LENGTH_DELIMITED) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Return `value` (not negative) as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
