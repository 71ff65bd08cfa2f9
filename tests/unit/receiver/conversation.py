"""Words of the conversation the receiver's tests hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kon_agent.receiver.batch import Batch, Loss, Segment
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import encode_frame

EPOCH = 2**64 - 5


def metrics(count: int, **fields: Any) -> list[pb.Metric]:
    """Return metrics whose value tells them apart."""
    defaults: list[dict[str, Any]] = [
        {"timestamp": 100 + at, "name": "load", "value": float(at)} for at in range(count)
    ]
    return [pb.Metric(**each | fields) for each in defaults]


def framed(**body: Any) -> bytes:
    """Return a frame."""
    return encode_frame(pb.Frame(**body).SerializeToString())


def hello(agent_id: str = "edge-1", **fields: Any) -> bytes:
    """Return a Hello frame."""
    defaults: dict[str, Any] = {"version": 2, "agent_id": agent_id}
    return framed(hello=pb.Hello(**defaults | fields))


def batch(batch_id: int = 1, first_seq: int = 0, count: int = 3, **fields: Any) -> pb.Batch:
    """Return a wire batch of one segment."""
    segment: dict[str, Any] = {
        "plugin": "cpu",
        "epoch": EPOCH,
        "first_seq": first_seq,
        "count": count,
        "metrics": metrics(count),
    }
    return pb.Batch(batch_id=batch_id, segments=[pb.Segment(**segment | fields)])


def stored(first_seq: int, count: int, plugin: str = "cpu", losses: Sequence[Loss] = (), **fields: Any) -> Batch:
    """Return a batch as the store takes it."""
    segments = [Segment(plugin, EPOCH, first_seq, metrics(count, **fields))] if count else []
    return Batch("edge-1", 1, segments, losses, [], 100 * count, 0.0)
