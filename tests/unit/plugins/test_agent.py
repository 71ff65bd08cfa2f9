"""The agent collector's promises."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from kon_agent import telemetry
from kon_agent.config.schema import AgentConfig
from kon_agent.errors import KonError, NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins.agent import Agent
from kon_agent.plugins.context import Context
from kon_agent.telemetry import GovernorSample, PluginSample, ProcessSample, Telemetry

PUBLISHED = Telemetry(
    uptime_s=12.5,
    processes=[
        ProcessSample("supervisor", 10, 1.5, 0.25, 1000),
        ProcessSample("worker cpu", 11, 0.5, 0.125, 500),
    ],
    plugins=[
        PluginSample(
            name="cpu",
            state="RUNNING",
            produced=100,
            acked=90,
            dropped={"ring_full": 3, "worker_crash": 1},
            restarts=2,
            ring_used_bytes=64,
            ring_size_bytes=4096,
            collect_ms=2.5,
            missed_ticks=4,
        )
    ],
    server_state="connected",
)

Series = dict[tuple[str, tuple[str, ...]], float]


class Published:
    """A telemetry page and the collector that reads it."""

    def __init__(self) -> None:
        memory = memoryview(bytearray(page_size(telemetry.MAX_TELEMETRY_BYTES)))
        self.page = PageWriter(memory)
        self.agent = Agent(AgentConfig(), Context(grants={"telemetry": memory.toreadonly()}))

    def collect(self, published: Telemetry) -> list[Metric]:
        """Publish and collect."""
        self.page.publish(telemetry.encode(published))
        return list(self.agent.collect())


def series(metrics: list[Metric]) -> Series:
    """Return the values by name and label values."""
    return {(metric.name, tuple(metric.labels.values())): metric.value for metric in metrics}


def test_everything_published_is_reported() -> None:
    """Each figure of the telemetry becomes the metric that carries its name, seconds for milliseconds."""
    assert {
        ("agent_uptime_seconds", ()): 12.5,
        ("agent_cpu_percent", ()): 0.375,
        ("agent_pss_bytes", ()): 1500.0,
        ("agent_connected", ()): 1.0,
        ("agent_process_cpu_percent", ("supervisor",)): 0.25,
        ("agent_process_cpu_seconds_total", ("supervisor",)): 1.5,
        ("agent_process_pss_bytes", ("supervisor",)): 1000.0,
        ("agent_process_cpu_percent", ("worker cpu",)): 0.125,
        ("agent_process_cpu_seconds_total", ("worker cpu",)): 0.5,
        ("agent_process_pss_bytes", ("worker cpu",)): 500.0,
        ("agent_plugin_up", ("cpu",)): 1.0,
        ("agent_plugin_restarts_total", ("cpu",)): 2.0,
        ("agent_collect_duration_seconds", ("cpu",)): 0.0025,
        ("agent_missed_ticks_total", ("cpu",)): 4.0,
        ("agent_ring_used_bytes", ("cpu",)): 64.0,
        ("agent_ring_size_bytes", ("cpu",)): 4096.0,
        ("agent_records_produced_total", ("cpu",)): 100.0,
        ("agent_records_acked_total", ("cpu",)): 90.0,
        ("agent_records_dropped_total", ("cpu", "ring_full")): 3.0,
        ("agent_records_dropped_total", ("cpu", "worker_crash")): 1.0,
    } == series(Published().collect(PUBLISHED))


@pytest.mark.parametrize(("state", "up"), [("RUNNING", 1.0), ("BACKOFF", 0.0), ("FAILED", 0.0)])
def test_a_plugin_is_up_while_it_runs(state: str, up: float) -> None:
    """agent_plugin_up is 1 in RUNNING and 0 in every other state."""
    plugin = msgspec.structs.replace(PUBLISHED.plugins[0], state=state)
    published = msgspec.structs.replace(PUBLISHED, plugins=[plugin])
    assert up == series(Published().collect(published))["agent_plugin_up", ("cpu",)]


def test_the_governor_is_reported() -> None:
    """Its level, its steps by kind, who is paused, and the limits."""
    governor = GovernorSample(3, 2, ["cpu"], {"pause": 1, "resume": 0}, 2.0, 1024)
    found = series(Published().collect(msgspec.structs.replace(PUBLISHED, governor=governor)))
    assert {
        ("agent_governor_level", ()): 3.0,
        ("agent_governor_period_factor", ()): 2.0,
        ("agent_governor_step_total", ("pause",)): 1.0,
        ("agent_governor_step_total", ("resume",)): 0.0,
        ("agent_plugin_paused", ("cpu",)): 1.0,
        ("agent_limit_cpu_percent", ()): 2.0,
        ("agent_limit_memory_bytes", ()): 1024.0,
    } == {key: value for key, value in found.items() if key not in series(Published().collect(PUBLISHED))}


def test_a_lost_connection_shows() -> None:
    """agent_connected is 0 in any other server state than connected."""
    published = msgspec.structs.replace(PUBLISHED, server_state="connecting")
    assert 0.0 == series(Published().collect(published))["agent_connected", ()]


def test_the_latest_publication_counts() -> None:
    """A later publication replaces the earlier one."""
    published = Published()
    published.collect(PUBLISHED)
    later = msgspec.structs.replace(PUBLISHED, uptime_s=13.5)
    assert 13.5 == series(published.collect(later))["agent_uptime_seconds", ()]


def test_every_metric_is_agent_telemetry() -> None:
    """All metrics carry the wire's AGENT_TELEMETRY type and a float."""
    assert {(MetricType.AGENT_TELEMETRY, float)} == {
        (metric.type, type(metric.value)) for metric in Published().collect(PUBLISHED)
    }


def test_nothing_published_yet_is_no_data() -> None:
    """Before the first publication there is nothing to collect."""
    with pytest.raises(NoData, match="yet"):
        Published().agent.collect()


@pytest.mark.parametrize("grants", [{}, {"counters": memoryview(b"")}])
def test_without_a_supervisor_is_no_data(grants: Mapping[str, memoryview]) -> None:
    """A collector nobody gave a telemetry page has nothing to collect."""
    with pytest.raises(NoData, match="supervisor"):
        Agent(AgentConfig(), Context(grants=grants)).collect()


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"uptime_s": "long"}'])
def test_a_page_of_something_else_is_refused(payload: bytes) -> None:
    """A payload that is no telemetry is an error that says so, not a crash somewhere inside."""
    published = Published()
    published.page.publish(payload)
    with pytest.raises(KonError, match="telemetry page"):
        published.agent.collect()


def test_a_hundred_plugins_fit_the_page() -> None:
    """MAX_TELEMETRY_BYTES holds a hundred plugins with every drop reason, and their processes."""
    reasons = ("ring_full", "spool_evicted", "spool_corrupt", "worker_crash", "rejected", "expired")
    plugin = msgspec.structs.replace(
        PUBLISHED.plugins[0],
        name="p" * 32,
        dropped=dict.fromkeys(reasons, 2**40),
        produced=2**40,
        acked=2**40,
    )
    process = ProcessSample("worker " + "p" * 32, 4_000_000, 123456.789012, 12.345678, 2**32)
    published = msgspec.structs.replace(PUBLISHED, plugins=[plugin] * 100, processes=[process] * 102)
    assert telemetry.MAX_TELEMETRY_BYTES >= len(telemetry.encode(published))
