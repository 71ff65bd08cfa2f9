"""What every probe shares with its plugin: rows of 64-bit columns that the kernel writes and a worker maps read-only.

    row = slot * cpus + cpu

A row belongs to one slot and one CPU, so that CPUs never share a cache line; what is wanted of a slot is the sum of its
rows. What a slot is, and what the columns are, is the probe's affair (`tcp`, `drops`, `runqlat`, `biolat`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kon_agent.config.schema import PluginConfig
from kon_agent.errors import BpfError

WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Table:
    """A map that an object's programs keep for themselves.

    Attributes:
        value_bytes: of one value.
        entries: how many there are.
        entry_bytes: what the kernel allocates for one, all in all.
    """

    value_bytes: int
    entries: int
    entry_bytes: int


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """An object of tracing programs, and how large its rows are.

    Attributes:
        object: its name, for instance `kon_tcp`.
        row_bytes: of one row, in its map `rows`.
        slots: rows per CPU.
        optional: programs that may be left out where this kernel lacks their tracepoint.
        settings_bytes: size of the one value of its map `settings`: the number of possible CPUs as u32, then what
            `settings` returns; 0: it has no such map.
        settings: makes the rest of the settings of the plugin's section.
        tables: its other maps by name, but for those that take memory only as they are used.
    """

    object: str
    row_bytes: int
    slots: int = 1
    optional: frozenset[str] = frozenset()
    settings_bytes: int = 0
    settings: Callable[[PluginConfig], bytes] | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)

    def rows_for(self, cpus: int) -> int:
        """Return how many rows there are on a machine of `cpus` possible CPUs."""
        return self.slots * cpus

    def memory_bytes(self, cpus: int) -> int:
        """Return how much kernel memory its maps take on a machine of `cpus` possible CPUs, but for odd pages."""
        tables = sum(table.entries * table.entry_bytes for table in self.tables.values())
        return self.rows_for(cpus) * self.row_bytes + self.settings_bytes + tables

    def cpus_of(self, rows: memoryview) -> int:
        """Return how many CPUs mapped rows are for.

        Raises:
            BpfError: their size is not that of whole slots.
        """
        cpus, rest = divmod(len(rows), self.row_bytes * self.slots)
        if rest or not cpus:
            raise BpfError(f"{self.object}: {len(rows)} bytes are no rows of {self.slots} slots by {self.row_bytes}")
        return cpus


def sum_rows(rows: memoryview, row_bytes: int, first: int, count: int) -> list[int]:
    """Return the columns of `count` rows from row `first` on, added up.

    Args:
        rows: the mapped rows.
        row_bytes: of one row, a multiple of WORD_BYTES.
        first, count: which.

    Raises:
        BpfError: there are no such rows.
    """
    start, end = first * row_bytes, (first + count) * row_bytes
    if first < 0 or count < 1 or end > len(rows):
        raise BpfError(f"rows {first} to {first + count - 1} lie outside of {len(rows)} bytes")
    words = rows[start:end].cast("Q").tolist()
    columns = row_bytes // WORD_BYTES
    return [sum(words[column::columns]) for column in range(columns)]
