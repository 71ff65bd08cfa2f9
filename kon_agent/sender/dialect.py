"""How to speak to a server: `kon-agent/2` with acknowledgements, or the original's `kon-agent` without.

Pure: bytes and time come in as arguments, bytes go out through a `Wire`, answers come back as `Answer`s. Both dialects
promise the same to their caller: a batch sent is answered exactly once, or the connection has to be given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import zstandard

from kon_agent import __version__
from kon_agent.errors import RemoteProtocolError
from kon_agent.sender.lane import Lost, Run
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

ZSTD_LEVEL = 3  # a record takes microseconds either way; small batches gain most from the shared context
ZSTD_WINDOW_LOG = 17  # 128 KiB: two full batches to compress against, in less than 1 MiB of memory


class Wire(Protocol):
    """What a dialect needs of a connection."""

    def open_stream(self, is_unidirectional: bool) -> int:
        """Open a stream and return its id."""

    def send(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        """Queue `data` on the stream."""

    def is_delivered(self, stream_id: int) -> bool:
        """Whether the peer's transport has acknowledged all of a finished stream."""


class Parcel(Protocol):
    """What a batch carries of one plugin's epoch: a lane's `Portion`, or the backlog's."""

    @property
    def plugin(self) -> str:
        """Whose records they are."""

    @property
    def epoch(self) -> int:
        """The epoch they belong to."""

    @property
    def runs(self) -> list[Run]:
        """The records."""

    @property
    def losses(self) -> list[Lost]:
        """The losses known."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a batch: stored, but for the rejected records, counted by plugin and epoch."""

    batch_id: int
    rejected: dict[tuple[str, int], int]


class Dialect(Protocol):
    """One connection's conversation."""

    def open(self, wire: Wire) -> None:
        """Say what has to be said first."""

    def is_ready(self, is_backlog: bool) -> bool:
        """Whether a batch may be sent: a live one, or one of the backlog."""

    def send(self, wire: Wire, batch_id: int, parcels: Sequence[Parcel], ts_ns: int, is_backlog: bool) -> int:
        """Send a batch; return the bytes it took."""

    def receive(self, stream_id: int, data: bytes) -> list[Answer]:
        """Take what the server sent; raise RemoteProtocolError where it breaks the protocol or refuses us."""

    def progress(self, wire: Wire) -> list[Answer]:
        """Look at what the transport has delivered since the last time."""


class _Stream:
    """One stream of `kon-agent/2`: Hello, Welcome, then batches through one compression context."""

    def __init__(self, wire: Wire, hello: pb.Hello) -> None:
        self.is_welcome = False
        self.decoder = FrameDecoder()
        self.id = wire.open_stream(is_unidirectional=False)
        self._compressor: zstandard.ZstdCompressionObj | None = None
        wire.send(self.id, encode_frame(pb.Frame(hello=hello).SerializeToString()))

    def welcome(self, welcome: pb.Welcome) -> None:
        """Take the server's choice."""
        self.is_welcome = True
        if welcome.compression == pb.ZSTD:
            parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=ZSTD_WINDOW_LOG)
            self._compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()

    def send(self, wire: Wire, body: bytes) -> int:
        """Send a frame; return the bytes it took."""
        if self._compressor is not None:
            body = self._compressor.compress(body) + self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        frame = encode_frame(body)
        wire.send(self.id, frame)
        return len(frame)


class Acknowledged:
    """`kon-agent/2`: a stream for what is new and one for the backlog, each batch answered in order on its own.

    Args:
        agent_id: who we are.
        token: what proves it where there is no certificate; may be empty.
        has_backlog: whether to open the second stream at all.
    """

    def __init__(self, agent_id: str, token: str, has_backlog: bool) -> None:
        self._agent_id = agent_id
        self._token = token
        self._has_backlog = has_backlog
        self._streams: dict[bool, _Stream] = {}  # by `is_backlog`

    def open(self, wire: Wire) -> None:
        """Open the streams, each with Hello."""
        for is_backlog in (False, True) if self._has_backlog else (False,):
            hello = pb.Hello(
                version=PROTOCOL_VERSION,
                agent_id=self._agent_id,
                agent_version=__version__,
                token=self._token,
                lane=pb.BACKLOG if is_backlog else pb.LIVE,
                compression=[pb.ZSTD],
            )
            self._streams[is_backlog] = _Stream(wire, hello)

    def is_ready(self, is_backlog: bool) -> bool:
        """Whether that stream has been welcomed."""
        return is_backlog in self._streams and self._streams[is_backlog].is_welcome

    def send(self, wire: Wire, batch_id: int, parcels: Sequence[Parcel], ts_ns: int, is_backlog: bool) -> int:
        """Send a `Batch` frame."""
        segments = [
            encode_segment(parcel.plugin, parcel.epoch, run.first_seq, run.records)
            for parcel in parcels
            for run in parcel.runs
        ]
        losses = [
            pb.Loss(
                plugin=parcel.plugin,
                epoch=parcel.epoch,
                first_seq=lost.first_seq,
                count=lost.count,
                reason=int(lost.drop),  # type: ignore[arg-type]
            )
            for parcel in parcels
            for lost in parcel.losses
        ]
        return self._streams[is_backlog].send(wire, encode_batch(batch_id, segments, losses))

    def receive(self, stream_id: int, data: bytes) -> list[Answer]:
        """Take Welcome, Acks, or a Refusal."""
        stream = next((stream for stream in self._streams.values() if stream.id == stream_id), None)
        if stream is None:
            raise RemoteProtocolError(f"the server sent data on stream {stream_id}, which is not ours")
        answers = []
        for body in stream.decoder.feed(data):
            frame = parse_frame(body)
            match frame.WhichOneof("body"):
                case "welcome" if not stream.is_welcome:
                    stream.welcome(frame.welcome)
                case "ack" if stream.is_welcome:
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
        self._agent_id = agent_id
        self._streams: dict[int, int] = {}

    def open(self, wire: Wire) -> None:
        """Nothing: the original begins with data."""

    def is_ready(self, is_backlog: bool) -> bool:
        """Always: nothing has to be agreed on."""
        return True

    def send(self, wire: Wire, batch_id: int, parcels: Sequence[Parcel], ts_ns: int, is_backlog: bool) -> int:
        """Send a `BatchMetricsRequest` on a stream of its own; losses cannot be told in this protocol."""
        records = [record for parcel in parcels for run in parcel.runs for record in run.records]
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


def choose(alpn: str, agent_id: str, token: str, has_backlog: bool) -> Dialect:
    """Return the dialect of the protocol the handshake settled on.

    Raises:
        RemoteProtocolError: the server chose one we did not offer.
    """
    if alpn == ALPN_V2:
        return Acknowledged(agent_id, token, has_backlog)
    if alpn == ALPN_LEGACY:
        return Unacknowledged(agent_id)
    raise RemoteProtocolError(f"the server chose protocol {alpn!r}; it must speak {ALPN_V2} or {ALPN_LEGACY}")


def _answer(ack: pb.Ack) -> Answer:
    rejected: dict[tuple[str, int], int] = {}
    for rejection in ack.rejections:
        key = (rejection.plugin, rejection.epoch)
        rejected[key] = rejected.get(key, 0) + rejection.count
    return Answer(ack.batch_id, rejected)
