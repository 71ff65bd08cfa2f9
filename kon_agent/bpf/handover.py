"""Loaded BPF counters on their way from one supervisor to the next: what `net.NetCounters` is, as data.

Invariant: a descriptor is named once. Whoever takes this over closes them all, sooner or later: a link that stays open
keeps its program attached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from kon_agent.bpf.hooks import remove_filter
from kon_agent.bpf.layout import Interface


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """An interface's rows: whose they are or last were, by a name of any bytes, and what they had counted before."""

    number: int
    ifindex: int
    name: bytes
    base: list[int] = []
    created_ns: int = 0


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """A watched interface.

    Attributes:
        attachment: how it is attached.
        name: its name as the kernel has it, any bytes.
        slot: its rows, if it has any.
        link_fds: the links that attach it: first the way in's, then the way out's, as far as there are any.
        has_added_qdisc: the clsact qdisc on its way out is ours.
    """

    attachment: Interface
    name: bytes = b""
    slot: Slot | None = None
    link_fds: list[int] = []
    has_added_qdisc: bool = False


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
        for watched in self.watched:
            if watched.attachment.egress_mode == "clsact":
                remove_filter(watched.attachment.ifindex, watched.has_added_qdisc)
