"""The intake of a kon-agent/2 connection: who comes in, in which order things are said, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import zstandard

from kon_agent.receiver.batch import Outcome
from kon_agent.receiver.identity import Gate, RefusedError
from kon_agent.receiver.intake import MAX_PENDING_BYTES, MAX_STREAMS, Action, AgentIntake, Close, Send, Submit
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import MAX_BATCH_RECORDS, MAX_FRAME_BYTES, FrameDecoder, encode_frame, parse_frame
from tests.unit.receiver.conversation import batch, framed, hello

STREAM = 0
MISCOUNTED = framed(batch=batch(count=3, metrics=[pb.Metric(name="load")]))


def said(action: Action) -> pb.Frame:
    """Return the one frame an action sends."""
    assert isinstance(action, Send)
    [body] = FrameDecoder().feed(action.data)
    return parse_frame(body)


def welcomed(**fields: Any) -> AgentIntake:
    intake = AgentIntake(Gate())
    [answer] = intake.receive(STREAM, hello(**fields), False, 0.0)
    assert said(answer).HasField("welcome")
    return intake


def assert_refused(actions: list[Action], code: int, text: str = "") -> None:
    """The last two actions are the refusal and the close, of the same code and words."""
    refusal, close = said(actions[-2]).refusal, actions[-1]
    assert isinstance(close, Close)
    assert (code, refusal.message) == (refusal.code, close.message)
    assert code == close.code
    assert text in close.message


def test_hello_is_welcomed_with_the_limits() -> None:
    """Welcome says what the agent may send."""
    [answer] = AgentIntake(Gate()).receive(STREAM, hello(), False, 0.0)
    welcome = said(answer).welcome
    assert (2, MAX_FRAME_BYTES, MAX_BATCH_RECORDS) == (
        welcome.version,
        welcome.max_frame_bytes,
        welcome.max_batch_records,
    )


def test_a_batch_is_acknowledged_once_it_is_stored() -> None:
    """Receiving says nothing; the report of the store is what the acknowledgement says."""
    intake = welcomed()
    [submit] = intake.receive(STREAM, framed(batch=batch(batch_id=9)), False, 4.5)
    assert isinstance(submit, Submit)
    assert ("edge-1", 4.5) == (submit.batch.agent_id, submit.batch.received_s)
    [answer] = intake.stored(STREAM, submit.batch, Outcome(2, 1))
    assert pb.Ack(batch_id=9, stored=2, duplicates=1) == said(answer).ack
    assert 0 == intake.pending_bytes


def test_rejections_are_in_the_acknowledgement() -> None:
    """An agent learns which records will never be stored."""
    intake = welcomed()
    metrics = [pb.Metric(name="a"), pb.Metric()]
    [submit] = intake.receive(STREAM, framed(batch=batch(count=2, metrics=metrics)), False, 0.0)
    assert isinstance(submit, Submit)
    [answer] = intake.stored(STREAM, submit.batch, Outcome(1, 0))
    [rejection] = said(answer).ack.rejections
    assert ("cpu", 1, 1) == (rejection.plugin, rejection.first_seq, rejection.count)


def test_our_side_ends_after_the_last_acknowledgement() -> None:
    """A stream the agent has ended is ended by us, but not before its last batch is acknowledged."""
    intake = welcomed()
    [submit] = intake.receive(STREAM, framed(batch=batch()), True, 0.0)
    assert isinstance(submit, Submit)
    assert Send(STREAM, b"", is_end=True) == intake.stored(STREAM, submit.batch, Outcome(3, 0))[-1]


def test_a_reset_stream_is_forgotten() -> None:
    """What a reset stream had submitted is still acknowledged; half a frame of it is no error."""
    intake = welcomed()
    [submit] = intake.receive(STREAM, framed(batch=batch()) + b"\0\0", False, 0.0)
    assert isinstance(submit, Submit)
    assert [] == intake.reset(STREAM)
    assert 2 == len(intake.stored(STREAM, submit.batch, Outcome(3, 0)))
    assert [] == intake.reset(STREAM)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (framed(batch=batch()), pb.Refusal.MALFORMED),
        (hello(version=1), pb.Refusal.UNSUPPORTED_VERSION),
        (hello(agent_id=""), pb.Refusal.MALFORMED),
        (hello() + hello(), pb.Refusal.MALFORMED),
        (hello() + MISCOUNTED, pb.Refusal.MALFORMED),
        (hello() + b"\0\x10\0\1", pb.Refusal.TOO_LARGE),
        (encode_frame(b"rubbish"), pb.Refusal.MALFORMED),
    ],
)
def test_what_breaks_the_protocol_is_refused(data: bytes, code: int) -> None:
    """The refusal names the kind of fault, and nothing that comes after it is looked at."""
    intake = AgentIntake(Gate())
    assert_refused(intake.receive(STREAM, data, False, 0.0), code)
    assert [] == intake.receive(STREAM, hello(), False, 0.0)


def test_a_newer_agent_is_answered_with_our_version() -> None:
    """Versions meet at the lower one."""
    [answer] = AgentIntake(Gate()).receive(STREAM, hello(version=3), False, 0.0)
    assert 2 == said(answer).welcome.version


def test_a_stream_may_not_end_inside_a_frame() -> None:
    """Half a frame and an end is a fault."""
    assert_refused(welcomed().receive(STREAM, b"\0", True, 0.0), pb.Refusal.MALFORMED, "ended inside a frame")


def test_a_connection_is_one_agent() -> None:
    """A second stream under another name is refused."""
    assert_refused(welcomed().receive(4, hello("edge-2"), False, 0.0), pb.Refusal.WRONG_IDENTITY)


def test_streams_are_limited() -> None:
    """One stream more than allowed is refused; one that has ended makes room."""
    intake = AgentIntake(Gate())
    for at in range(MAX_STREAMS):
        intake.receive(4 * at, hello(), False, 0.0)
    intake.receive(STREAM, b"", True, 0.0)
    assert said(intake.receive(400, hello(), False, 0.0)[0]).HasField("welcome")
    assert_refused(intake.receive(404, hello(), False, 0.0), pb.Refusal.TOO_LARGE, "streams")


def test_a_unidirectional_stream_closes_the_connection() -> None:
    """There is no way to answer on one, so the close alone carries the reason."""
    [close] = welcomed().receive(2, hello(), False, 0.0)
    assert isinstance(close, Close)
    assert pb.Refusal.MALFORMED == close.code


def test_what_waits_is_limited() -> None:
    """An agent that does not wait for acknowledgements is refused before it fills the memory."""
    intake = welcomed()
    data = framed(batch=batch(count=15, metrics=[pb.Metric(name="a", payload=bytes(60_000))] * 15))
    for _ in range(MAX_PENDING_BYTES // len(data)):
        assert isinstance(intake.receive(STREAM, data, False, 0.0)[0], Submit)
    assert_refused(intake.receive(STREAM, data, False, 0.0), pb.Refusal.TOO_LARGE, "wait for an acknowledgement")


def test_nothing_is_submitted_before_the_gate() -> None:
    """A batch right behind a refused Hello is not looked at, whether token or certificate was at fault."""
    wrong_token = AgentIntake(Gate(tokens={"": "x" * 16}))
    wrong_name = AgentIntake(Gate(), refusal=RefusedError(pb.Refusal.UNAUTHENTICATED, "no"))
    for intake in (wrong_token, wrong_name):
        actions = intake.receive(STREAM, hello() + framed(batch=batch()), False, 0.0)
        assert not any(isinstance(action, Submit) for action in actions)
        assert_refused(actions, pb.Refusal.UNAUTHENTICATED)


def test_a_failing_store_refuses_once() -> None:
    """The agent is told to come back later, once, however many of its batches failed."""
    intake = welcomed()
    for at in range(2):
        intake.receive(STREAM, framed(batch=batch(batch_id=at)), False, 0.0)
    assert_refused(intake.not_stored(STREAM), pb.Refusal.STORE_UNAVAILABLE, "try again later")
    assert [] == intake.not_stored(STREAM)


def test_a_compressed_stream_is_read() -> None:
    """With ZSTD agreed, frames come from one context; a bomb is refused before it unfolds."""
    intake = welcomed(compression=[pb.ZSTD])
    context = zstandard.ZstdCompressor().compressobj()

    def compressed(body: bytes) -> bytes:
        return encode_frame(context.compress(body) + context.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))

    for batch_id in range(3):
        body = pb.Frame(batch=batch(batch_id=batch_id)).SerializeToString()
        [submit] = intake.receive(STREAM, compressed(body), False, 0.0)
        assert isinstance(submit, Submit)
        assert (batch_id, 3) == (submit.batch.batch_id, submit.batch.records)
    actions = intake.receive(STREAM, compressed(bytes(200 * 1024 * 1024)), False, 0.0)
    assert_refused(actions, pb.Refusal.TOO_LARGE, "decompresses to more than")


def test_compression_nobody_knows_is_declined() -> None:
    """Offered only what we do not speak, we choose none; rubbish in an agreed stream is a fault."""
    [answer] = AgentIntake(Gate()).receive(STREAM, hello(compression=[9]), False, 0.0)
    assert pb.NONE == said(answer).welcome.compression
    intake = welcomed(compression=[pb.ZSTD, pb.NONE])
    assert_refused(intake.receive(STREAM, framed(batch=batch()), False, 0.0), pb.Refusal.MALFORMED)
