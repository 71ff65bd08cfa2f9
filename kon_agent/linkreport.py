"""What the sender tells the supervisor about its connection: one fixed-size report in a published page.

    state u8 | pad 3 | rtt_us u32 | since_ns u64 (wall time) | sent_bytes u64 | alive_ns u64 | address 128 | detail 256

The supervisor reads it from a process it does not trust: the state is range-checked, the texts are only ever shown.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

_LAYOUT = struct.Struct("=B3xIQQQ128s256s")
REPORT_BYTES = _LAYOUT.size


class LinkState(enum.IntEnum):
    """How the sender stands with the server."""

    DISCONNECTED = 0
    CONNECTING = 1
    CONNECTED = 2
    BACKOFF = 3


@dataclass(frozen=True, slots=True)
class LinkReport:
    """The connection at one moment.

    Attributes:
        state: where it stands.
        address: the server spoken to or tried last.
        since_ns: wall time of the last change of state.
        rtt_us: smoothed round-trip time; 0 = unknown.
        sent_bytes: bytes of batches handed to the network since the sender started.
        alive_ns: scheduling clock of this report: the sender's heartbeat.
        detail: why it is not connected; empty when it is.
    """

    state: LinkState = LinkState.DISCONNECTED
    address: str = ""
    since_ns: int = 0
    rtt_us: int = 0
    sent_bytes: int = 0
    alive_ns: int = 0
    detail: str = ""

    def encode(self) -> bytes:
        """Return the report's bytes; texts are cut to their fields."""
        return _LAYOUT.pack(
            self.state,
            min(self.rtt_us, 0xFFFF_FFFF),
            self.since_ns,
            self.sent_bytes,
            self.alive_ns,
            self.address.encode()[:128],
            self.detail.encode()[:256],
        )

    @classmethod
    def decode(cls, data: bytes) -> LinkReport:
        """Return the report in `data`; whatever cannot be one reads as disconnected."""
        if len(data) != REPORT_BYTES:
            return cls(detail="the sender's report is unreadable")
        state, rtt_us, since_ns, sent_bytes, alive_ns, address, detail = _LAYOUT.unpack(data)
        if state > max(LinkState):
            return cls(detail="the sender's report is unreadable")
        return cls(LinkState(state), _printable(address), since_ns, rtt_us, sent_bytes, alive_ns, _printable(detail))


def _printable(data: bytes) -> str:
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in text)
