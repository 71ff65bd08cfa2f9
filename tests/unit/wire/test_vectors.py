"""The golden encodings in protocol/vectors, byte for byte. Run this file as a program to write them anew.

A vector is the contract with peers in other languages: one that changes is a change of the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from kon_agent.metric import Metric, MetricType
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.encode import encode_batch, encode_legacy_batch, encode_record, encode_segment
from kon_agent.wire.frames import FrameDecoder, encode_frame

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "protocol" / "vectors"
EPOCH = 0x0123_4567_89AB_CDEF
TS_NS = 1_700_000_000_000_000_000

IDLE = Metric("cpu_usage_percent", 97.5, {"mode": "idle"}, MetricType.CPU_USAGE)
FREE = Metric("memory_available_bytes", 4096.0, {}, MetricType.MEMORY_USAGE)


def metric() -> tuple[Message, bytes]:
    """One Metric, as it stands in field 1 of a Segment or a BatchMetricsRequest, its tag and length left out."""
    body = encode_record(IDLE, TS_NS)[2:]
    return pb.Metric.FromString(body), body


def metric_unsynced() -> tuple[Message, bytes]:
    """The same, made before the agent's clock was set."""
    body = encode_record(IDLE, TS_NS, is_clock_unsynced=True)[2:]
    return pb.Metric.FromString(body), body


def legacy_batch() -> tuple[Message, bytes]:
    """ALPN kon-agent: a BatchMetricsRequest of two metrics, with its length in front."""
    records = [encode_record(IDLE, TS_NS), encode_record(FREE, TS_NS)]
    body = encode_legacy_batch("edge-agent-1", TS_NS, records)
    return pb.BatchMetricsRequest.FromString(body), encode_frame(body)


def hello() -> tuple[Message, bytes]:
    """ALPN kon-agent/2: the first frame of a stream."""
    return _frame(
        hello=pb.Hello(version=2, agent_id="edge-agent-1", agent_version="0.1.0", compression=[pb.ZSTD, pb.NONE])
    )


def welcome() -> tuple[Message, bytes]:
    """ALPN kon-agent/2: the receiver's answer to Hello."""
    return _frame(
        welcome=pb.Welcome(version=2, receiver_version="0.1.0", max_frame_bytes=1024 * 1024, max_batch_records=10_000)
    )


def batch() -> tuple[Message, bytes]:
    """ALPN kon-agent/2: a Batch of two segments, two records and one, and a loss of three records."""
    segments = [
        encode_segment("cpu", EPOCH, 40, [encode_record(IDLE, TS_NS)] * 2),
        encode_segment("memory", EPOCH + 1, 0, [encode_record(FREE, TS_NS)]),
    ]
    loss = pb.Loss(plugin="cpu", epoch=EPOCH, first_seq=37, count=3, reason=pb.RING_FULL)
    body = encode_batch(1, segments, [loss])
    return pb.Frame.FromString(body), encode_frame(body)


def ack() -> tuple[Message, bytes]:
    """ALPN kon-agent/2: the Batch is durable; one record was stored, one had been before, one was rejected."""
    rejection = pb.Rejection(plugin="memory", epoch=EPOCH + 1, count=1, message="the metric has no name")
    return _frame(ack=pb.Ack(batch_id=1, stored=1, duplicates=1, rejections=[rejection]))


def refusal() -> tuple[Message, bytes]:
    """ALPN kon-agent/2: the receiver will not go on; the connection closes with application error code 3."""
    return _frame(refusal=pb.Refusal(code=pb.Refusal.WRONG_IDENTITY, message="the certificate names edge-2"))


VECTORS: list[Callable[[], tuple[Message, bytes]]] = [
    *(metric, metric_unsynced, legacy_batch),
    *(hello, welcome, batch, ack, refusal),
]


def _frame(**body: Any) -> tuple[Message, bytes]:
    message = pb.Frame(**body)
    return message, encode_frame(message.SerializeToString(deterministic=True))


def as_vector(make: Callable[[], tuple[Message, bytes]]) -> dict[str, Any]:
    """Return a vector as its file holds it."""
    message, data = make()
    return {
        "description": make.__doc__,
        "message": message.DESCRIPTOR.full_name,
        "is_framed": make not in (metric, metric_unsynced),
        "fields": json_format.MessageToDict(message, preserving_proto_field_name=True),
        "hex": data.hex(),
    }


@pytest.mark.parametrize("make", VECTORS, ids=lambda make: make.__name__)
def test_our_encoding_is_the_vectors(make: Callable[[], tuple[Message, bytes]]) -> None:
    """What we encode is what protocol/vectors says, byte for byte."""
    assert json.loads((FOLDER / f"{make.__name__}.json").read_text()) == as_vector(make)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_vectors_bytes_parse_to_its_fields(path: Path) -> None:
    """The bytes of a vector, unframed and parsed, are the message its fields describe."""
    vector = json.loads(path.read_text())
    data = bytes.fromhex(vector["hex"])
    [body] = FrameDecoder().feed(data) if vector["is_framed"] else [data]
    kind = getattr(pb, vector["message"].removeprefix("protocol."))
    assert json_format.ParseDict(vector["fields"], kind()) == kind.FromString(body)


def test_the_worked_example_is_the_vector() -> None:
    """The bytes docs/protocol.md takes apart are those of the vector batch.json."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    block = text.partition("```hex\n")[2].partition("```")[0]
    shown = "".join(line.strip().partition("  ")[0] for line in block.splitlines())
    assert batch()[1] == bytes.fromhex(shown)


def write() -> None:
    """Write every vector to its file."""
    for make in VECTORS:
        text = json.dumps(as_vector(make), indent=2)
        (FOLDER / f"{make.__name__}.json").write_text(f"{text}\n")


if __name__ == "__main__":
    write()
