"""The supervisor's state in the words of the control socket and of the agent's own telemetry. Pure."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable

from kon_agent.bpf.layout import Interface
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ForeignConfig
from kon_agent.control_protocol import Death, InterfaceStatus, PluginStatus, ServerStatus, SpoolStatus
from kon_agent.lifecycle import State
from kon_agent.linkreport import LinkReport, LinkState
from kon_agent.spoolreport import PluginTally, SpoolReport
from kon_agent.supervisor.unit import Unit
from kon_agent.telemetry import PluginSample


def plugin_status(unit: Unit, in_spool: PluginTally, now_ns: int) -> PluginStatus:
    """Return one plugin's status.

    The spool may hold records of earlier runs; they were produced by this agent too, and count from the start. What
    went into it and is nowhere any more was given up by a sender that was killed before it could say so: most likely
    evicted; the receiver's ledger has the reason.
    """
    figures, pulse = unit.figures(), unit.pulse()
    of_spool = in_spool.pending + in_spool.acked + sum(in_spool.drops().values())
    recovered = max(0, of_spool - figures.spooled)
    untold = max(0, figures.spooled - of_spool)
    dropped = Counter(figures.dropped) + Counter(in_spool.drops()) + Counter(spool_evicted=untold)
    is_alive = unit.child is not None
    return PluginStatus(
        name=unit.plugin,
        state=unit.lifecycle.state.value,
        enabled=unit.is_wanted,
        pid=unit.pid,
        period_s=unit.period_s,
        restarts=unit.lifecycle.restarts,
        last_exit=unit.last_exit,
        breaker=unit.lifecycle.breaker,
        produced=figures.produced + recovered,
        recovered=recovered,
        acked=figures.acked + in_spool.acked,
        in_flight=figures.in_flight,
        in_ring=figures.in_ring,
        spooled=in_spool.pending,
        dropped=dict(dropped),
        ring_used_bytes=figures.ring_used_bytes,
        ring_size_bytes=figures.ring_size_bytes,
        collect_ms=pulse.collect_ns / 1e6 if pulse.cycles else None,
        missed_ticks=unit.missed_ticks,
        uptime_s=(now_ns - unit.started_ns) / NS_PER_S if is_alive else None,
        detail=_detail(unit, now_ns),
        type=unit.config.type or unit.plugin,
        origin=_origin(unit),
        configured_period_s=float(unit.config.period),
        priority=unit.config.priority,
        memory_limit_bytes=int(unit.config.memory_limit),
        rate_per_s=unit.pace.per_s if is_alive else None,
        deaths=[Death(when=_rfc3339(wall_ns), reason=reason) for wall_ns, reason in unit.deaths],
    )


def _origin(unit: Unit) -> str:
    return str(unit.config.origin) if isinstance(unit.config, ForeignConfig) else "built-in"


def _rfc3339(wall_ns: int) -> str:
    return datetime.datetime.fromtimestamp(wall_ns / NS_PER_S, datetime.UTC).isoformat(timespec="milliseconds")


def _detail(unit: Unit, now_ns: int) -> str:
    if unit.obstacle and unit.is_wanted:
        return unit.obstacle
    if unit.pause_reason and unit.is_wanted:
        return unit.pause_reason
    if unit.is_held_back:
        return "not restarted until the sender has drained the rings of the workers before it"
    state = unit.lifecycle.state
    if state in (State.BACKOFF, State.FAILED) and unit.lifecycle.retry_at_ns is not None:
        wait_s = max(0.0, (unit.lifecycle.retry_at_ns - now_ns) / NS_PER_S)
        return f"{unit.last_exit}; next try in {wait_s:.1f} s"
    return ""


def plugin_sample(status: PluginStatus) -> PluginSample:
    """Return what telemetry reports of a plugin."""
    return PluginSample(
        name=status.name,
        state=status.state,
        produced=status.produced,
        acked=status.acked,
        dropped=status.dropped,
        restarts=status.restarts,
        ring_used_bytes=status.ring_used_bytes,
        ring_size_bytes=status.ring_size_bytes,
        collect_ms=status.collect_ms or 0.0,
        missed_ticks=status.missed_ticks,
    )


def server_status(report: LinkReport, first_server: str) -> ServerStatus:
    """Return the connection's status; before the first attempt it is about the preferred server."""
    return ServerStatus(
        address=f"quic://{report.address}" if report.address else first_server,
        state=report.state.name.lower(),
        since=_rfc3339(report.since_ns),
        rtt_ms=report.rtt_us / 1000 if report.state is LinkState.CONNECTED and report.rtt_us else None,
        detail=report.detail,
    )


def spool_status(report: SpoolReport, max_bytes: int, wall_s: float) -> SpoolStatus:
    """Return the spool's status."""
    return SpoolStatus(
        bytes=report.disk_bytes,
        max_bytes=max_bytes,
        segments=report.segments,
        records=report.records,
        oldest_age_s=max(0.0, wall_s - report.oldest_s) if report.oldest_s else None,
        mode=report.mode.name.lower(),
        detail=report.detail,
    )


def interface_status(interfaces: Iterable[Interface]) -> list[InterfaceStatus]:
    """Return how each watched interface is attached."""
    return [
        InterfaceStatus(
            name=interface.name,
            ingress_mode=interface.ingress_mode,
            ingress_reason=interface.ingress_reason,
            egress_mode=interface.egress_mode,
            egress_reason=interface.egress_reason,
        )
        for interface in interfaces
    ]
