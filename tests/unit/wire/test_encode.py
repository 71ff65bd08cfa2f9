"""The encoder's promises: concatenated records are what protobuf itself would have written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.metric import Metric, MetricType
from kon_agent.ring import Drop
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.encode import (
    encode_batch,
    encode_legacy_batch,
    encode_record,
    encode_segment,
    field,
    varint,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
UINT64 = st.integers(0, 2**64 - 1)
METRICS = st.builds(
    Metric,
    name=TEXT,
    value=st.floats(allow_nan=False),
    # One label at most: protobuf writes a map in any order, and only equal orders are equal bytes.
    labels=st.dictionaries(TEXT, TEXT, max_size=1),
    type=st.sampled_from(MetricType),
    ts_ns=st.integers(0, 2**63 - 1),
)
LOSSES = st.builds(
    pb.Loss, plugin=TEXT, epoch=UINT64, first_seq=UINT64, count=UINT64, reason=st.sampled_from(Drop).map(int)
)


def message(metric: Metric, ts_ns: int) -> pb.Metric:
    """Return the message protobuf's own encoder would be given."""
    return pb.Metric(
        timestamp=metric.ts_ns or ts_ns,
        name=metric.name,
        value=metric.value,
        labels=dict(metric.labels),
        type=int(metric.type),  # type: ignore[arg-type]
    )


@given(METRICS, st.integers(0, 2**63 - 1))
def test_a_record_is_a_segment_of_one(metric: Metric, ts_ns: int) -> None:
    """A record is a whole member of field 1, byte for byte."""
    assert pb.Segment(metrics=[message(metric, ts_ns)]).SerializeToString() == encode_record(metric, ts_ns)


@given(st.lists(METRICS, max_size=5), TEXT, UINT64, UINT64)
def test_a_segment_is_its_header_and_its_records(
    metrics: list[Metric], plugin: str, epoch: int, first_seq: int
) -> None:
    """Parsed and written again by protobuf, a segment is the one protobuf would have made, and exactly as long."""
    records = [encode_record(metric, 1) for metric in metrics]
    expected = pb.Segment(
        metrics=[message(metric, 1) for metric in metrics],
        plugin=plugin,
        epoch=epoch,
        first_seq=first_seq,
        count=len(metrics),
    )
    data = encode_segment(plugin, epoch, first_seq, records)
    assert expected == pb.Segment.FromString(data)
    assert len(expected.SerializeToString()) == len(data)
    assert data.endswith(b"".join(records))


@given(st.lists(METRICS, max_size=5), TEXT, st.integers(0, 2**63 - 1))
def test_the_originals_request_has_the_same_records(metrics: list[Metric], agent_id: str, ts_ns: int) -> None:
    """The very bytes of a segment's records serve the original's protocol as well."""
    records = [encode_record(metric, 1) for metric in metrics]
    expected = pb.BatchMetricsRequest(
        metrics=[message(metric, 1) for metric in metrics], agent_id=agent_id, timestamp=ts_ns
    )
    data = encode_legacy_batch(agent_id, ts_ns, records)
    assert expected == pb.BatchMetricsRequest.FromString(data)
    assert len(expected.SerializeToString()) == len(data)


@given(UINT64, st.lists(st.lists(METRICS, max_size=3), max_size=3), st.lists(LOSSES, max_size=3))
def test_a_batch_is_what_protobuf_writes(batch_id: int, segments: list[list[Metric]], losses: list[pb.Loss]) -> None:
    """Of segments as protobuf writes them our frame is protobuf's own, byte for byte."""
    messages = [pb.Segment(metrics=[message(metric, 1) for metric in metrics]) for metrics in segments]
    expected = pb.Frame(batch=pb.Batch(batch_id=batch_id, segments=messages, losses=losses))
    encoded = [segment.SerializeToString() for segment in messages]
    assert expected.SerializeToString() == encode_batch(batch_id, encoded, losses)


def test_a_metrics_own_time_goes_before_its_cycles() -> None:
    """The cycle's time is for metrics that bring none."""
    assert 5 == pb.Segment.FromString(encode_record(Metric("x", 1.0, ts_ns=5), 9)).metrics[0].timestamp
    assert 9 == pb.Segment.FromString(encode_record(Metric("x", 1.0), 9)).metrics[0].timestamp


def test_labels_survive_whatever_their_order() -> None:
    """Every label arrives."""
    labels = {f"label_{number}": str(number) for number in range(20)}
    assert labels == dict(pb.Segment.FromString(encode_record(Metric("x", 1.0, labels), 1)).metrics[0].labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_odd_values_are_values(value: float) -> None:
    """What a double can be, a record can be."""
    decoded = pb.Segment.FromString(encode_record(Metric("x", value), 1)).metrics[0].value
    assert repr(value) == repr(decoded)


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        (Metric("x", "1"), TypeError),  # type: ignore[arg-type]
        (Metric(7, 1.0), TypeError),  # type: ignore[arg-type]
        (Metric("x", 1.0, {"a": 1}), TypeError),  # type: ignore[dict-item]
        (Metric("\udcff", 1.0), ValueError),
        (Metric("x", 1.0, ts_ns=2**63), ValueError),
    ],
    ids=["value", "name", "label", "surrogate", "time stamp"],
)
def test_what_is_no_metric_is_told(metric: Metric, error: type[Exception]) -> None:
    """The worker catches these two, and no other."""
    with pytest.raises(error):
        encode_record(metric, 1)


@given(UINT64)
def test_a_varint_is_protobufs(value: int) -> None:
    """Seven bits a byte, the lowest first."""
    expected = pb.Batch(batch_id=value).SerializeToString()[1:] or b"\0"
    assert expected == varint(value)


@pytest.mark.parametrize("number", [1, 15, 16, 2047, 2048])
def test_a_field_has_number_type_and_length(number: int) -> None:
    """Tags beyond fifteen take two bytes and more."""
    data = b"x" * 200
    assert varint(number * 8 + 2) + b"\xc8\x01" + data == field(number, data)
