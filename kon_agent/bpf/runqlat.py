"""How long tasks wait for a CPU: the layout of ebpf/kon_runqlat.h, said again.

row of a CPU: a latency, missed    as u64
"""

from __future__ import annotations

from kon_agent.bpf.latency import LATENCY_WORDS
from kon_agent.bpf.rows import WORD_BYTES, ProbeSpec, Table

ROW_BYTES = 192
MISSED = LATENCY_WORDS
"""Column: tasks that ran and whose wait's beginning is not known."""

PLACES = 1 << 16
"""How many tasks can wait at once, each with its own place: kon_runqlat.bpf.c says which."""

SPEC = ProbeSpec("kon_runqlat", ROW_BYTES, tables={"began": Table(WORD_BYTES, PLACES, WORD_BYTES)})
