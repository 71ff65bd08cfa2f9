"""A receiver that never acknowledges: it welcomes every stream, takes every batch, and says nothing more.

Run as a program it says that it is ready (sd_notify(3)) and counts the bytes it takes as lines on its standard output.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived

from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.frames import ALPN_V2, MAX_BATCH_RECORDS, MAX_FRAME_BYTES, PROTOCOL_VERSION, encode_frame


class MuteConnection(QuicConnectionProtocol):
    """One agent's connection."""

    def quic_event_received(self, event: QuicEvent) -> None:
        """Welcome a stream at its first bytes, which are its Hello; keep silent afterwards."""
        if not hasattr(self, "greeted"):
            self.greeted: set[int] = set()
        if isinstance(event, StreamDataReceived):
            print(len(event.data), flush=True)
            if event.stream_id not in self.greeted:
                self.greeted.add(event.stream_id)
                welcome = pb.Welcome(
                    version=PROTOCOL_VERSION,
                    receiver_version="mute",
                    compression=pb.Compression.NONE,
                    max_frame_bytes=MAX_FRAME_BYTES,
                    max_batch_records=MAX_BATCH_RECORDS,
                )
                frame = encode_frame(pb.Frame(welcome=welcome).SerializeToString())
                self._quic.send_stream_data(event.stream_id, frame)
                self.transmit()


async def main(port: int, certificate: str, key: str) -> None:
    """Serve until killed."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=[ALPN_V2])
    configuration.load_cert_chain(certificate, key)
    await serve("127.0.0.1", port, configuration=configuration, create_protocol=MuteConnection)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:4]))
