"""The intake of one `kon-agent/2` connection: stream bytes in, replies and batches to store out. Pure.

    stream opens ─Hello─▶ gate ─▶ Welcome ─▶ Batch … ─▶ Submit ─(stored)─▶ Ack, in order
         └──────────────── anything else, or anything too much ─▶ Refusal, Close

Invariants:
* No batch is looked at before its stream's Hello has passed the gate; one connection is one agent.
* What waits to be stored is at most MAX_PENDING_BYTES, what waits to become a frame MAX_STREAMS frames.
* After a refusal nothing more is taken in; what had been submitted before may still be stored,
  unacknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from kon_agent import __version__
from kon_agent.errors import RemoteProtocolError
from kon_agent.receiver.batch import Batch, Outcome, check_agent_id, from_wire
from kon_agent.receiver.identity import Gate, RefusedError
from kon_agent.receiver.inflate import Inflater
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import (
    MAX_BATCH_RECORDS,
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    FrameDecoder,
    FrameTooLargeError,
    encode_frame,
    parse_frame,
)

MAX_STREAMS = 8  # open at once: a live and a backlog lane, and more under load (DESIGN §4)
MAX_PENDING_BYTES = 8 * MAX_FRAME_BYTES  # unacknowledged; an agent of ours keeps to an eighth of it
STORE_FAILED = "the receiver could not store it; keep the records and try again later"


class Send(msgspec.Struct, frozen=True):
    """Send `data` on a stream, and end our side of it where `is_end`."""

    stream_id: int
    data: bytes
    is_end: bool = False


class Submit(msgspec.Struct, frozen=True):
    """Store a batch, then tell the intake with `stored`."""

    stream_id: int
    batch: Batch


class Close(msgspec.Struct, frozen=True):
    """Close the connection with an application error code, once everything before has been sent."""

    code: int
    message: str


Action = Send | Submit | Close


class Intake(Protocol):
    """What a connection's protocol makes of its bytes, whichever of the two it speaks."""

    agent_id: str
    """The agent's name, "" until it has been let in."""

    def receive(self, stream_id: int, data: bytes, is_end: bool, now_s: float) -> list[Action]:
        """Take a stream's next bytes; `is_end`: its last."""

    def reset(self, stream_id: int) -> list[Action]:
        """Forget a stream the peer gave up."""

    def stored(self, stream_id: int, batch: Batch, outcome: Outcome) -> list[Action]:
        """Take note that a submitted batch is durable."""

    def not_stored(self, stream_id: int) -> list[Action]:
        """Take note that a submitted batch could not be stored, nor any after it."""


class _Stream:
    def __init__(self) -> None:
        self.decoder = FrameDecoder()
        self.inflater: Inflater | None = None
        self.is_welcome = False
        self.is_ended = False
        self.unacknowledged = 0


class AgentIntake:
    """The intake of a `kon-agent/2` connection.

    Args:
        gate: decides who may go on.
        names: what the client's certificate entitles it to.
        refusal: why no stream of this connection may go on, known since the handshake.
    """

    def __init__(self, gate: Gate, names: Sequence[str] = (), refusal: RefusedError | None = None) -> None:
        self.agent_id = ""
        self.pending_bytes = 0
        self._gate = gate
        self._names = names
        self._refusal = refusal
        self._streams: dict[int, _Stream] = {}
        self._is_refused = False

    def receive(self, stream_id: int, data: bytes, is_end: bool, now_s: float) -> list[Action]:
        """Take a stream's next bytes; `is_end`: its last."""
        if self._is_refused:
            return []
        actions: list[Action] = []
        try:
            stream = self._stream(stream_id)
            for body in stream.decoder.feed(data):
                actions.append(self._frame(stream_id, stream, body, now_s))
            if is_end:
                if not stream.decoder.at_end():
                    raise RemoteProtocolError("the stream ended inside a frame")
                stream.is_ended = True
                actions += self._finish(stream_id, stream)
        except RefusedError as err:
            actions += self._refuse(stream_id, err.code, f"{err}")
        except FrameTooLargeError as err:
            actions += self._refuse(stream_id, pb.Refusal.TOO_LARGE, f"{err}; send smaller batches")
        except RemoteProtocolError as err:
            actions += self._refuse(stream_id, pb.Refusal.MALFORMED, f"{err}; see docs/protocol.md")
        return actions

    def reset(self, stream_id: int) -> list[Action]:
        """Forget a stream the peer gave up; what it submitted is still stored."""
        if (stream := self._streams.get(stream_id)) is None:
            return []
        stream.decoder = FrameDecoder()
        stream.is_ended = True
        return self._finish(stream_id, stream)

    def stored(self, stream_id: int, batch: Batch, outcome: Outcome) -> list[Action]:
        """Acknowledge a batch that is durable."""
        self.pending_bytes -= batch.size_bytes
        if self._is_refused or (stream := self._streams.get(stream_id)) is None:
            return []
        stream.unacknowledged -= 1
        rejections = [
            pb.Rejection(
                plugin=each.plugin,
                epoch=each.epoch,
                first_seq=each.first_seq,
                count=each.count,
                message=each.message,
            )
            for each in batch.rejections
        ]
        ack = pb.Ack(
            batch_id=batch.batch_id,
            stored=outcome.stored,
            duplicates=outcome.duplicates,
            rejections=rejections,
        )
        return [_send(stream_id, pb.Frame(ack=ack)), *self._finish(stream_id, stream)]

    def not_stored(self, stream_id: int) -> list[Action]:
        """Refuse an agent whose batch could not be stored."""
        return [] if self._is_refused else self._refuse(stream_id, pb.Refusal.STORE_UNAVAILABLE, STORE_FAILED)

    def _stream(self, stream_id: int) -> _Stream:
        if (known := self._streams.get(stream_id)) is not None:
            return known
        if stream_id & 2:  # RFC 9000 §2.1: unidirectional
            raise RemoteProtocolError("kon-agent/2 uses bidirectional streams only")
        if len(self._streams) == MAX_STREAMS:
            raise FrameTooLargeError(f"more than {MAX_STREAMS} streams are open")
        stream = self._streams[stream_id] = _Stream()
        return stream

    def _frame(self, stream_id: int, stream: _Stream, body: bytes, now_s: float) -> Action:
        if stream.inflater is not None:
            body = stream.inflater.inflate(body)
        frame = parse_frame(body)
        kind = frame.WhichOneof("body")
        if not stream.is_welcome:
            if kind != "hello":
                raise RemoteProtocolError(f"the stream begins with {kind}, not with hello")
            return self._hello(stream_id, stream, frame.hello)
        if kind != "batch":
            raise RemoteProtocolError(f"an agent sends batches after its hello, not {kind}")
        batch = from_wire(frame.batch, self.agent_id, len(body), now_s)
        self.pending_bytes += batch.size_bytes
        if self.pending_bytes > MAX_PENDING_BYTES:
            raise FrameTooLargeError(f"more than {MAX_PENDING_BYTES} bytes wait for an acknowledgement")
        stream.unacknowledged += 1
        return Submit(stream_id, batch)

    def _hello(self, stream_id: int, stream: _Stream, hello: pb.Hello) -> Action:
        if hello.version < PROTOCOL_VERSION:
            raise RefusedError(
                pb.Refusal.UNSUPPORTED_VERSION,
                f"protocol version {hello.version} is not spoken here, {PROTOCOL_VERSION} is; upgrade the agent",
            )
        if self._refusal is not None:
            raise self._refusal
        check_agent_id(hello.agent_id)
        self._gate.admit(hello.agent_id, hello.token, self._names)
        if self.agent_id not in ("", hello.agent_id):
            raise RefusedError(pb.Refusal.WRONG_IDENTITY, f"this connection is {self.agent_id!r}'s; open another")
        self.agent_id = hello.agent_id
        stream.is_welcome = True
        known = (pb.Compression.NONE, pb.Compression.ZSTD)
        chosen = next((each for each in hello.compression if each in known), pb.Compression.NONE)
        if chosen == pb.Compression.ZSTD:
            stream.inflater = Inflater()
        welcome = pb.Welcome(
            version=PROTOCOL_VERSION,
            receiver_version=__version__,
            compression=chosen,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_batch_records=MAX_BATCH_RECORDS,
        )
        return _send(stream_id, pb.Frame(welcome=welcome))

    def _finish(self, stream_id: int, stream: _Stream) -> list[Action]:
        """End our side of a stream that has ended and whose last batch is acknowledged."""
        if not stream.is_ended or stream.unacknowledged:
            return []
        del self._streams[stream_id]
        return [Send(stream_id, b"", is_end=True)]

    def _refuse(self, stream_id: int, code: int, message: str) -> list[Action]:
        self._is_refused = True
        self._streams.clear()
        close = Close(int(code), message)
        if stream_id & 2:
            return [close]  # nothing can be said on a stream that only the peer writes
        refusal = pb.Refusal(code=code, message=message)  # type: ignore[arg-type]
        return [_send(stream_id, pb.Frame(refusal=refusal)), close]


def _send(stream_id: int, frame: pb.Frame) -> Send:
    return Send(stream_id, encode_frame(frame.SerializeToString()))
