"""A batch as the store takes it: parsed, checked, and cut into what is stored and what is refused for good.

Pure. A peer that breaks the protocol is refused with the whole batch (`RemoteProtocolError`); a single record
no store could use is rejected, entered as lost for the reason REJECTED, and the rest goes on.

Invariants:
* Every sequence number is at most MAX_SEQ, so that it fits SQLite's signed 64 bits.
* stored + duplicates + rejected = the records of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kon_agent.errors import RemoteProtocolError
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import (
    MAX_BATCH_LOSSES,
    MAX_BATCH_RECORDS,
    MAX_BATCH_SEGMENTS,
    FrameTooLargeError,
)

MAX_SEQ = 2**63 - 1
MAX_ID_CHARS = 256  # an agent's id; the configuration's own bound for `client_id`
MAX_PLUGIN_CHARS = 128  # a plugin's name
MAX_NAME_CHARS = 256  # a metric's name
MAX_LABELS = 64  # labels of one record; no collector of ours uses more than six
MAX_PAYLOAD_BYTES = 64 * 1024  # a record's payload; sixteen times what a ring record of an agent may hold
MAX_REJECTIONS = 1_000  # runs rejected in one batch: the acknowledgement that lists them must fit a frame

REJECTED = int(pb.LossReason.REJECTED)


class Segment(msgspec.Struct, frozen=True):
    """A run of records to store, `first_seq` being the first one's sequence number."""

    plugin: str
    epoch: int
    first_seq: int
    metrics: Sequence[pb.Metric]


class Loss(msgspec.Struct, frozen=True):
    """A run of sequence numbers that will never come, and the wire's `LossReason`."""

    plugin: str
    epoch: int
    first_seq: int
    count: int
    reason: int
    message: str = ""


class Batch(msgspec.Struct, frozen=True):
    """What one agent wants stored and acknowledged together.

    Attributes:
        size_bytes: what it took on the wire, for bounding what waits.
        received_s: when it arrived, in the clock of whoever measures its latency.
        rejections: records refused for good; also entered as losses.
    """

    agent_id: str
    batch_id: int
    segments: Sequence[Segment]
    losses: Sequence[Loss]
    rejections: Sequence[Loss]
    size_bytes: int
    received_s: float

    @property
    def records(self) -> int:
        """How many records are to be stored, duplicates included."""
        return sum(len(segment.metrics) for segment in self.segments)


class Outcome(msgspec.Struct, frozen=True):
    """What the store did with a batch: records stored, and records it had already."""

    stored: int
    duplicates: int


def from_wire(batch: pb.Batch, agent_id: str, size_bytes: int, now_s: float) -> Batch:
    """Return the checked form of a `kon-agent/2` batch.

    Raises:
        FrameTooLargeError: it holds too much.
        RemoteProtocolError: a segment or loss contradicts itself or names what cannot be.
    """
    _check_size("records", sum(len(segment.metrics) for segment in batch.segments), MAX_BATCH_RECORDS)
    _check_size("segments", len(batch.segments), MAX_BATCH_SEGMENTS)
    _check_size("losses", len(batch.losses), MAX_BATCH_LOSSES)
    segments: list[Segment] = []
    rejections: list[Loss] = []
    for segment in batch.segments:
        if segment.count != len(segment.metrics):
            what = f"segment {segment.plugin} {segment.epoch:016x} from {segment.first_seq}"
            raise RemoteProtocolError(f"{what} says {segment.count} records and holds {len(segment.metrics)}")
        _check_run(segment.plugin, segment.epoch, segment.first_seq, segment.count)
        runs, refused = _sift(segment.plugin, segment.epoch, segment.first_seq, segment.metrics)
        segments += runs
        rejections += refused
    if len(rejections) > MAX_REJECTIONS:
        raise RemoteProtocolError(
            f"more than {MAX_REJECTIONS} parts of a batch cannot be stored: {rejections[0].message}"
        )
    losses = [_loss(loss) for loss in batch.losses if loss.count]
    return Batch(agent_id, batch.batch_id, segments, losses, rejections, size_bytes, now_s)


def from_legacy(
    metrics: Sequence[pb.Metric], agent_id: str, epoch: int, first_seq: int, size_bytes: int, now_s: float
) -> Batch:
    """Return the original's records as a batch of the plugin "legacy", whose numbers the receiver assigns."""
    segments, rejections = _sift("legacy", epoch, first_seq, metrics)
    return Batch(agent_id, first_seq, segments, [], rejections, size_bytes, now_s)


def check_agent_id(agent_id: str) -> None:
    """Refuse an agent's id that is empty, overlong or unprintable.

    Raises:
        RemoteProtocolError: it is.
    """
    if not 0 < len(agent_id) <= MAX_ID_CHARS or not agent_id.isprintable():
        raise RemoteProtocolError(f"agent id {agent_id[:40]!r} must be 1 to {MAX_ID_CHARS} printable characters")


def _check_size(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise FrameTooLargeError(f"batch of {count} {what} exceeds the limit of {limit}")


def _loss(loss: pb.Loss) -> Loss:
    _check_run(loss.plugin, loss.epoch, loss.first_seq, loss.count)
    reason = loss.reason if loss.reason in pb.LossReason.values() else pb.LossReason.LOSS_UNSPECIFIED
    return Loss(loss.plugin, loss.epoch, loss.first_seq, loss.count, int(reason))


def _check_run(plugin: str, epoch: int, first_seq: int, count: int) -> None:
    if not 0 < len(plugin) <= MAX_PLUGIN_CHARS or not plugin.isprintable():
        raise RemoteProtocolError(f"plugin {plugin[:40]!r} must be 1 to {MAX_PLUGIN_CHARS} printable characters")
    if first_seq + count - 1 > MAX_SEQ:
        what = f"{plugin} {epoch:016x}: {count} numbers from {first_seq}"
        raise RemoteProtocolError(f"{what} exceed the largest sequence number {MAX_SEQ}")


def _sift(plugin: str, epoch: int, first_seq: int, metrics: Sequence[pb.Metric]) -> tuple[list[Segment], list[Loss]]:
    """Cut a run at the records no store could use."""
    segments: list[Segment] = []
    refused: list[Loss] = []
    start = 0
    for at, metric in enumerate(metrics):
        if fault := _fault(metric):
            if start < at:
                segments.append(Segment(plugin, epoch, first_seq + start, metrics[start:at]))
            if refused and start == at and refused[-1].message == fault:
                refused[-1] = msgspec.structs.replace(refused[-1], count=refused[-1].count + 1)
            else:
                refused.append(Loss(plugin, epoch, first_seq + at, 1, REJECTED, fault))
            start = at + 1
    if start < len(metrics):
        segments.append(Segment(plugin, epoch, first_seq + start, metrics[start:]))
    return segments, refused


def _fault(metric: pb.Metric) -> str:
    if not metric.name:
        return "the metric has no name"
    if len(metric.name) > MAX_NAME_CHARS:
        return f"the metric's name has more than {MAX_NAME_CHARS} characters"
    if len(metric.labels) > MAX_LABELS:
        return f"the metric has more than {MAX_LABELS} labels"
    if len(metric.payload) > MAX_PAYLOAD_BYTES:
        return f"the metric's payload has more than {MAX_PAYLOAD_BYTES} bytes"
    return ""
