"""The agent's telemetry: what the supervisor publishes about processes and plugins, for `agent` to report.

The supervisor alone may read other processes' figures; it writes a `Telemetry` as JSON into a `page`, which
the worker of the `agent` plugin has mapped read-only.
"""

from __future__ import annotations

import msgspec

from kon_agent.errors import KonError

MAX_TELEMETRY_BYTES = 64 * 1024  # about 300 bytes a plugin and 150 a process: room for over a hundred plugins


class ProcessSample(msgspec.Struct, frozen=True):
    """One process of the tree.

    Attributes:
        name: its role: `supervisor`, `sender`, `worker cpu`.
        pid: its process id.
        cpu_seconds_total: user and system time it has used, seconds.
        cpu_percent: the same over the supervisor's last interval, percent of one core.
        pss_bytes: its proportional share of memory (proc(5), smaps_rollup).
    """

    name: str
    pid: int
    cpu_seconds_total: float
    cpu_percent: float
    pss_bytes: int


class PluginSample(msgspec.Struct, frozen=True):
    """One plugin.

    Attributes:
        name: its name.
        state: its lifecycle state's name, `RUNNING` and so on.
        produced, acked: records since the supervisor started.
        dropped: records lost on purpose, by reason.
        restarts: how often its worker was replaced.
        ring_used_bytes, ring_size_bytes: its ring.
        collect_ms: how long its last cycle took, milliseconds.
        missed_ticks: cycles skipped because one before overran.
    """

    name: str
    state: str
    produced: int
    acked: int
    dropped: dict[str, int]
    restarts: int
    ring_used_bytes: int
    ring_size_bytes: int
    collect_ms: float
    missed_ticks: int


class GovernorSample(msgspec.Struct, frozen=True):
    """What is done to keep the tree within its limits.

    Attributes:
        level: 0 nothing, 1 periods doubled, 2 periods times four, 3 plugins paused.
        factor: of the periods.
        paused: plugins that are paused.
        steps: how many were taken since the supervisor started, by kind.
        cpu_limit_percent: the limit, percent of one core.
        memory_limit_bytes: the limit, bytes.
    """

    level: int
    factor: int
    paused: list[str]
    steps: dict[str, int]
    cpu_limit_percent: float
    memory_limit_bytes: int


class Telemetry(msgspec.Struct, frozen=True):
    """One publication.

    Attributes:
        uptime_s: seconds since the supervisor started.
        processes: every process of the tree, the supervisor included.
        plugins: every plugin, running or not.
        server_state: the sender's connection, `connected` and so on.
        governor: what is done about the limits; None from a supervisor that has no governor.
    """

    uptime_s: float
    processes: list[ProcessSample]
    plugins: list[PluginSample]
    server_state: str
    governor: GovernorSample | None = None


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Telemetry)


def encode(telemetry: Telemetry) -> bytes:
    """Return the publication's bytes."""
    return _ENCODER.encode(telemetry)


def decode(payload: bytes) -> Telemetry:
    """Return the publication in `payload`.

    Raises:
        KonError: it is not one.
    """
    try:
        return _DECODER.decode(payload)
    except msgspec.MsgspecError as err:
        raise KonError(
            f"the telemetry page ({len(payload)} bytes) holds no telemetry: {err}; "
            "supervisor and worker must be of the same version, restart the agent"
        ) from err
