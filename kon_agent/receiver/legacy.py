"""The intake of one connection that speaks the Go original's `kon-agent`: messages in, nothing said back.
Pure.

A stream carries any number of length-prefixed `BatchMetricsRequest` or `Metric` messages. There are no
sequence numbers, so the receiver assigns them: plugin "legacy", one random epoch per connection, counting
from 0 per agent. A record sent twice is stored twice; nothing tells the two apart.

Invariant: what waits to become a message is at most MAX_BUFFERED_BYTES over all streams of the connection.
"""

from __future__ import annotations

from collections.abc import Sequence

from kon_agent.errors import RemoteProtocolError
from kon_agent.receiver.batch import Batch, Outcome, check_agent_id, from_legacy
from kon_agent.receiver.identity import Gate, RefusedError
from kon_agent.receiver.intake import STORE_FAILED, Action, Close, Submit
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import MAX_LEGACY_FRAME_BYTES, FrameDecoder, FrameTooLargeError, parse_legacy

MAX_BUFFERED_BYTES = 3 * MAX_LEGACY_FRAME_BYTES  # the original sends one message at a time
MAX_AGENT_IDS = 16  # on one connection; the original has one
UNKNOWN_AGENT = "unknown"  # who sends without a name, where the gate lets it


class LegacyIntake:
    """The intake of a `kon-agent` connection.

    Args:
        gate: decides who may go on; the original knows no token, so only a certificate helps it through a
            closed one.
        epoch: a random number, this connection's.
        names: what the client's certificate entitles it to.
        refusal: why nothing of this connection may be taken, known since the handshake.
    """

    def __init__(self, gate: Gate, epoch: int, names: Sequence[str] = (), refusal: RefusedError | None = None) -> None:
        self.agent_id = ""
        self._gate = gate
        self._epoch = epoch
        self._names = names
        self._refusal = refusal
        self._decoders: dict[int, FrameDecoder] = {}
        self._next_seq: dict[str, int] = {}
        self._buffered_bytes = 0
        self._is_refused = False

    def receive(self, stream_id: int, data: bytes, is_end: bool, now_s: float) -> list[Action]:
        """Take a stream's next bytes; `is_end`: its last."""
        if self._is_refused:
            return []
        actions: list[Action] = []
        try:
            if self._refusal is not None:
                raise self._refusal
            decoder = self._decoders.setdefault(stream_id, FrameDecoder(MAX_LEGACY_FRAME_BYTES))
            self._buffered_bytes -= decoder.buffered_bytes
            for body in decoder.feed(data):
                actions += self._message(stream_id, body, now_s)
            self._buffered_bytes += decoder.buffered_bytes
            if self._buffered_bytes > MAX_BUFFERED_BYTES:
                raise FrameTooLargeError(f"more than {MAX_BUFFERED_BYTES} bytes of unfinished messages")
            if is_end:
                is_whole = decoder.at_end()
                self.reset(stream_id)
                if not is_whole:
                    raise RemoteProtocolError("the stream ended inside a message")
        except RefusedError as err:
            actions += self._refuse(err.code, f"{err}")
        except FrameTooLargeError as err:
            actions += self._refuse(pb.Refusal.TOO_LARGE, f"{err}")
        except RemoteProtocolError as err:
            actions += self._refuse(pb.Refusal.MALFORMED, f"{err}")
        return actions

    def reset(self, stream_id: int) -> list[Action]:
        """Forget a stream the peer ended or gave up."""
        if (decoder := self._decoders.pop(stream_id, None)) is not None:
            self._buffered_bytes -= decoder.buffered_bytes
        return []

    def stored(self, stream_id: int, batch: Batch, outcome: Outcome) -> list[Action]:
        """Say nothing: the original expects no acknowledgement."""
        return []

    def not_stored(self, stream_id: int) -> list[Action]:
        """Close the connection: the only way to tell the original that something is wrong."""
        return [] if self._is_refused else self._refuse(pb.Refusal.STORE_UNAVAILABLE, STORE_FAILED)

    def _message(self, stream_id: int, body: bytes, now_s: float) -> list[Action]:
        request = parse_legacy(body)
        fallback = self._names[0] if self._names else UNKNOWN_AGENT
        agent_id = request.agent_id or self.agent_id or fallback
        if not request.metrics:
            return []
        if agent_id not in self._next_seq:
            check_agent_id(agent_id)
            self._gate.admit(agent_id, "", self._names)
            if len(self._next_seq) == MAX_AGENT_IDS:
                raise FrameTooLargeError(f"more than {MAX_AGENT_IDS} agent ids on one connection")
        self.agent_id = agent_id
        first_seq = self._next_seq.get(agent_id, 0)
        self._next_seq[agent_id] = first_seq + len(request.metrics)
        batch = from_legacy(request.metrics, agent_id, self._epoch, first_seq, len(body), now_s)
        return [Submit(stream_id, batch)]

    def _refuse(self, code: int, message: str) -> list[Action]:
        self._is_refused = True
        self._decoders.clear()
        return [Close(int(code), message)]
