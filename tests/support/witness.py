"""A witness to rings: reads them after everyone who owned them is dead.

Shared memory lives as long as anyone holds it. As root we open the supervisor's descriptors anew and so know, when all
is over, what the workers had produced and how far the sender had come.
"""

from __future__ import annotations

import mmap
import os

from kon_agent.ring import DATA_OFFSET, Observer, RingStats


class Witness:
    """Holds the present ring of every plugin of a supervisor; one made later is not among them.

    Args:
        supervisor: its process id.
    """

    def __init__(self, supervisor: int) -> None:
        areas: dict[str, mmap.mmap] = {}
        for fd in sorted(map(int, os.listdir(f"/proc/{supervisor}/fd"))):
            path = f"/proc/{supervisor}/fd/{fd}"
            try:
                name = os.readlink(path).removeprefix("/memfd:").removesuffix(" (deleted)")
            except FileNotFoundError:  # a file it has just read and closed
                continue
            if name.startswith(("kon-ring-", "kon-tail-")):
                with open(path, "rb") as file:
                    areas[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._observers = {
            name.removeprefix("kon-ring-"): _observe(area, areas[name.replace("ring", "tail", 1)])
            for name, area in areas.items()
            if name.startswith("kon-ring-")
        }

    def stats(self) -> dict[str, RingStats]:
        """Return every ring's terms of the conservation law, by plugin."""
        return {plugin: observer.stats() for plugin, observer in self._observers.items()}


def _observe(producer: mmap.mmap, consumer: mmap.mmap) -> Observer:
    return Observer(memoryview(producer), memoryview(consumer), len(producer) - DATA_OFFSET)
