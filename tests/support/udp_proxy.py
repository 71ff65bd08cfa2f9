"""A bad network: a UDP proxy between agent and receiver that loses, delays, doubles, damages and reorders datagrams.

One thread, one selector. Each client address has an upstream socket of its own, as a NAT would give it; `rebind` throws
them away, so that the receiver hears the same connection from a new port and nothing sent to the old one arrives.
"""

from __future__ import annotations

import heapq
import itertools
import random
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support.netns import Namespace

MAX_DATAGRAM_BYTES = 65536
MAX_HEARD = 1000  # datagrams an attacker remembers
REORDER_DELAY_S = 0.03  # long enough for a later datagram to overtake
IDLE_S = 0.2  # how soon the thread sees that it is to end

Address = tuple[str, int]
Send = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to the datagrams of one direction; shares are of 1.

    Attributes:
        loss, double, damage, overtake: shares of the datagrams that are lost, sent twice, changed, or delayed so that
            later ones overtake them.
        delay_s: how long each one takes.
        is_cut: whether none arrives, and nobody is told.
    """

    loss: float = 0.0
    double: float = 0.0
    damage: float = 0.0
    overtake: float = 0.0
    delay_s: float = 0.0
    is_cut: bool = False


FAIR = Weather()
CUT = Weather(is_cut=True)


class UdpProxy:
    """The proxy; a context manager.

    Args:
        place: the namespace it stands in, with the receiver; it listens on that end's address.
        port: the receiver's, on 127.0.0.1; the proxy's own is the same.
        seed: what its chances depend on.
    """

    def __init__(self, place: Namespace, port: int, seed: int = 0) -> None:
        self.up = FAIR  # agent to receiver
        self.down = FAIR
        self.tally: Counter[str] = Counter()
        self._place = place
        self._receiver: Address = ("127.0.0.1", port)
        self._chance = random.Random(seed)
        self._front = self._socket()
        self._front.bind((place.address, port))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._front, selectors.EVENT_READ, None)
        self._upstream: dict[Address, socket.socket] = {}
        self._order = itertools.count()
        self._late: list[tuple[float, int, Send, bytes]] = []
        self._has_to_rebind = False
        self._heard: deque[bytes] = deque(maxlen=MAX_HEARD)
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="udp proxy", daemon=True)

    def cut(self) -> None:
        """Swallow everything, both ways."""
        self.up = self.down = CUT

    def heal(self) -> None:
        """Pass everything on again."""
        self.up = self.down = FAIR

    def rebind(self) -> None:
        """Speak to the receiver from other ports from now on."""
        self._has_to_rebind = True

    def replay(self) -> int:
        """Send the receiver again, from a port of our own, what it was sent lately; return how many datagrams."""
        heard = list(self._heard)
        with self._socket() as sock:
            for data in heard:
                sock.sendto(data, self._receiver)
        return len(heard)

    def _socket(self) -> socket.socket:
        with self._place.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        return sock

    def _run(self) -> None:
        while not self._is_over:
            wait_s = min(IDLE_S, self._late[0][0] - time.monotonic()) if self._late else IDLE_S
            for key, _ in self._selector.select(max(0.0, wait_s)):
                self._take(key.fileobj, key.data)  # type: ignore[arg-type]
            if self._has_to_rebind:
                self._has_to_rebind = False
                self._forget_all()
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, send, data = heapq.heappop(self._late)
                _try(send, data)

    def _take(self, sock: socket.socket, client: Address | None) -> None:
        try:
            data, sender = sock.recvfrom(MAX_DATAGRAM_BYTES)
        except OSError:  # an ICMP error of the other side, or a socket just thrown away
            return
        if client is None:
            self._heard.append(data)
            self._pass_on("up", self.up, data, self._towards_receiver(sender).send)
        else:
            self._pass_on("down", self.down, data, lambda datagram: self._front.sendto(datagram, client))

    def _towards_receiver(self, client: Address) -> socket.socket:
        if client not in self._upstream:
            sock = self._upstream[client] = self._socket()
            sock.connect(self._receiver)
            self._selector.register(sock, selectors.EVENT_READ, client)
        return self._upstream[client]

    def _forget_all(self) -> None:
        for sock in self._upstream.values():
            self._selector.unregister(sock)
            sock.close()
        self._upstream.clear()

    def _pass_on(self, way: str, weather: Weather, data: bytes, send: Send) -> None:
        self.tally[way] += 1
        if weather.is_cut or self._happens(weather.loss):
            self.tally["lost"] += 1
            return
        if self._happens(weather.damage):
            self.tally["damaged"] += 1
            data = self._damaged(data)
        delay_s = weather.delay_s
        if self._happens(weather.overtake):
            self.tally["overtaken"] += 1
            delay_s += REORDER_DELAY_S
        copies = 1 + self._happens(weather.double)
        self.tally["doubled"] += copies - 1
        for _ in range(copies):
            if delay_s:
                heapq.heappush(self._late, (time.monotonic() + delay_s, next(self._order), send, data))
            else:
                _try(send, data)

    def _happens(self, share: float) -> bool:
        return share > 0 and self._chance.random() < share

    def _damaged(self, data: bytes) -> bytes:
        at = self._chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self._chance.randrange(8))]) + data[at + 1 :]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over = True
        self._thread.join()
        self._forget_all()
        self._selector.close()
        self._front.close()


def _try(send: Send, data: bytes) -> None:
    try:
        send(data)
    except OSError:  # what a network does with a datagram nobody takes
        return
