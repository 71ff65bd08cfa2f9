"""How to speak to a server: `kon-agent/2` with acknowledgements, or the original's `kon-agent` without.

Pure: bytes and time come in as arguments, bytes go out through a `Wire`, answers come back as `Answer`s. Both dialects
promise the same to their caller: a batch sent is answered exactly once, or the connection has to be given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kon_agent import __version__
from kon_agent.errors import RemoteProtocolError
from kon_agent.sender.lane import Portion
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.encode import encode_batch, encode_legacy_batch, encode_segment
from kon_agent.wire.frames import (
    ALPN_LEGACY,
    ALPN_V2,
    MAX_LEGACY_FRAME_BYTES,
    PROTOCOL_VERSION,
    FrameDecoder,
    encode_frame,
    parse_frame,
)


class Wire(Protocol):
    """What a dialect needs of a connection."""

    def open_stream(self, is_unidirectional: bool) -> int:
        """Open a stream and return its id."""

    def send(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        """Queue `data` on the stream."""

    def is_delivered(self, stream_id: int) -> bool:
        """Whether the peer's transport has acknowledged all of a finished stream."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a batch: stored, but for the rejected records, counted by plugin and epoch."""

    batch_id: int
    rejected: dict[tuple[str, int], int]


class Dialect(Protocol):
    """One connection's conversation."""

    is_ready: bool

    def open(self, wire: Wire) -> None:
        """Say what has to be said first."""

    def send(self, wire: Wire, batch_id: int, portions: Sequence[Portion], ts_ns: int) -> int:
        """Send a batch; return the bytes it took."""

    def receive(self, stream_id: int, data: bytes) -> list[Answer]:
        """Take what the server sent; raise RemoteProtocolError where it breaks the protocol or refuses us."""

    def progress(self, wire: Wire) -> list[Answer]:
        """Look at what the transport has delivered since the last time."""


class Acknowledged:
    """`kon-agent/2`: one stream, hello and welcome, then batches answered in order."""

    def __init__(self, agent_id: str, token: str) -> None:
        self.is_ready = False
        self._hello = pb.Hello(
            version=PROTOCOL_VERSION, agent_id=agent_id, agent_version=__version__, token=token, lane=pb.LIVE
        )
        self._stream_id = -1
        self._decoder = FrameDecoder()

    def open(self, wire: Wire) -> None:
        """Open the stream with Hello."""
        self._stream_id = wire.open_stream(is_unidirectional=False)
        wire.send(self._stream_id, encode_frame(pb.Frame(hello=self._hello).SerializeToString()))

    def send(self, wire: Wire, batch_id: int, portions: Sequence[Portion], ts_ns: int) -> int:
        """Send a `Batch` frame."""
        segments = [
            encode_segment(portion.lane.plugin, portion.lane.epoch, run.first_seq, run.records)
            for portion in portions
            for run in portion.runs
        ]
        losses = [
            pb.Loss(
                plugin=portion.lane.plugin,
                epoch=portion.lane.epoch,
                first_seq=lost.first_seq,
                count=lost.count,
                reason=int(lost.drop),  # type: ignore[arg-type]
            )
            for portion in portions
            for lost in portion.losses
        ]
        frame = encode_frame(encode_batch(batch_id, segments, losses))
        wire.send(self._stream_id, frame)
        return len(frame)

    def receive(self, stream_id: int, data: bytes) -> list[Answer]:
        """Take Welcome, Acks, or a Refusal."""
        if stream_id != self._stream_id:
            raise RemoteProtocolError(f"the server sent data on stream {stream_id}, which is not ours")
        answers = []
        for body in self._decoder.feed(data):
            frame = parse_frame(body)
            match frame.WhichOneof("body"):
                case "welcome" if not self.is_ready:
                    self.is_ready = True
                case "ack" if self.is_ready:
                    answers.append(_answer(frame.ack))
                case "refusal":
                    raise RemoteProtocolError(f"the server refused us: {frame.refusal.message}")
                case kind:
                    raise RemoteProtocolError(f"the server sent {kind or 'an empty frame'} where none is allowed")
        return answers

    def progress(self, wire: Wire) -> list[Answer]:
        """Nothing: only the server's word counts."""
        return []


class Unacknowledged:
    """The original's `kon-agent`: a unidirectional stream per batch, no answer.

    The strongest promise it allows is taken: a batch counts as delivered once the server's transport has acknowledged
    every byte of its stream. What the server does with it then, nobody can know.
    """

    def __init__(self, agent_id: str) -> None:
        self.is_ready = True
        self._agent_id = agent_id
        self._streams: dict[int, int] = {}

    def open(self, wire: Wire) -> None:
        """Nothing: the original begins with data."""

    def send(self, wire: Wire, batch_id: int, portions: Sequence[Portion], ts_ns: int) -> int:
        """Send a `BatchMetricsRequest` on a stream of its own."""
        records = [record for portion in portions for run in portion.runs for record in run.records]
        frame = encode_frame(encode_legacy_batch(self._agent_id, ts_ns, records), MAX_LEGACY_FRAME_BYTES)
        stream_id = wire.open_stream(is_unidirectional=True)
        wire.send(stream_id, frame, end_stream=True)
        self._streams[stream_id] = batch_id
        return len(frame)

    def receive(self, stream_id: int, data: bytes) -> list[Answer]:
        """Ignore what a server says; the original's never does."""
        return []

    def progress(self, wire: Wire) -> list[Answer]:
        """Return an answer for each batch whose stream has been acknowledged whole."""
        done = [stream_id for stream_id in self._streams if wire.is_delivered(stream_id)]
        return [Answer(self._streams.pop(stream_id), {}) for stream_id in done]


def choose(alpn: str, agent_id: str, token: str) -> Dialect:
    """Return the dialect of the protocol the handshake settled on.

    Raises:
        RemoteProtocolError: the server chose one we did not offer.
    """
    if alpn == ALPN_V2:
        return Acknowledged(agent_id, token)
    if alpn == ALPN_LEGACY:
        return Unacknowledged(agent_id)
    raise RemoteProtocolError(f"the server chose protocol {alpn!r}; it must speak {ALPN_V2} or {ALPN_LEGACY}")


def _answer(ack: pb.Ack) -> Answer:
    rejected: dict[tuple[str, int], int] = {}
    for rejection in ack.rejections:
        key = (rejection.plugin, rejection.epoch)
        rejected[key] = rejected.get(key, 0) + rejection.count
    return Answer(ack.batch_id, rejected)
