"""The receiver as a process, spoken to over QUIC by a client that knows nothing but docs/protocol.md."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from kon_agent.receiver import pki
from kon_agent.wire import kon_agent_pb2 as pb

DEADLINE_S = 20.0
EPOCH = 0xFEDC_BA98_7654_3210
AGENT = "edge-1"


class Client(QuicConnectionProtocol):
    """A connection that keeps all that arrives, and lets a test wait for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received = bytearray()
        self.alpn: str | None = None
        self.end: events.ConnectionTerminated | None = None
        self._changed = asyncio.Event()

    def quic_event_received(self, event: events.QuicEvent) -> None:
        match event:
            case events.StreamDataReceived():
                self.received += event.data
            case events.HandshakeCompleted():
                self.alpn = event.alpn_protocol
            case events.ConnectionTerminated():
                self.end = event
        self._changed.set()

    def send(self, stream_id: int, data: bytes, end: bool = False) -> None:
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()

    async def until(self, is_reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_reached():
                self._changed.clear()
                await self._changed.wait()

    async def frame(self) -> pb.Frame:
        def size() -> int:
            return 4 + int.from_bytes(self.received[:4], "big")

        await self.until(lambda: len(self.received) >= 4 and len(self.received) >= size())
        body = bytes(self.received[4 : size()])
        del self.received[: size()]
        return pb.Frame.FromString(body)

    async def ended(self) -> events.ConnectionTerminated:
        await self.until(lambda: self.end is not None)
        assert self.end is not None
        return self.end


class Receiver:
    """A running kon-receiver, and the folder it works in."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.store = folder / "store.db"
        command = [sys.executable, "-m", "kon_agent.cli.receiver", "run", "-v", "--listen", "127.0.0.1:0"]
        command += ["--store", str(self.store), "--cert", str(folder / "server.pem")]
        command += ["--key", str(folder / "server.key"), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.port = self._wait_for_port()

    def _wait_for_port(self) -> int:
        assert self.process.stderr is not None
        fd, said, deadline = self.process.stderr.fileno(), b"", time.monotonic() + DEADLINE_S
        while b"listening on" not in said:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(fd, 65536) if ready else b""
            assert chunk, said.decode()
            said += chunk
        return int(said.rpartition(b"127.0.0.1:")[2].partition(b",")[0])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal the process and return its exit code and what it printed."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out.decode()

    def ask(self, *command: str) -> list[Any]:
        arguments = [sys.executable, "-m", "kon_agent.cli.receiver", *command, "--json", "--store", str(self.store)]
        done = subprocess.run(arguments, capture_output=True, timeout=DEADLINE_S, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def converse(
        self,
        conversation: Callable[[Client], Awaitable[None]],
        alpn: str = "kon-agent/2",
        certificate: tuple[Path, str] | None = None,
    ) -> None:
        """Connect, hold a conversation, and hang up."""

        async def hold() -> None:
            configuration = QuicConfiguration(alpn_protocols=[alpn], server_name="localhost")
            configuration.load_verify_locations(str(self.folder / "ca.pem"))
            if certificate is not None:
                folder, name = certificate
                configuration.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
            loop = asyncio.get_running_loop()
            transport, client = await loop.create_datagram_endpoint(
                lambda: Client(QuicConnection(configuration=configuration)), local_addr=("127.0.0.1", 0)
            )
            try:
                client.connect(("127.0.0.1", self.port))
                await client.until(lambda: client.alpn is not None)
                assert alpn == client.alpn
                await conversation(client)
            finally:
                client.close()
                transport.close()

        asyncio.run(hold())


@contextmanager
def receiving(folder: Path, *flags: str) -> Iterator[Receiver]:
    receiver = Receiver(folder, *flags)
    try:
        yield receiver
    finally:
        if receiver.process.poll() is None:
            receiver.process.kill()
            receiver.process.communicate()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    pki.init(folder, [])
    pki.agent(folder, AGENT)
    return folder


@pytest.fixture
def folder(tmp_path: Path, authority: Path) -> Path:
    for path in authority.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def hello(agent_id: str = AGENT, **fields: Any) -> bytes:
    return framed(pb.Frame(hello=pb.Hello(version=2, agent_id=agent_id, **fields)).SerializeToString())


def metrics(first_seq: int, count: int) -> list[pb.Metric]:
    return [
        pb.Metric(timestamp=1_000 + seq, name="load", value=seq / 2, labels={"core": "0"})
        for seq in range(first_seq, first_seq + count)
    ]


def batch(batch_id: int, first_seq: int, count: int) -> bytes:
    segment = pb.Segment(plugin="cpu", epoch=EPOCH, first_seq=first_seq, count=count, metrics=metrics(first_seq, count))
    return pb.Frame(batch=pb.Batch(batch_id=batch_id, segments=[segment])).SerializeToString()


def test_a_batch_is_stored_acknowledged_and_shown(folder: Path) -> None:
    """What is acknowledged can be queried at that moment, field by field, while the receiver runs."""
    with receiving(folder) as receiver:

        async def conversation(client: Client) -> None:
            client.send(0, hello())
            assert 2 == (await client.frame()).welcome.version
            client.send(0, framed(batch(7, 0, 3)))
            assert pb.Ack(batch_id=7, stored=3) == (await client.frame()).ack
            records = receiver.ask("query")
            assert 3 == len(records)
            expected = {"agent": AGENT, "plugin": "cpu", "epoch": f"{EPOCH:016x}", "seq": 2, "ts_ns": 1002}
            assert expected | {"name": "load", "value": 1.0, "labels": {"core": "0"}} == records[2]

        receiver.converse(conversation)
        code, printed = receiver.stop()
        assert 0 == code
        assert f" {AGENT} cpu 3 · 3 stored, 0 duplicates, " in printed


def test_a_batch_sent_again_is_refused_and_counted(folder: Path) -> None:
    """A record that arrives twice, in whatever batch, is stored once; the ledger counts the refusals."""
    with receiving(folder) as receiver:

        async def conversation(client: Client) -> None:
            client.send(0, hello())
            await client.frame()
            client.send(0, framed(batch(1, 0, 10)) + framed(batch(2, 5, 10)))
            assert pb.Ack(batch_id=1, stored=10) == (await client.frame()).ack
            assert pb.Ack(batch_id=2, stored=5, duplicates=5) == (await client.frame()).ack

        receiver.converse(conversation)
        [[entry]] = receiver.ask("ledger")
        assert 15 == entry["stored"] == len(receiver.ask("query"))
        assert [[0, 14]] == entry["ranges"]
        assert (5, 0) == (entry["duplicates_refused"], entry["missing"])


def test_a_killed_receiver_remembers(folder: Path) -> None:
    """After kill -9 everything acknowledged is there, and sending it again stores nothing twice."""
    with receiving(folder) as receiver:

        async def first(client: Client) -> None:
            client.send(0, hello())
            await client.frame()
            client.send(0, framed(batch(1, 0, 100)))
            assert 100 == (await client.frame()).ack.stored
            receiver.stop(signal.SIGKILL)

        receiver.converse(first)
    with receiving(folder) as receiver:

        async def second(client: Client) -> None:
            client.send(0, hello())
            await client.frame()
            client.send(0, framed(batch(1, 0, 101)))
            assert pb.Ack(batch_id=1, stored=1, duplicates=100) == (await client.frame()).ack

        receiver.converse(second)
        [[entry]] = receiver.ask("ledger")
        assert ([[0, 100]], 100) == (entry["ranges"], entry["duplicates_refused"])


def test_only_the_agent_its_certificate_names_gets_in(folder: Path, tmp_path: Path) -> None:
    """With --client-ca, the right certificate gets in; another name, a rogue authority or none do not."""
    rogue = tmp_path / "rogue"
    pki.init(rogue, [])
    pki.agent(rogue, AGENT)
    pki.agent(folder, "edge-2")
    cases = [
        ((folder, "edge-2"), pb.Refusal.WRONG_IDENTITY, "names edge-2, not 'edge-1'"),
        ((rogue, AGENT), pb.Refusal.UNAUTHENTICATED, "client certificate not accepted"),
        ((folder, "server"), pb.Refusal.UNAUTHENTICATED, "client certificate not accepted"),
        (None, pb.Refusal.UNAUTHENTICATED, "kon-receiver pki agent"),
    ]
    with receiving(folder, "--client-ca", str(folder / "ca.pem")) as receiver:
        for certificate, code, reason in cases:

            async def refused(client: Client, code: Any = code, reason: str = reason) -> None:
                client.send(0, hello() + framed(batch(1, 0, 1)))
                refusal = (await client.frame()).refusal
                assert code == refusal.code
                assert reason in refusal.message
                end = await client.ended()
                assert (code, None) == (end.error_code, end.frame_type)

            receiver.converse(refused, certificate=certificate)

            async def refused_too(client: Client, code: Any = code, reason: str = reason) -> None:
                request = pb.BatchMetricsRequest(agent_id=AGENT, metrics=metrics(0, 1))
                client.send(2, framed(request.SerializeToString()), end=True)
                end = await client.ended()
                assert code == end.error_code
                assert reason in end.reason_phrase

            receiver.converse(refused_too, "kon-agent", certificate)

        async def accepted(client: Client) -> None:
            client.send(0, hello() + framed(batch(1, 0, 1)))
            assert 2 == (await client.frame()).welcome.version
            assert 1 == (await client.frame()).ack.stored

        receiver.converse(accepted, certificate=(folder, AGENT))
        assert [AGENT] == [record["agent"] for record in receiver.ask("query")]


def test_a_token_lets_in(folder: Path) -> None:
    """With --token-file the right token gets in and a wrong one does not."""
    (folder / "tokens").write_text(f"{AGENT} correct-horse-battery # ours\n")
    with receiving(folder, "--token-file", str(folder / "tokens")) as receiver:

        async def accepted(client: Client) -> None:
            client.send(0, hello(token="correct-horse-battery"))
            assert 2 == (await client.frame()).welcome.version

        async def refused(client: Client) -> None:
            client.send(0, hello(token="correct-horse-batterz"))
            assert pb.Refusal.UNAUTHENTICATED == (await client.frame()).refusal.code
            assert pb.Refusal.UNAUTHENTICATED == (await client.ended()).error_code

        receiver.converse(accepted)
        receiver.converse(refused)


def test_the_original_is_understood(folder: Path) -> None:
    """The Go original's batches and single metrics, several to a stream, are stored and never answered."""
    request = pb.BatchMetricsRequest(agent_id=AGENT, timestamp=5, metrics=metrics(0, 2))
    single = pb.Metric(timestamp=9, name="single", value=4.5)
    with receiving(folder) as receiver:

        async def conversation(client: Client) -> None:
            client.send(2, framed(request.SerializeToString()) + framed(single.SerializeToString()), end=True)
            client.send(6, framed(request.SerializeToString())[:9])
            client.send(6, framed(request.SerializeToString())[9:], end=True)
            deadline = time.monotonic() + DEADLINE_S
            while len(receiver.ask("query")) < 5:
                assert time.monotonic() < deadline
            assert b"" == client.received

        receiver.converse(conversation, "kon-agent")
        records = receiver.ask("query")
        assert {(AGENT, "legacy")} == {(record["agent"], record["plugin"]) for record in records}
        assert [0, 1, 2, 3, 4] == sorted(record["seq"] for record in records)
        assert 1 == len({record["epoch"] for record in records})
        assert [4.5] == [record["value"] for record in records if record["name"] == "single"]


def test_an_oversized_frame_is_refused(folder: Path) -> None:
    """A frame that announces more than the limit is refused on its length alone; the store stays empty."""
    with receiving(folder) as receiver:

        async def conversation(client: Client) -> None:
            client.send(0, hello())
            await client.frame()
            client.send(0, (1024 * 1024 + 1).to_bytes(4, "big"))
            assert pb.Refusal.TOO_LARGE == (await client.frame()).refusal.code
            assert pb.Refusal.TOO_LARGE == (await client.ended()).error_code

        receiver.converse(conversation)
        assert [] == receiver.ask("query")


def test_a_compressed_stream_is_understood(folder: Path) -> None:
    """Where Welcome chooses zstd, frames come in one streaming context, each flushed."""
    with receiving(folder) as receiver:

        async def conversation(client: Client) -> None:
            client.send(0, hello(compression=[pb.Compression.ZSTD]))
            assert pb.Compression.ZSTD == (await client.frame()).welcome.compression
            context = zstandard.ZstdCompressor(level=1).compressobj()
            for batch_id in range(3):
                data = context.compress(batch(batch_id, batch_id * 1000, 1000))
                data += context.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
                client.send(0, framed(data))
                assert pb.Ack(batch_id=batch_id, stored=1000) == (await client.frame()).ack

        receiver.converse(conversation)
        [[entry]] = receiver.ask("ledger")
        assert [[0, 2999]] == entry["ranges"]


def test_a_second_receiver_is_kept_from_the_store(folder: Path) -> None:
    """Two receivers on one store would both believe their own ledger: the second one does not start."""
    with receiving(folder) as receiver:
        command = [sys.executable, "-m", "kon_agent.cli.receiver", "run", "--store", str(receiver.store)]
        command += ["--listen", "127.0.0.1:0", "--cert", str(folder / "server.pem")]
        command += ["--key", str(folder / "server.key")]
        second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert 1 == second.returncode
        assert "in use by another receiver" in second.stderr


def test_it_makes_its_own_certificates(tmp_path: Path) -> None:
    """Without --cert, a private authority is made once, beside the store, and its place is told."""
    command = [sys.executable, "-m", "kon_agent.cli.receiver", "run", "--listen", "127.0.0.1:0"]
    command += ["--store", str(tmp_path / "s" / "store.db")]
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            said = ""
            while "listening on" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
        assert 0 == process.returncode
        assert str(tmp_path / "s" / "pki" / "ca.pem") in said
