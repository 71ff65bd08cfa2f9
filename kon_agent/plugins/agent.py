"""The `agent` collector: what Kon-Agent itself costs and how it fares, as its supervisor measured it.

Source: the `telemetry` page (kon_agent.telemetry), written by the supervisor, mapped read-only. Whether the
agent is within its limits and has lost a record can so be seen where its metrics are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kon_agent import telemetry
from kon_agent.config.schema import AgentConfig
from kon_agent.errors import NoData
from kon_agent.lifecycle import State
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageReader
from kon_agent.plugins.context import Context
from kon_agent.telemetry import PluginSample, ProcessSample, Telemetry

GRANT = "telemetry"
CONNECTED = "connected"


class Agent:
    """Report the agent's own processes, plugins, rings and connection."""

    def __init__(self, config: AgentConfig, context: Context) -> None:
        grant = context.grants.get(GRANT)
        self._page = PageReader(grant) if grant is not None else None

    def collect(self) -> Iterable[Metric]:
        """Return the supervisor's latest publication as metrics.

        Raises:
            NoData: nothing has been published yet, or no supervisor is there to publish.
            KonError: the page holds something else.
        """
        published = self._read_telemetry()
        return [
            *_whole(published),
            *_governor(published),
            *(metric for process in published.processes for metric in _process(process)),
            *(metric for plugin in published.plugins for metric in _plugin(plugin)),
        ]

    def _read_telemetry(self) -> Telemetry:
        if self._page is None:
            raise NoData("telemetry is published by a running supervisor only, and none started this collector")
        payload = self._page.read()
        if payload is None:
            raise NoData("the supervisor has published no telemetry yet")
        return telemetry.decode(payload)


def _whole(published: Telemetry) -> Iterator[Metric]:
    processes = published.processes
    yield _metric("agent_uptime_seconds", published.uptime_s)
    yield _metric("agent_cpu_percent", sum(process.cpu_percent for process in processes))
    # PSS, because the sum of RSS counts every shared page once per process.
    yield _metric("agent_pss_bytes", sum(process.pss_bytes for process in processes))
    yield _metric("agent_connected", published.server_state == CONNECTED)


def _governor(published: Telemetry) -> Iterator[Metric]:
    governor = published.governor
    if governor is None:
        return
    yield _metric("agent_governor_level", governor.level)
    yield _metric("agent_governor_period_factor", governor.factor)
    for step, count in governor.steps.items():
        yield _metric("agent_governor_step_total", count, {"step": step})
    for plugin in published.plugins:
        yield _metric("agent_plugin_paused", plugin.name in governor.paused, {"plugin": plugin.name})
    yield _metric("agent_limit_cpu_percent", governor.cpu_limit_percent)
    yield _metric("agent_limit_memory_bytes", governor.memory_limit_bytes)


def _process(process: ProcessSample) -> Iterator[Metric]:
    labels = {"process": process.name}
    yield _metric("agent_process_cpu_percent", process.cpu_percent, labels)
    yield _metric("agent_process_cpu_seconds_total", process.cpu_seconds_total, labels)
    yield _metric("agent_process_pss_bytes", process.pss_bytes, labels)


def _plugin(plugin: PluginSample) -> Iterator[Metric]:
    labels = {"plugin": plugin.name}
    yield _metric("agent_plugin_up", plugin.state == State.RUNNING.name, labels)
    yield _metric("agent_plugin_restarts_total", plugin.restarts, labels)
    yield _metric("agent_collect_duration_seconds", plugin.collect_ms / 1000, labels)
    yield _metric("agent_missed_ticks_total", plugin.missed_ticks, labels)
    yield _metric("agent_ring_used_bytes", plugin.ring_used_bytes, labels)
    yield _metric("agent_ring_size_bytes", plugin.ring_size_bytes, labels)
    yield _metric("agent_records_produced_total", plugin.produced, labels)
    yield _metric("agent_records_acked_total", plugin.acked, labels)
    for reason, count in plugin.dropped.items():
        yield _metric("agent_records_dropped_total", count, {**labels, "reason": reason})


def _metric(name: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    return Metric(name, float(value), labels or {}, MetricType.AGENT_TELEMETRY)
