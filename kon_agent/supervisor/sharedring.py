"""A ring's two memory areas as the supervisor holds them: made here, handed out as descriptors, observed read-only.

Invariants: the supervisor's own views are not inherited by any child (MADV_DONTFORK), and each child receives its end
as descriptors that it maps itself: the producer's area writable for the worker alone, the consumer's for the sender.
"""

from __future__ import annotations

import contextlib
import os
import secrets

from kon_agent.errors import KonError
from kon_agent.linux.memory import create_memfd, map_memory, reopen_readonly, unmap_memory
from kon_agent.ring import CONSUMER_BYTES, Observer, Producer, format_ring, producer_bytes
from kon_agent.supervisor import handover


class SharedRing:
    """One ring of one epoch.

    Args:
        number: how the supervisor and the sender call it.
        plugin: whose ring it is.
        size_bytes: a power of two.

    Raises:
        OSError: no memory or no descriptor left.
    """

    def __init__(self, number: int, plugin: str, size_bytes: int) -> None:
        self.number = number
        self.plugin = plugin
        self.size_bytes = size_bytes
        self.epoch = secrets.randbits(64) | 1  # never zero, which reads as "none" on the wire
        self.is_closed = False
        with contextlib.ExitStack() as stack:  # what was had is given back if the rest is refused
            self._producer_fd = _own(stack, create_memfd(f"kon-ring-{plugin}", producer_bytes(size_bytes)))
            self._consumer_fd = _own(stack, create_memfd(f"kon-tail-{plugin}", CONSUMER_BYTES))
            writable = map_memory(self._producer_fd, producer_bytes(size_bytes), writable=True)
            format_ring(writable, self.epoch, size_bytes)
            unmap_memory(writable)
            self._open(stack)

    def _open(self, stack: contextlib.ExitStack) -> None:
        size_bytes = self.size_bytes
        # What a child is given of the other's area must be read-only at the file, not just at the mapping.
        self._producer_ro_fd = _own(stack, reopen_readonly(self._producer_fd))
        self._consumer_ro_fd = _own(stack, reopen_readonly(self._consumer_fd))
        producer = map_memory(self._producer_ro_fd, producer_bytes(size_bytes), writable=False, inherit=False)
        stack.callback(unmap_memory, producer)
        consumer = map_memory(self._consumer_ro_fd, CONSUMER_BYTES, writable=False, inherit=False)
        stack.callback(unmap_memory, consumer)
        self._owned = stack.pop_all()
        self.observer = Observer(producer, consumer, size_bytes)

    def capture(self) -> handover.Ring:
        """Return what the code that takes our place needs to go on with it."""
        return handover.Ring(
            number=self.number,
            plugin=self.plugin,
            size_bytes=int(self.size_bytes),  # a `Size` has no JSON
            epoch=self.epoch,
            is_closed=self.is_closed,
            producer_fd=self._producer_fd,
            consumer_fd=self._consumer_fd,
        )

    @classmethod
    def adopt(cls, taken: handover.Ring) -> SharedRing:
        """Return the ring another supervisor has made; its descriptors are the ring's from now on.

        Raises:
            KonError: they hold no such ring.
        """
        sizes = os.fstat(taken.producer_fd).st_size, os.fstat(taken.consumer_fd).st_size
        if sizes != (producer_bytes(taken.size_bytes), CONSUMER_BYTES):
            raise KonError(f"ring {taken.number} of {taken.plugin} is handed over with areas of {sizes} bytes")
        ring = cls.__new__(cls)
        ring.number, ring.plugin, ring.size_bytes = taken.number, taken.plugin, taken.size_bytes
        ring.epoch, ring.is_closed = taken.epoch, taken.is_closed
        with contextlib.ExitStack() as stack:
            ring._producer_fd = _own(stack, taken.producer_fd)
            ring._consumer_fd = _own(stack, taken.consumer_fd)
            ring._open(stack)
        return ring

    def map_producer(self) -> Producer:
        """Return the worker's end. Called in the child."""
        return Producer(
            map_memory(self._producer_fd, producer_bytes(self.size_bytes), writable=True),
            map_memory(self._consumer_ro_fd, CONSUMER_BYTES, writable=False),
        )

    def consumer_fds(self) -> tuple[int, int]:
        """Return what the sender needs: the producer's area read-only, the consumer's read-write."""
        return self._producer_ro_fd, self._consumer_fd

    @property
    def tap_fd(self) -> int:
        """What whoever only watches needs: the producer's area read-only. It stays ours to close."""
        return self._producer_ro_fd

    def release(self) -> None:
        """Let go of the memory; what children have mapped stays theirs."""
        del self.observer
        self._owned.close()


def _own(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd
