"""The tracing probes there are, by the plugin that reads them."""

from __future__ import annotations

from kon_agent.bpf import biolat, drops, runqlat, tcp
from kon_agent.bpf.rows import ProbeSpec

PROBES: dict[str, ProbeSpec] = {
    "tcp": tcp.SPEC,
    "drops": drops.SPEC,
    "runqlat": runqlat.SPEC,
    "biolat": biolat.SPEC,
}
