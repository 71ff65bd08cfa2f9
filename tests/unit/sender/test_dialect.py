"""The promises of both dialects: a batch sent is answered exactly once, or the connection is given up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import zstandard

from kon_agent.errors import RemoteProtocolError
from kon_agent.metric import Metric
from kon_agent.ring import Drop
from kon_agent.sender.dialect import Acknowledged, Answer, Unacknowledged, choose
from kon_agent.sender.lane import Lost, Run
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.encode import encode_record
from kon_agent.wire.frames import ALPN_LEGACY, ALPN_V2, MAX_FRAME_BYTES, FrameDecoder, encode_frame

EPOCH = 2**64 - 1
LIVE, BACKLOG = 0, 4  # the first two bidirectional streams of a client (RFC 9000 section 2.1)
RECORD = encode_record(Metric("x", 1.0), 1)


class Line:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.delivered: set[int] = set()
        self._opened = [0, 0]

    def open_stream(self, is_unidirectional: bool) -> int:
        """Number streams as QUIC does."""
        stream_id = 4 * self._opened[is_unidirectional] + 2 * is_unidirectional
        self._opened[is_unidirectional] += 1
        self.sent[stream_id] = bytearray()
        return stream_id

    def send(self, stream_id: int, data: bytes, end_stream: bool = False) -> None:
        """Keep the data."""
        assert stream_id not in self.ended
        self.sent[stream_id] += data
        if end_stream:
            self.ended.add(stream_id)

    def is_delivered(self, stream_id: int) -> bool:
        """Say what the test says."""
        return stream_id in self.delivered

    def bodies(self, stream_id: int) -> list[bytes]:
        """Return and forget the frames sent on a stream."""
        decoder = FrameDecoder(10 * MAX_FRAME_BYTES)
        bodies = decoder.feed(bytes(self.sent[stream_id]))
        assert decoder.at_end()
        self.sent[stream_id].clear()
        return bodies


@dataclass
class Load:
    """What a batch carries of one epoch."""

    plugin: str = "cpu"
    epoch: int = EPOCH
    runs: list[Run] = field(default_factory=list)
    losses: list[Lost] = field(default_factory=list)


def frame(**body: object) -> bytes:
    """Return a frame of the server's."""
    return encode_frame(pb.Frame(**body).SerializeToString())  # type: ignore[arg-type]


def welcome(compression: pb.Compression = pb.NONE) -> bytes:
    return frame(welcome=pb.Welcome(version=2, compression=compression))


def opened(has_backlog: bool = False, compression: pb.Compression = pb.NONE) -> tuple[Acknowledged, Line]:
    """Return a conversation whose streams have been welcomed, the Hellos read."""
    dialect, line = Acknowledged("edge-1", "secret", has_backlog), Line()
    dialect.open(line)
    for stream_id in list(line.sent):
        line.bodies(stream_id)
        dialect.receive(stream_id, welcome(compression))
    return dialect, line


@pytest.mark.parametrize(("has_backlog", "lanes"), [(False, [pb.LIVE]), (True, [pb.LIVE, pb.BACKLOG])])
def test_every_stream_begins_with_hello(has_backlog: bool, lanes: list[int]) -> None:
    """Who we are, what proves it, and what the stream is for."""
    dialect, line = Acknowledged("edge-1", "secret", has_backlog), Line()
    dialect.open(line)
    hellos = [pb.Frame.FromString(body).hello for stream_id in line.sent for body in line.bodies(stream_id)]
    assert lanes == [hello.lane for hello in hellos]
    assert {(2, "edge-1", "secret")} == {(hello.version, hello.agent_id, hello.token) for hello in hellos}


def test_nothing_is_sent_before_the_welcome() -> None:
    """Each stream is ready once it has been welcomed, and no sooner."""
    dialect, line = Acknowledged("edge-1", "", True), Line()
    dialect.open(line)
    ready = [(dialect.is_ready(False), dialect.is_ready(True))]
    for stream_id in (LIVE, BACKLOG):
        assert [] == dialect.receive(stream_id, welcome())
        ready.append((dialect.is_ready(False), dialect.is_ready(True)))
    assert [(False, False), (True, False), (True, True)] == ready


def test_without_a_backlog_there_is_none() -> None:
    """A stream that was not opened is never ready."""
    assert not opened(has_backlog=False)[0].is_ready(is_backlog=True)


def test_a_batch_carries_runs_and_losses() -> None:
    """Each run is a segment of its own, each loss is declared, the plugin is the one of the ring."""
    dialect, line = opened()
    load = Load(runs=[Run(0, [RECORD]), Run(3, [RECORD, RECORD])], losses=[Lost(1, 2, Drop.RING_FULL)])
    size = dialect.send(line, 9, [load, Load("memory", 5, [Run(7, [RECORD])])], 0, is_backlog=False)
    assert len(line.sent[LIVE]) == size
    [body] = line.bodies(LIVE)
    batch = pb.Frame.FromString(body).batch
    assert 9 == batch.batch_id
    assert [("cpu", EPOCH, 0, 1, 1), ("cpu", EPOCH, 3, 2, 2), ("memory", 5, 7, 1, 1)] == [
        (segment.plugin, segment.epoch, segment.first_seq, segment.count, len(segment.metrics))
        for segment in batch.segments
    ]
    assert [pb.Loss(plugin="cpu", epoch=EPOCH, first_seq=1, count=2, reason=pb.RING_FULL)] == list(batch.losses)


def test_the_backlog_has_a_stream_of_its_own() -> None:
    """What is old never stands before what is new."""
    dialect, line = opened(has_backlog=True)
    dialect.send(line, 1, [Load(runs=[Run(0, [RECORD])])], 0, is_backlog=True)
    assert ([], 1) == (line.bodies(LIVE), len(line.bodies(BACKLOG)))


def test_compression_runs_through_the_whole_stream() -> None:
    """One context: a batch like the one before takes next to nothing, and each can be read when it comes."""
    dialect, line = opened(compression=pb.ZSTD)
    inflate = zstandard.ZstdDecompressor().decompressobj()
    load, sizes = [Load(runs=[Run(0, [encode_record(Metric(f"m{n}", n), 1) for n in range(100)])])], []
    for batch_id in (1, 2):
        sizes.append(dialect.send(line, batch_id, load, 0, is_backlog=False))
        [body] = line.bodies(LIVE)
        assert batch_id == pb.Frame.FromString(inflate.decompress(body)).batch.batch_id
    assert sizes[1] < sizes[0] / 4


def test_acknowledgements_are_answers() -> None:
    """In the order they come, several in a piece or one in several; rejections add up by epoch."""
    dialect, _ = opened()
    rejections = [pb.Rejection(plugin="cpu", epoch=EPOCH, count=count) for count in (1, 2)]
    data = frame(ack=pb.Ack(batch_id=1)) + frame(ack=pb.Ack(batch_id=2, rejections=rejections))
    assert [Answer(1, {}), Answer(2, {("cpu", EPOCH): 3})] == dialect.receive(LIVE, data)
    answers = [answer for byte in data for answer in dialect.receive(LIVE, bytes([byte]))]
    assert [1, 2] == [answer.batch_id for answer in answers]


def test_only_the_servers_word_is_an_answer() -> None:
    """What the transport has delivered is not stored yet."""
    dialect, line = opened()
    dialect.send(line, 1, [Load(runs=[Run(0, [RECORD])])], 0, is_backlog=False)
    line.delivered |= {LIVE}
    assert [] == dialect.progress(line)


def test_a_refusal_ends_it_with_its_reason() -> None:
    """What the server says is told to the operator."""
    dialect, _ = opened()
    with pytest.raises(RemoteProtocolError, match="refused us: the certificate names edge-2"):
        dialect.receive(LIVE, frame(refusal=pb.Refusal(message="the certificate names edge-2")))


@pytest.mark.parametrize(
    "data",
    [
        welcome(),
        frame(hello=pb.Hello()),
        frame(batch=pb.Batch()),
        encode_frame(b""),
        encode_frame(b"\xff"),
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
    ],
    ids=["second welcome", "hello", "batch", "empty", "nonsense", "too long"],
)
def test_what_no_server_says_ends_it(data: bytes) -> None:
    """A peer that breaks the protocol is not talked to any longer."""
    with pytest.raises(RemoteProtocolError):
        opened()[0].receive(LIVE, data)


def test_an_answer_before_the_welcome_ends_it() -> None:
    """Nothing has been asked yet."""
    dialect = Acknowledged("edge-1", "", False)
    dialect.open(Line())
    with pytest.raises(RemoteProtocolError):
        dialect.receive(LIVE, frame(ack=pb.Ack(batch_id=1)))


def test_a_stream_that_is_not_ours_ends_it() -> None:
    """A server of this protocol opens none."""
    with pytest.raises(RemoteProtocolError, match="stream 3"):
        opened()[0].receive(3, b"")


# ── the original's ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_original_gets_a_stream_per_batch() -> None:
    """Finished at once, one BatchMetricsRequest in it, the same records untouched."""
    dialect, line = Unacknowledged("edge-1"), Line()
    dialect.open(line)
    assert {} == line.sent
    loads = [Load(runs=[Run(0, [RECORD]), Run(5, [RECORD])], losses=[Lost(1, 4, Drop.RING_FULL)]), Load("memory")]
    size = dialect.send(line, 1, loads, 77, is_backlog=False)
    [stream_id] = line.sent
    assert (len(line.sent[stream_id]), {stream_id}, 2) == (size, line.ended, stream_id & 3)
    [body] = line.bodies(stream_id)
    request = pb.BatchMetricsRequest.FromString(body)
    assert ("edge-1", 77, 2) == (request.agent_id, request.timestamp, len(request.metrics))


def test_the_original_takes_new_and_old_at_any_time() -> None:
    """Nothing has to be agreed on first."""
    dialect = Unacknowledged("edge-1")
    assert (True, True) == (dialect.is_ready(False), dialect.is_ready(True))


def test_delivery_is_the_originals_answer() -> None:
    """A batch is answered once its stream has arrived whole, and only once; whatever the server says."""
    dialect, line = Unacknowledged("edge-1"), Line()
    for batch_id in (1, 2):
        dialect.send(line, batch_id, [Load(runs=[Run(0, [RECORD])])], 0, is_backlog=False)
    first, second = line.sent
    assert [] == dialect.progress(line)
    assert [] == dialect.receive(first, b"anything")
    line.delivered = {second}
    assert [Answer(2, {})] == dialect.progress(line)
    assert [] == dialect.progress(line)
    line.delivered = {first, second}
    assert [Answer(1, {})] == dialect.progress(line)


def test_the_handshake_decides() -> None:
    """Ours where the server offers it, the original's where it offers nothing else, and no third."""
    assert isinstance(choose(ALPN_V2, "edge-1", "", True), Acknowledged)
    assert isinstance(choose(ALPN_LEGACY, "edge-1", "", True), Unacknowledged)
    with pytest.raises(RemoteProtocolError, match="'h3'"):
        choose("h3", "edge-1", "", True)
