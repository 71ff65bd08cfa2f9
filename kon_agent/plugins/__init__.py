"""What a plugin is made of, and the built-in ones.

A plugin of your own imports from here, and from nowhere else in this package (docs/plugins.md):

    from kon_agent.plugins import Context, Metric, PluginConfig, plugin

A collector is a class constructed with its typed configuration and a `Context`, with one method:

    collect() -> Iterable[Metric]      one cycle's metrics; raises NoData where the kernel has none

or, for what comes when it comes, `run(emit)` (see `events`), and, where it needs them, `start()` before the first cycle
and `stop()` after the last. Timing, time stamps, encoding and isolation are the worker's business. By convention
`_read_*` touches the kernel and `_parse_*` is pure. The built-in collectors are named as strings: only the worker that
runs one imports it.
"""

from __future__ import annotations

from kon_agent.config.schema import Duration, PluginConfig, Share, Size
from kon_agent.errors import NoData, PluginError
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.declaration import plugin

__all__ = [
    "BUILTIN",
    "Context",
    "Duration",
    "Metric",
    "MetricType",
    "NoData",
    "PluginConfig",
    "PluginError",
    "Share",
    "Size",
    "plugin",
]

BUILTIN = {
    "cpu": "kon_agent.plugins.cpu:Cpu",
    "memory": "kon_agent.plugins.memory:Memory",
    "disk": "kon_agent.plugins.disk:Disk",
    "ebpf": "kon_agent.plugins.ebpf:Ebpf",
    "agent": "kon_agent.plugins.agent:Agent",
    "netdev": "kon_agent.plugins.netdev:Netdev",
    "load": "kon_agent.plugins.load:Load",
    "pressure": "kon_agent.plugins.pressure:Pressure",
    "process": "kon_agent.plugins.process:Process",
    "thermal": "kon_agent.plugins.thermal:Thermal",
    "cgroup": "kon_agent.plugins.cgroup:Cgroup",
    "filesystem": "kon_agent.plugins.filesystem:Filesystem",
    "time": "kon_agent.plugins.time:Time",
    "flows": "kon_agent.plugins.flows:Flows",
    "tcp": "kon_agent.plugins.tcp:Tcp",
    "drops": "kon_agent.plugins.drops:Drops",
    "runqlat": "kon_agent.plugins.runqlat:Runqlat",
    "biolat": "kon_agent.plugins.biolat:Biolat",
    "exec": "kon_agent.plugins.exec:Exec",
}
"""Plugin name to `module:Class`."""
