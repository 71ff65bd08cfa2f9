"""The promises of the status: what the process table knows, in the words of the control socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kon_agent import control_protocol as protocol
from kon_agent.bpf.layout import Interface
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Duration, PluginConfig, Size
from kon_agent.linkreport import LinkReport, LinkState
from kon_agent.ring import Drop
from kon_agent.spoolreport import PluginTally
from kon_agent.supervisor import status
from kon_agent.supervisor.unit import MAX_WAITING_RINGS
from tests.unit.supervisor.fakes import START_NS, Plugin, consume, make_plugin

NOTHING = PluginTally()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    made = make_plugin(monkeypatch, config=PluginConfig(period=Duration(2.0), ring_size=Size(16 * 1024)))
    yield made
    made.release()


def test_a_plugin_that_never_ran_has_nothing_to_show(plugin: Plugin) -> None:
    """No pid, no uptime, no cycle time; the ring it will have."""
    shown = status.plugin_status(plugin.unit, NOTHING, START_NS)
    assert ("STOPPED", True, None, None, None, "") == (
        shown.state,
        shown.enabled,
        shown.pid,
        shown.uptime_s,
        shown.collect_ms,
        shown.detail,
    )
    assert (2.0, 16 * 1024, 0) == (shown.period_s, shown.ring_size_bytes, shown.produced)


def test_a_running_plugin_shows_its_figures(plugin: Plugin) -> None:
    """Its process, its last cycle, and where its records are."""
    plugin.start()
    plugin.producer.publish(b"record")
    plugin.producer.beat(START_NS, 2_500_000, 1)
    shown = status.plugin_status(plugin.unit, NOTHING, START_NS + 3 * NS_PER_S)
    assert plugin.unit.pid == shown.pid
    assert ("RUNNING", 3.0, 2.5, 1) == (shown.state, shown.uptime_s, shown.collect_ms, shown.missed_ticks)
    assert (1, 1, 0) == (shown.produced, shown.in_ring, shown.acked)


def test_a_dead_plugin_says_why_and_when_it_tries_again(plugin: Plugin) -> None:
    """Somebody who looks at the list need not look at the log."""
    plugin.start()
    plugin.producer.say("ImportError: nowhere")
    plugin.die()
    plugin.unit.lifecycle.retry_at_ns = START_NS + 2 * NS_PER_S
    shown = status.plugin_status(plugin.unit, NOTHING, START_NS)
    assert "killed by SIGKILL: ImportError: nowhere; next try in 2.0 s" == shown.detail
    assert shown.last_exit == "killed by SIGKILL: ImportError: nowhere"
    assert "next try in 0.0 s" in status.plugin_status(plugin.unit, NOTHING, START_NS + 9 * NS_PER_S).detail


def test_an_obstacle_is_told_where_the_plugin_is_wanted(plugin: Plugin) -> None:
    """What cannot run says why; what nobody wants says nothing."""
    plugin.unit.obstacle = "needs root"
    assert "needs root" == status.plugin_status(plugin.unit, NOTHING, START_NS).detail
    plugin.unit.is_wanted = False
    assert "" == status.plugin_status(plugin.unit, NOTHING, START_NS).detail


def test_a_plugin_held_back_says_so(plugin: Plugin) -> None:
    """Waiting for the sender is no backoff."""
    for _ in range(MAX_WAITING_RINGS):
        plugin.start()
        plugin.producer.publish(b"record")
        plugin.die()
    assert "until the sender has drained" in status.plugin_status(plugin.unit, NOTHING, START_NS).detail


def test_the_spools_figures_count_as_the_plugins(plugin: Plugin) -> None:
    """What an earlier run left on disk was produced, too; the law holds over ring and spool together."""
    plugin.start()
    for _ in range(5):
        plugin.producer.publish(b"record")
    lane, unmap = consume(plugin.announced[0])
    portion = lane.take(3, 1000, 0)
    assert portion is not None
    lane.shelve(portion)
    unmap()
    tally = PluginTally(pending=4, acked=2, evicted=1)
    shown = status.plugin_status(plugin.unit, tally, START_NS)
    assert (9, 4, 2, 2, 4) == (shown.produced, shown.recovered, shown.acked, shown.in_ring, shown.spooled)
    assert {Drop.SPOOL_EVICTED.name.lower(): 1} == shown.dropped
    total = shown.acked + shown.in_flight + shown.in_ring + shown.spooled + sum(shown.dropped.values())
    assert shown.produced == total


def test_telemetry_tells_the_same(plugin: Plugin) -> None:
    """The agent's own metrics and its status have one source."""
    plugin.start()
    plugin.producer.reject()
    shown = status.plugin_status(plugin.unit, NOTHING, START_NS)
    sample = status.plugin_sample(shown)
    for name in sample.__struct_fields__:
        assert (getattr(shown, name) or 0) == (getattr(sample, name) or 0), name


@pytest.mark.parametrize(
    ("expected", "report"),
    [
        (("quic://first:1", "disconnected", None), LinkReport()),
        (("quic://second:2", "backoff", None), LinkReport(LinkState.BACKOFF, "second:2", rtt_us=5)),
        (("quic://second:2", "connected", 1.5), LinkReport(LinkState.CONNECTED, "second:2", rtt_us=1500)),
        (("quic://second:2", "connected", None), LinkReport(LinkState.CONNECTED, "second:2")),
    ],
    ids=["before the first attempt", "not connected", "connected", "not measured yet"],
)
def test_the_servers_status(expected: tuple[str, str, float | None], report: LinkReport) -> None:
    """Where to, how it stands, and a round trip only while there is one."""
    shown = status.server_status(report, "quic://first:1")
    assert expected == (shown.address, shown.state, shown.rtt_ms)


def test_since_is_a_date_whatever_the_sender_says() -> None:
    """The moment comes from a process that is not trusted: its largest number is still a date."""
    assert "1970-01-01T00:00:01.500+00:00" == status.server_status(LinkReport(since_ns=1_500_000_000), "").since
    assert status.server_status(LinkReport(since_ns=2**64 - 1), "").since.startswith("2554-")


def test_interfaces_are_told_both_ways() -> None:
    """Each direction has its mode, and its reason where it is not the best."""
    [shown] = status.interface_status([Interface(0, 2, "eth0", "generic", "EOPNOTSUPP", "tcx", "")])
    expected = protocol.InterfaceStatus(
        name="eth0", ingress_mode="generic", ingress_reason="EOPNOTSUPP", egress_mode="tcx"
    )
    assert expected == shown


def test_what_a_killed_sender_gave_up_is_counted(plugin: Plugin) -> None:
    """Records that went into the spool and are nowhere any more are losses, not spooled for ever."""
    plugin.start()
    for _ in range(5):
        plugin.producer.publish(b"record")
    lane, unmap = consume(plugin.announced[0])
    portion = lane.take(5, 1000, 0)
    assert portion is not None
    lane.shelve(portion)
    unmap()
    shown = status.plugin_status(plugin.unit, PluginTally(pending=1, acked=1), START_NS)
    assert (5, 1, 1, {"spool_evicted": 3}) == (shown.produced, shown.acked, shown.spooled, shown.dropped)
