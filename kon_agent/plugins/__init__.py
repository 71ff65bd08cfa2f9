"""The built-in collectors, named as strings: only the worker that runs one imports it.

A collector is a class constructed with its typed configuration and a `Context`, with one method:

    collect() -> Iterable[Metric]      one cycle's metrics; raises NoData where the kernel has none

and, where it needs them, `start()` before the first cycle and `stop()` after the last. Timing, time stamps, encoding
and isolation are the worker's business. By convention `_read_*` touches the kernel and `_parse_*` is pure.
"""

from __future__ import annotations

BUILTIN = {
    "cpu": "kon_agent.plugins.cpu:Cpu",
    "memory": "kon_agent.plugins.memory:Memory",
    "disk": "kon_agent.plugins.disk:Disk",
    "ebpf": "kon_agent.plugins.ebpf:Ebpf",
    "agent": "kon_agent.plugins.agent:Agent",
}
"""Plugin name to `module:Class`."""
