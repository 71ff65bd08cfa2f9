"""Loaded BPF counters on their way from one supervisor to the next: what `net.NetCounters` is, as data.

Invariant: a descriptor is named once. Whoever takes this over closes them all, sooner or later: a link that stays open
keeps its program attached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from kon_agent.bpf.layout import Interface


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """An interface's rows: whose they are or last were, by a name of any bytes, and what they had counted before."""

    number: int
    ifindex: int
    name: bytes
    base: list[int] = []


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """A watched interface, and the links that attach it."""

    attachment: Interface
    slot: Slot | None = None
    link_fds: list[int] = []


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded object.

    Attributes:
        digest: of the object file: another one has other programs and maps.
        fds: of its maps and programs, by name.
        watched: in the order they were attached.
        free: slots nobody has, in their order.
        buckets: the kernel's table of interfaces, as far as it is not empty.
    """

    digest: str
    fds: dict[str, int]
    watched: list[Watched] = []
    free: list[Slot] = []
    buckets: dict[int, list[bytes]] = {}

    def descriptors(self) -> Iterator[int]:
        """Yield every descriptor."""
        yield from self.fds.values()
        for watched in self.watched:
            yield from watched.link_fds

    def discard(self) -> None:
        """Detach everything."""
        for fd in self.descriptors():
            os.close(fd)
