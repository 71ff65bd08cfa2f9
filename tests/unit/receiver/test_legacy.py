"""The intake of the original's protocol: everything with a name and a number, and nothing said back."""

from __future__ import annotations

from kon_agent.receiver.batch import Outcome
from kon_agent.receiver.identity import Gate
from kon_agent.receiver.intake import STORE_FAILED, Action, Close, Submit
from kon_agent.receiver.legacy import MAX_AGENT_IDS, MAX_BUFFERED_BYTES, LegacyIntake
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import MAX_LEGACY_FRAME_BYTES, encode_frame
from tests.unit.receiver.conversation import metrics

EPOCH = 77


def request(agent_id: str = "edge-1", count: int = 2) -> bytes:
    message = pb.BatchMetricsRequest(agent_id=agent_id, metrics=metrics(count))
    return encode_frame(message.SerializeToString())


def single() -> bytes:
    return encode_frame(pb.Metric(timestamp=1, name="load", value=2.0).SerializeToString())


def submitted(actions: list[Action]) -> list[tuple[str, int, int]]:
    """Return agent, first number and count of each batch; there is nothing but batches."""
    batches = []
    for action in actions:
        assert isinstance(action, Submit)
        [segment] = action.batch.segments
        assert ("legacy", EPOCH) == (segment.plugin, segment.epoch)
        batches.append((action.batch.agent_id, segment.first_seq, len(segment.metrics)))
    return batches


def test_numbers_run_over_streams_and_messages() -> None:
    """Each agent's records count on from message to message and stream to stream; storing is not answered."""
    intake = LegacyIntake(Gate(), EPOCH)
    actions = intake.receive(2, request() + single(), True, 0.0)
    assert [("edge-1", 0, 2), ("edge-1", 2, 1)] == submitted(actions)
    assert [("edge-1", 3, 2)] == submitted(intake.receive(6, request(), True, 0.0))
    assert [("edge-2", 0, 2)] == submitted(intake.receive(10, request("edge-2"), True, 0.0))
    assert isinstance(actions[0], Submit)
    assert [] == intake.stored(2, actions[0].batch, Outcome(2, 0))


def test_a_nameless_message_takes_the_name_there_is() -> None:
    """A metric alone is its certificate's agent's, or unknown."""
    assert [("unknown", 0, 1)] == submitted(LegacyIntake(Gate(), EPOCH).receive(2, single(), True, 0.0))
    certified = LegacyIntake(Gate(), EPOCH, names=["edge-9"])
    assert [("edge-9", 0, 1)] == submitted(certified.receive(2, single(), True, 0.0))


def test_an_empty_batch_is_nothing() -> None:
    """A batch without metrics leaves no trace."""
    assert [] == LegacyIntake(Gate(), EPOCH).receive(2, request(count=0) + encode_frame(b""), True, 0.0)


def test_a_closed_gate_stays_closed() -> None:
    """The original has no token to show."""
    [close] = LegacyIntake(Gate(tokens={"": "x" * 16}), EPOCH).receive(2, request(), True, 0.0)
    assert isinstance(close, Close)
    assert pb.Refusal.UNAUTHENTICATED == close.code


def test_what_is_too_much_or_broken_closes() -> None:
    """An overlong message, too many unfinished ones, too many names, half a message: the connection closes."""
    overlong = [(2, (MAX_LEGACY_FRAME_BYTES + 1).to_bytes(4, "big"), False)]
    begun = MAX_LEGACY_FRAME_BYTES.to_bytes(4, "big") + bytes(MAX_LEGACY_FRAME_BYTES - 1)
    unfinished = [(2 + 4 * at, begun, False) for at in range(MAX_BUFFERED_BYTES // len(begun) + 1)]
    names = [(2, request(f"edge-{at}"), False) for at in range(MAX_AGENT_IDS + 1)]
    half = [(2, request()[:-1], True)]
    for events, code in ((overlong, 5), (unfinished, 5), (names, 5), (half, 4)):
        intake = LegacyIntake(Gate(), EPOCH)
        *_, last = [action for event in events for action in intake.receive(*event, 0.0)]
        assert isinstance(last, Close)
        assert code == last.code
        assert [] == intake.receive(2, request(), False, 0.0)


def test_finished_streams_free_what_they_held() -> None:
    """A long series of streams, each whole or reset, never reaches the limit."""
    intake = LegacyIntake(Gate(), EPOCH)
    begun = MAX_LEGACY_FRAME_BYTES.to_bytes(4, "big") + bytes(1024 * 1024)
    for at in range(2 * MAX_BUFFERED_BYTES // len(begun)):
        assert [] == intake.receive(2 + 4 * at, begun, False, 0.0)
        assert [] == intake.reset(2 + 4 * at)


def test_a_failing_store_closes() -> None:
    """The original learns of a store that failed by the close."""
    intake = LegacyIntake(Gate(), EPOCH)
    assert [Close(pb.Refusal.STORE_UNAVAILABLE, STORE_FAILED)] == intake.not_stored(2)
    assert [] == intake.not_stored(2)
