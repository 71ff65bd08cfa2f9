"""Checking a batch: what contradicts itself is refused, what no store could use is rejected, the rest goes on."""

from __future__ import annotations

import pytest

from kon_agent.errors import RemoteProtocolError
from kon_agent.receiver.batch import MAX_SEQ, REJECTED, Loss, check_agent_id, from_legacy, from_wire
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import MAX_BATCH_LOSSES, MAX_BATCH_SEGMENTS, FrameTooLargeError

EPOCH = 7
GOOD = pb.Metric(name="load")
NAMELESS = pb.Metric(value=1.0)
VERBOSE = pb.Metric(name="n" * 257)


def segment(*metrics: pb.Metric, first_seq: int = 10, count: int | None = None, plugin: str = "cpu") -> pb.Segment:
    return pb.Segment(
        plugin=plugin,
        epoch=EPOCH,
        first_seq=first_seq,
        count=len(metrics) if count is None else count,
        metrics=metrics,
    )


def test_a_segment_is_cut_at_what_cannot_be_stored() -> None:
    """Rejected records keep their numbers, in runs of the same fault; the others keep theirs."""
    wire = pb.Batch(segments=[segment(GOOD, NAMELESS, NAMELESS, VERBOSE, GOOD, GOOD)])
    batch = from_wire(wire, "edge-1", 50, 0.0)
    assert [(10, 1), (14, 2)] == [(each.first_seq, len(each.metrics)) for each in batch.segments]
    assert [(11, 2, REJECTED), (13, 1, REJECTED)] == [(e.first_seq, e.count, e.reason) for e in batch.rejections]
    assert "the metric has no name" == batch.rejections[0].message
    assert 3 == batch.records


@pytest.mark.parametrize(
    "wire",
    [
        pb.Batch(segments=[segment(GOOD, count=2)]),
        pb.Batch(segments=[segment(GOOD, plugin="")]),
        pb.Batch(segments=[segment(GOOD, plugin="a\nb")]),
        pb.Batch(segments=[segment(GOOD, GOOD, first_seq=MAX_SEQ)]),
        pb.Batch(losses=[pb.Loss(plugin="cpu", first_seq=1, count=2**64 - 1)]),
        pb.Batch(segments=[segment(*[GOOD, NAMELESS] * 1001)]),
    ],
)
def test_nonsense_is_refused_whole(wire: pb.Batch) -> None:
    """A wrong count, an unusable plugin name, numbers beyond the largest, endless rejections: the peer's error."""
    with pytest.raises(RemoteProtocolError):
        from_wire(wire, "edge-1", 1, 0.0)


def test_too_many_parts_are_refused_as_too_large() -> None:
    """Segments and losses have their own limits."""
    loss = pb.Loss(plugin="cpu", count=1)
    for wire in (
        pb.Batch(segments=[segment(GOOD)] * (MAX_BATCH_SEGMENTS + 1)),
        pb.Batch(losses=[loss] * (MAX_BATCH_LOSSES + 1)),
    ):
        with pytest.raises(FrameTooLargeError, match="exceeds the limit of 1000"):
            from_wire(wire, "edge-1", 1, 0.0)


def test_the_largest_numbers_fit() -> None:
    """The last sequence number and the largest epoch are valid; an unknown reason counts as none given."""
    loss = pb.Loss(plugin="cpu", epoch=2**64 - 1, first_seq=0, count=2**63)
    loss.MergeFromString(b"\x28\x63")  # reason = 99
    batch = from_wire(pb.Batch(losses=[loss], segments=[segment(GOOD, first_seq=MAX_SEQ)]), "edge-1", 1, 0.0)
    assert [Loss("cpu", 2**64 - 1, 0, 2**63, 0)] == batch.losses


def test_the_originals_records_get_numbers() -> None:
    """Records of the original become the plugin "legacy", numbered from where the connection stands."""
    batch = from_legacy([GOOD, NAMELESS], "edge-1", EPOCH, 5, 20, 1.0)
    assert [("legacy", EPOCH, 5)] == [(each.plugin, each.epoch, each.first_seq) for each in batch.segments]
    assert [6] == [each.first_seq for each in batch.rejections]


@pytest.mark.parametrize("agent_id", ["", "a" * 257, "edge\x1b[2J"])
def test_an_agents_name_can_be_shown(agent_id: str) -> None:
    """An empty, overlong or unprintable agent id is refused."""
    with pytest.raises(RemoteProtocolError, match="agent id"):
        check_agent_id(agent_id)
