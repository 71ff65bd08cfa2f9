"""The promises of a plugin under supervision: its figures never go back, and its rings are neither lost nor leaked."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Duration, ExecConfig, PluginConfig, Size
from kon_agent.lifecycle import State
from kon_agent.ring import Drop, Producer
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.supervisor.unit import MAX_WAITING_RINGS, MIN_DEADLINE_S, START_PATIENCE_S, Figures
from tests.unit.supervisor.fakes import START_NS, Plugin, consume, drain, ended, make_plugin, sent

RING_SIZE = 16 * 1024
CONFIG = PluginConfig(period=Duration(1.0), ring_size=Size(RING_SIZE))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    made = make_plugin(monkeypatch, config=CONFIG)
    yield made
    made.release()


def ring_fds() -> int:
    """Return how many descriptors of rings this process holds."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum("memfd:kon-" in link for link in links)


def accounted(figures: Figures) -> int:
    """Return the right side of the conservation law."""
    return figures.acked + figures.in_flight + figures.in_ring + figures.spooled + sum(figures.dropped.values())


def publish(producer: Producer, count: int) -> None:
    for _ in range(count):
        producer.publish(b"record")


def test_a_worker_gets_a_ring_and_nothing_else(plugin: Plugin) -> None:
    """The sender hears of the ring before the worker can write, and the worker keeps one descriptor: the doorbell."""
    plugin.start()
    assert plugin.unit.ring is not None
    assert [plugin.unit.ring] == plugin.announced
    [role] = plugin.roles
    assert ("kon-agent: worker cpu", 1) == (role.title, len(role.keep_fds))
    assert RING_SIZE == plugin.unit.figures().ring_size_bytes


def test_every_worker_has_a_ring_of_its_own(plugin: Plugin) -> None:
    """A dead one's ring is closed, dismissed, kept, and never given to another."""
    plugin.start()
    plugin.die()
    plugin.start()
    first, second = plugin.announced
    assert [first] == plugin.dismissed
    assert (True, False) == (first.is_closed, second.is_closed)
    assert [first, second] == plugin.unit.rings()
    assert 2 == len({ring.epoch for ring in plugin.unit.rings()})
    assert 2 == len({ring.number for ring in plugin.unit.rings()})


def test_figures_never_go_back(plugin: Plugin) -> None:
    """Dead and drained rings stay in the totals, and the law holds at every step."""
    seen = []

    def look() -> None:
        plugin.unit.settle_rings(START_NS)
        figures = plugin.unit.figures()
        assert figures.produced == accounted(figures)
        seen.append((figures.produced, figures.acked))

    plugin.start()
    publish(plugin.producer, 3)
    look()
    plugin.die()
    look()
    plugin.start()
    publish(plugin.producer, 2)
    look()
    drain(plugin.announced[0])
    look()
    drain(plugin.announced[1])
    look()
    assert [(3, 0), (3, 0), (5, 0), (5, 3), (5, 5)] == seen


def test_losses_stay_in_the_totals_by_reason(plugin: Plugin) -> None:
    """What was dropped in a ring long gone is still accounted for."""
    plugin.start()
    plugin.producer.reject()
    while plugin.producer.publish(b"x" * 1000):
        pass
    plugin.die()
    drain(plugin.announced[0])
    plugin.unit.settle_rings(START_NS)
    assert {"rejected": 1, "ring_full": 1} == plugin.unit.figures().dropped
    assert [] == plugin.unit.rings()


def test_a_drained_ring_is_released(plugin: Plugin) -> None:
    """A worker that dies over and over leaves no descriptor behind."""
    before = ring_fds()
    for _ in range(20):
        plugin.start()
        plugin.die()
        drain(plugin.announced[-1])
        plugin.unit.settle_rings(START_NS)
        plugin.unit.restart(START_NS)
    assert before >= ring_fds()


def test_a_ring_that_is_not_drained_is_kept(plugin: Plugin) -> None:
    """Looking at it does not let go of it."""
    plugin.start()
    publish(plugin.producer, 1)
    plugin.die()
    plugin.unit.settle_rings(START_NS)
    assert plugin.announced == plugin.unit.rings()


def test_too_many_waiting_rings_hold_the_worker_back(plugin: Plugin) -> None:
    """A crash loop without a server holds no more memory than so many rings, and says why nothing runs."""
    now_ns = START_NS
    for _ in range(MAX_WAITING_RINGS):
        assert plugin.unit.is_due(now_ns)
        plugin.start(now_ns)
        publish(plugin.producer, 1)
        plugin.die(now_ns)
        now_ns = plugin.unit.lifecycle.retry_at_ns or 0
    assert plugin.unit.is_held_back
    assert not plugin.unit.is_due(now_ns)
    drain(plugin.announced[0])
    plugin.unit.settle_rings(now_ns)
    assert plugin.unit.is_due(now_ns)


def test_a_worker_whose_ring_is_nonsense_is_replaced(plugin: Plugin) -> None:
    """The sender's verdict ends the worker, and what is counted by then stays."""
    plugin.start()
    publish(plugin.producer, 2)
    lane, unmap = consume(plugin.announced[0])
    lane.fault()
    unmap()
    plugin.unit.settle_rings(START_NS)
    assert [signal.SIGABRT] == sent(plugin.unit.child)
    plugin.die()
    plugin.unit.settle_rings(START_NS)
    figures = plugin.unit.figures()
    assert (2, {Drop.WORKER_CRASH.name.lower(): 2}) == (figures.produced, figures.dropped)
    assert [] == plugin.unit.rings()


def test_a_worker_that_cannot_be_forked_leaves_its_ring_to_be_drained(plugin: Plugin) -> None:
    """The sender was told of the ring: it is told of its end, too, and lets it go."""
    plugin.refusal = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    plugin.unit.spawn(START_NS)
    assert State.BACKOFF is plugin.unit.lifecycle.state
    assert plugin.announced == plugin.dismissed == plugin.unit.rings()
    drain(plugin.announced[0])
    plugin.unit.settle_rings(START_NS)
    assert [] == plugin.unit.rings()


def test_no_memory_for_a_ring_is_a_failure_to_start(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was announced, so nothing is dismissed."""

    def refuse(number: int, name: str, size_bytes: int) -> SharedRing:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("kon_agent.supervisor.unit.SharedRing", refuse)
    plugin.unit.spawn(START_NS)
    assert (State.BACKOFF, []) == (plugin.unit.lifecycle.state, plugin.dismissed)


def test_a_ring_that_cannot_be_made_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a ring is none: its descriptors are given back."""
    before = ring_fds()

    def refuse(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("kon_agent.supervisor.sharedring.reopen_readonly", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        SharedRing(1, "cpu", RING_SIZE)
    assert before >= ring_fds()


@pytest.mark.parametrize(
    ("expected_s", "config"),
    [
        (5.0 + 10.0, PluginConfig(period=Duration(5.0))),
        (0.1 + MIN_DEADLINE_S, PluginConfig(period=Duration(0.1))),
        (1.0 + 3.0, PluginConfig(period=Duration(1.0), deadline=Duration(3.0))),
        (1.0 + 60.0 + 5.0, ExecConfig(command=["/bin/true"], period=Duration(1.0), timeout=Duration(60.0))),
    ],
    ids=["twice the period", "at least", "as configured", "a program may take its time"],
)
def test_patience_follows_the_period(monkeypatch: pytest.MonkeyPatch, expected_s: float, config: PluginConfig) -> None:
    """A worker counts as hung once it is silent for its period and its deadline."""
    plugin = make_plugin(monkeypatch, config=config)
    plugin.start()
    late_ns = START_NS + int(expected_s * NS_PER_S)
    plugin.unit.look(late_ns)
    assert [] == sent(plugin.unit.child)
    plugin.unit.look(late_ns + 1)
    assert [signal.SIGABRT] == sent(plugin.unit.child)
    plugin.release()


def test_a_start_may_take_longer(plugin: Plugin) -> None:
    """Imports and the first cycle have a patience of their own."""
    plugin.unit.spawn(START_NS)
    late_ns = START_NS + int((START_PATIENCE_S + CONFIG.period) * NS_PER_S)
    plugin.unit.look(late_ns)
    assert [] == sent(plugin.unit.child)
    plugin.unit.look(late_ns + 1)
    assert [signal.SIGABRT] == sent(plugin.unit.child)


def test_missed_ticks_add_up_over_workers(plugin: Plugin) -> None:
    """A restart forgets no tick."""
    plugin.start()
    plugin.producer.beat(START_NS, 1, 3)
    plugin.die()
    plugin.start()
    plugin.producer.beat(START_NS, 1, 2)
    assert 5 == plugin.unit.missed_ticks


def test_last_words_come_from_the_ring(plugin: Plugin) -> None:
    """Why a worker crashed is shown with its exit."""
    plugin.start()
    plugin.producer.say("ValueError: no")
    plugin.unit.gone(ended(plugin.unit.child, 70), START_NS)
    assert (plugin.unit.last_exit or "").endswith(": ValueError: no")


def test_disabling_sends_the_polite_signal(plugin: Plugin) -> None:
    """The worker may finish its cycle."""
    plugin.start()
    plugin.unit.stop(START_NS)
    assert [signal.SIGTERM] == sent(plugin.unit.child)
