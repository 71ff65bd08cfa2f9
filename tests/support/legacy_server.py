"""A server that speaks the original's protocol and nothing else, written from docs/protocol.md, sections 2 and 10.

It offers the ALPN `kon-agent`, takes unidirectional streams of messages, each a 4-byte big-endian length and a
protobuf `BatchMetricsRequest`, and never answers. It knows three of the protobuf's fields and no line of kon_agent.
Run as a program it says that it is ready (sd_notify(3)) and then prints each message as a line of JSON:
`{"agent": …, "names": […]}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived

METRICS, AGENT_ID = 1, 2  # of BatchMetricsRequest
NAME = 2  # of Metric
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types


class LegacyConnection(QuicConnectionProtocol):
    """One agent's connection."""

    def quic_event_received(self, event: QuicEvent) -> None:
        """Collect what arrives and print every message that is whole."""
        if not hasattr(self, "streams"):
            self.streams: defaultdict[int, bytes] = defaultdict(bytes)
        if isinstance(event, StreamDataReceived):
            assert event.stream_id & 2, f"stream {event.stream_id} is not unidirectional"
            data = self.streams[event.stream_id] + event.data
            while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
                end = 4 + int.from_bytes(data[:4], "big")
                print(json.dumps(message(data[4:end])), flush=True)
                data = data[end:]
            self.streams[event.stream_id] = data
            assert data == b"" or not event.end_stream, "the stream ended inside a message"


def message(body: bytes) -> dict[str, object]:
    """Return who sent a `BatchMetricsRequest`, and the names of its metrics."""
    agent, names = "", []
    for number, value in fields(body):
        if number == AGENT_ID:
            agent = value.decode()
        elif number == METRICS:
            names += [inner.decode() for field, inner in fields(value) if field == NAME]
    return {"agent": agent, "names": names}


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of every length-delimited field of a protobuf message; skip the others."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == BYTES:
            length, at = varint(data, at)
            yield number, data[at : at + length]
            at += length
        elif kind == VARINT:
            _, at = varint(data, at)
        else:
            at += {FIXED64: 8, FIXED32: 4}[kind]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the base-128 number at a place, and the place behind it."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


async def main(port: int, certificate: str, key: str) -> None:
    """Serve until killed."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["kon-agent"])
    configuration.load_cert_chain(certificate, key)
    await serve("127.0.0.1", port, configuration=configuration, create_protocol=LegacyConnection)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:4]))
