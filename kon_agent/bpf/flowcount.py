"""The programs that count flows as well: loaded beside the packet counters, they take their programs' place.

They are built of the same source and share its maps, so the counters go on whichever of the two runs. Owned by the
supervisor; the same invariants hold as for `net`.
"""

from __future__ import annotations

import os

from kon_agent import clock
from kon_agent.bpf import flows, libbpf, loader
from kon_agent.bpf.hooks import FRAGS_PROGRAM
from kon_agent.bpf.loader import Loaded, MapShape
from kon_agent.bpf.origin import Origin
from kon_agent.errors import BpfError
from kon_agent.linux.memory import map_memory

_OBJECT = "kon_flows"
_RANDOM_BYTES = 40  # five words of the hash


class FlowCount:
    """The loaded object. Make one with `load`; end it with `close`."""

    def __init__(self, loaded: Loaded, table_bytes: int) -> None:
        self._loaded = loaded
        self._table_bytes = table_bytes
        self.origin = Origin("bpf", created_ns=clock.wall_ns())

    @classmethod
    def load(cls, shared: dict[str, int], memory_bytes: int) -> FlowCount:
        """Load the programs and freeze their table.

        Args:
            shared: the maps `counters` and `interfaces` of the loaded packet counters.
            memory_bytes: of the kernel's, for the table.

        Raises:
            BpfError: the memory is too little, or the kernel refused: in libbpf's words.
        """
        library = libbpf.library()
        sizes = flows.flow_entries(memory_bytes, library.possible_cpus())
        shapes = {
            "flows": MapShape(flows.ENTRY_BYTES, sizes.flows, is_sized=True),
            "flow_buckets": MapShape(flows.BUCKET_BYTES, sizes.flow_buckets, is_sized=True),
            "flow_settings": MapShape(flows.SETTINGS.size, 1),
        }
        loaded = loader.load(loader.object_path(_OBJECT), shapes=shapes, reuse=shared, optional={FRAGS_PROGRAM})
        try:
            settings = flows.encode_settings(sizes.buckets, os.urandom(_RANDOM_BYTES))
            library.update(loaded.maps["flow_settings"], "flow_settings", 0, settings)
            library.freeze(loaded.maps["flows"], "flows")
        except BpfError:
            loaded.close()
            raise
        return cls(loaded, sizes.flows * flows.ENTRY_BYTES)

    @property
    def programs(self) -> dict[str, int]:
        """The programs' descriptors, by name."""
        return {f"{_OBJECT}.{name}": fd for name, fd in self._loaded.programs.items()}

    @property
    def substitutes(self) -> dict[str, int]:
        """The programs' descriptors, by the names of those whose place they take."""
        return self._loaded.programs

    @property
    def maps(self) -> dict[str, int]:
        """The maps' descriptors, by name."""
        return {f"{_OBJECT}.{name}": fd for name, fd in self._loaded.maps.items()}

    def map_table(self) -> memoryview:
        """Map the table, read-only, into this process; a child made by fork does not have it.

        Raises:
            BpfError: no memory left.
        """
        try:
            return map_memory(self._loaded.maps["flows"], self._table_bytes, writable=False, inherit=False)
        except OSError as err:
            raise BpfError(f"cannot map the table of flows: {err}", err.errno or 0) from err

    def close(self) -> None:
        """Let the object go; its programs run on where they are attached until others take their place."""
        self._loaded.close()
