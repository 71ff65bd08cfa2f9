"""The configuration's shape: every key, its type, its default, its bounds. Data only; `load` reads files into it.

Keys in YAML may use `-` for `_`. Durations are seconds, sizes bytes, CPU shares a fraction of one core.
"""

from __future__ import annotations

import socket
from typing import Annotated, Any, Literal

import msgspec

from kon_agent.catalog import Origin

MIN_PERIOD_S = 0.1  # the original's bound; a shorter period measures the scheduler more than the host


class Duration(float):
    """Seconds; written `100ms`, `5s`, `1m`, `2h`, `7d` or a bare number of seconds."""


class Size(int):
    """Bytes; written `50MB` (10^6), `64KiB` (2^10) or a bare number of bytes."""


class Share(float):
    """A fraction of one core; written `2%` (0.02) or a bare fraction."""


Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class PluginConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every plugin's section takes.

    Attributes:
        enable: whether the plugin runs.
        period: seconds between cycles, at least MIN_PERIOD_S.
        deadline: seconds a cycle may overrun its period before the worker counts as hung and is replaced;
            None: twice the period, at least 5 s.
        ring_size: bytes of the plugin's ring, a power of two from 16 KiB to 64 MiB.
        type: the plugin this section is an instance of; None: the one of the section's own name.
        priority: 0 to 100; where the agent exceeds its limits, plugins of the lowest priority are paused first.
        memory_limit: bytes of memory of its own at which its worker is replaced.
    """

    enable: bool = True
    period: Duration = Duration(5.0)
    deadline: Duration | None = None
    ring_size: Size = Size(256 * 1024)
    type: Text | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=100)] = 50
    memory_limit: Size = Size(64 * 1024 * 1024)


class CpuConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`per_core`: report each core besides the whole machine."""

    per_core: bool = False


class MemoryConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class DiskConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shell patterns of what to leave out, besides the kernel's own pseudo filesystems.

    Attributes:
        exclude_mountpoints: mount points to leave out.
        exclude_devices: block devices to leave out of the I/O counters.
        timeout: seconds one filesystem may take to answer before it is reported as stuck and left alone.
    """

    exclude_mountpoints: list[Text] = []
    exclude_devices: list[Text] = msgspec.field(default_factory=lambda: ["loop*", "ram*"])
    timeout: Duration = Duration(2.0)


class EbpfConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which interfaces are watched, and whether the watching is itself measured.

    Attributes:
        interfaces, exclude: shell patterns of names: watched are those that match `interfaces` and not `exclude`.
        generic: shell patterns of names: to these XDP is attached in the stack, not in the driver. On a veth, whose
            peer a native program takes its segmentation offload from, that quadruples what TCP carries.
        stats: have the kernel measure how long BPF programs run; that costs every BPF program of the machine some
            20 ns per run.
    """

    interfaces: list[Text] = msgspec.field(default_factory=lambda: ["*"])
    exclude: list[Text] = msgspec.field(default_factory=lambda: ["lo"])
    generic: list[Text] = msgspec.field(default_factory=lambda: ["veth*"])
    stats: bool = False
    ring_size: Size = Size(1024 * 1024)  # a cycle of forty interfaces does not fit the common default


class FlowsConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The top talkers on the interfaces that the `ebpf` plugin's section names.

    Attributes:
        top: how many flows are reported each period at most; the rest is summed up.
        memory: bytes of the kernel's table of flows.
        max_series: how many flows that were not reported before may be in any hour.
    """

    top: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    memory: Size = Size(4 * 1024 * 1024)
    max_series: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    ring_size: Size = Size(1024 * 1024)  # a cycle of many flows with IPv6 addresses does not fit the common default


class TcpConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`namespaces`: whose connections count: those of all network namespaces (containers), or of the agent's own."""

    namespaces: Literal["all", "own"] = "all"


class DropsConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`namespaces`: whose packets count: those of all network namespaces (containers), or of the agent's own."""

    namespaces: Literal["all", "own"] = "all"


class RunqlatConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`per_cpu`: a histogram for each CPU, not one for the whole machine."""

    per_cpu: bool = True
    ring_size: Size = Size(1024 * 1024)  # a cycle of a hundred CPUs' histograms does not fit the common default


class BiolatConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`exclude_devices`: shell patterns of block devices to leave out."""

    exclude_devices: list[Text] = msgspec.field(default_factory=lambda: ["loop*", "ram*"])
    ring_size: Size = Size(1024 * 1024)  # a cycle of thirty devices' histograms does not fit the common default


class AgentConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class NetdevConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shell patterns of interface names: reported are those that match `interfaces` and not `exclude`."""

    interfaces: list[Text] = msgspec.field(default_factory=lambda: ["*"])
    exclude: list[Text] = msgspec.field(default_factory=lambda: ["lo"])


class LoadConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class PressureConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class ProcessConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`top`: how many processes are reported by CPU, and how many by memory; the rest is summed up."""

    top: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10


class ThermalConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class CgroupConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which control groups are reported.

    Attributes:
        include, exclude: shell patterns of paths below the hierarchy's root, such as `/system.slice/*`.
        max_cgroups: no more than so many are reported, those first that are nearest to the root.
    """

    include: list[Text] = msgspec.field(default_factory=lambda: ["*"])
    exclude: list[Text] = []
    max_cgroups: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    ring_size: Size = Size(1024 * 1024)  # a cycle of 100 groups with long paths does not fit the common default


class FilesystemConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`exclude_mountpoints`: shell patterns of mount points to leave out."""

    exclude_mountpoints: list[Text] = []


class TimeConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing beyond the common keys."""


class ExecConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program that prints metrics.

    Attributes:
        command: the program, an absolute path, and its arguments; no shell is involved.
        format: what it prints: the Prometheus text format, or InfluxDB's line protocol.
        mode: `oneshot`: run once each period, to its end; `stream`: run all the time, each line taken as it comes.
        timeout: seconds a oneshot run may take; None: the period.
        execute: other programs that this one may run, absolute paths; nothing else can be.
        read: files and folders it reads besides the system's.
        environment: its environment besides PATH and LANG.
    """

    command: list[Text]
    format: Literal["prometheus", "influx"] = "prometheus"
    mode: Literal["oneshot", "stream"] = "oneshot"
    timeout: Duration | None = None
    execute: list[Text] = []
    read: list[Text] = []
    environment: dict[str, str] = {}


class ForeignConfig(PluginConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plugin that is not built in; what its own keys mean is for its own code to say, in its own process.

    Attributes:
        origin: where its code is.
        options: the section as it is written, plain values; of which its worker makes the plugin's own configuration.
        reads: files and folders it has declared to read.
        has_network: whether it has declared to use the network.
        obstacle: why it cannot run; empty: it can.
    """

    origin: Origin
    options: dict[str, Any] = {}
    reads: tuple[str, ...] = ()
    has_network: bool = False
    obstacle: str = ""


class PluginsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The built-in plugins: of those left out the first five run with their defaults. One that is named runs.

    Attributes:
        instances: sections with a `type`, and those of plugins that are not built in, by their own names.
    """

    cpu: CpuConfig = CpuConfig()
    memory: MemoryConfig = MemoryConfig()
    disk: DiskConfig = DiskConfig()
    ebpf: EbpfConfig = EbpfConfig()
    agent: AgentConfig = AgentConfig()
    netdev: NetdevConfig = NetdevConfig(enable=False)
    load: LoadConfig = LoadConfig(enable=False)
    pressure: PressureConfig = PressureConfig(enable=False)
    process: ProcessConfig = ProcessConfig(enable=False)
    thermal: ThermalConfig = ThermalConfig(enable=False)
    cgroup: CgroupConfig = CgroupConfig(enable=False)
    filesystem: FilesystemConfig = FilesystemConfig(enable=False)
    time: TimeConfig = TimeConfig(enable=False)
    flows: FlowsConfig = FlowsConfig(enable=False)
    tcp: TcpConfig = TcpConfig(enable=False)
    drops: DropsConfig = DropsConfig(enable=False)
    runqlat: RunqlatConfig = RunqlatConfig(enable=False)
    biolat: BiolatConfig = BiolatConfig(enable=False)
    instances: dict[str, PluginConfig] = {}

    def by_name(self) -> dict[str, PluginConfig]:
        """Return each plugin's section under the plugin's name."""
        return {name: getattr(self, name) for name in BUILTIN_SECTIONS} | self.instances


BUILTIN_SECTIONS: dict[str, type[PluginConfig]] = {
    field.name: field.type for field in msgspec.structs.fields(PluginsConfig) if field.name != "instances"
}
"""The built-in plugins that need no `type`, and their sections."""

TYPES: dict[str, type[PluginConfig]] = {**BUILTIN_SECTIONS, "exec": ExecConfig}
"""What `type` may name, besides plugins that are not built in."""

SINGLE = frozenset({"ebpf", "agent", "flows", "tcp", "drops", "runqlat", "biolat"})
"""Those of which there is one at most: it reports on what the supervisor has one of."""

MAX_PLUGINS = 48  # slots of the spool's report (64), with room for some that are added and removed at run time
"""How many plugins a configuration may have."""


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk spool: where, how much, how long, and how much of the disk it must leave free."""

    path: Text = "/var/lib/kon-agent/spool"
    max_size: Size = Size(50_000_000)
    max_age: Duration = Duration(7 * 86400.0)
    min_free: Size = Size(64_000_000)


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom we trust and who we are. Without `ca` the system's trust store decides.

    Attributes:
        ca: PEM file of the authorities a server certificate must chain to.
        cert, key: PEM files of our own certificate (with its chain) and key, for mutual TLS.
        token_file: file with the token that authenticates this agent where there is no certificate.
        server_name: the name the server's certificate must carry, where it is not the host connected to.
        insecure_skip_verify: accept any server certificate, as the original does. For tests only.
    """

    ca: Text | None = None
    cert: Text | None = None
    key: Text | None = None
    token_file: Text | None = None
    server_name: Text | None = None
    insecure_skip_verify: bool = False


class BatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch leaves when its oldest record is `max_age` old, or when it is full."""

    max_age: Duration = Duration(1.0)
    max_records: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    max_bytes: Size = Size(64 * 1024)


class ControlConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The control socket, and the group (besides root) that may change things through it."""

    socket: Text = "/run/kon-agent/control.sock"
    group: Text = "kon-agent"


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the whole process tree may use."""

    cpu: Share = Share(0.02)
    memory: Size = Size(192 * 1024 * 1024)


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is said on stderr, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        server: `quic://host:port`, or several in order of preference.
        client_id: the agent's identity at the receiver; the host name unless given.
        plugin_dir: folder of plugins that are single files.
        shutdown_timeout: seconds a stopping agent takes at most to deliver what it holds.
    """

    server: Text | list[Text] = "quic://localhost:7843"
    client_id: Text = msgspec.field(default_factory=socket.gethostname)
    plugins: PluginsConfig = PluginsConfig()
    plugin_dir: Text = "/etc/kon-agent/plugins.d"
    cache: CacheConfig = CacheConfig()
    tls: TlsConfig = TlsConfig()
    batch: BatchConfig = BatchConfig()
    control: ControlConfig = ControlConfig()
    user: Text = "kon-agent"
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()
    shutdown_timeout: Duration = Duration(5.0)

    def servers(self) -> list[str]:
        """Return the servers as a list, in order of preference."""
        return [self.server] if isinstance(self.server, str) else list(self.server)
