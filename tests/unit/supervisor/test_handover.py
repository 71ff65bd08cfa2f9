"""What is handed over arrives whole: the state as it was, the descriptors that are named, the memory behind them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kon_agent import linkreport, spoolreport
from kon_agent.bpf.handover import Counters, Slot, Watched
from kon_agent.bpf.layout import Interface
from kon_agent.config.schema import CacheConfig, Config, Duration, PluginConfig
from kon_agent.errors import KonError
from kon_agent.lifecycle import State
from kon_agent.page import page_size
from kon_agent.supervisor import child as child_module
from kon_agent.supervisor import handover
from kon_agent.supervisor.handover import FORMAT, Connection, Handover, Life, Ring, Sender
from kon_agent.supervisor.sharedpage import SharedPage
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.supervisor.unit import Unit
from tests.unit.supervisor.fakes import START_NS, FakePidFd, Plugin, make_plugin

LIFE = Life(
    pid=4711,
    state=State.RUNNING,
    restarts=2,
    deaths=[(1, "killed by SIGKILL")],
    last_exit="killed by SIGKILL",
    started_ns=3,
)
RING = Ring(
    number=7, plugin="cpu", size_bytes=65536, epoch=(1 << 64) - 1, is_closed=False, producer_fd=20, consumer_fd=21
)
SENDER = Sender(
    life=LIFE,
    orders_fd=10,
    link_page_fd=11,
    link_bytes=linkreport.REPORT_BYTES,
    spool_page_fd=12,
    spool_bytes=spoolreport.REPORT_BYTES,
    gone_wall_ns=5,
)
PLUGIN = handover.Plugin(
    name="cpu",
    kind="cpu",
    life=LIFE,
    is_wanted=True,
    was_enabled=True,
    period_s=0.5,
    was_period_s=5.0,
    orders_fd=13,
    rings=[RING],
    has_current=True,
    totals={"produced": 9, "acked": 9},
    missed_ticks=1,
)
COUNTERS = Counters(
    digest="0f",
    fds={"counters": 14, "interfaces": 15},
    watched=[
        Watched(
            attachment=Interface(0, 3, "eth0", "native", "", "tcx", ""),
            slot=Slot(number=0, ifindex=3, name=b"eth0", base=[1, 2]),
            link_fds=[16, 17],
        )
    ],
    free=[Slot(number=1, ifindex=0, name=b"\xff")],
    buckets={3: [b"\0\1", b"\xff\0"]},
)
ALL = Handover(
    format=FORMAT,
    version="1.2.3",
    started_ns=6,
    next_ring=8,
    doorbell_fd=18,
    listener_fd=19,
    asking_fd=22,
    connections=[Connection(fd=23, received=b'{"op"')],
    slots=["cpu", "memory"],
    plugins=[PLUGIN],
    sender=SENDER,
    counters=COUNTERS,
    kept=handover.kept_settings(Config()),
)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def stored(data: Any) -> Iterator[int]:
    """Yield a descriptor that holds `data` as JSON."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, msgspec.json.encode(data))
    yield fd
    os.close(fd)


# ── the state ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_state_arrives_as_it_was() -> None:
    """What is loaded is what was stored, to the last descriptor and the last bit of an epoch."""
    fd = handover.store(ALL)
    assert ALL == handover.load(fd)
    os.close(fd)


def test_every_descriptor_is_named() -> None:
    """Whatever field holds a descriptor is among those that are inherited."""
    assert sorted(range(10, 24)) == sorted(ALL.descriptors())


def test_another_format_is_refused() -> None:
    """The message says who speaks which format, and what to do."""
    fd = handover.store(msgspec.structs.replace(ALL, format=FORMAT + 1, version="9.9"))
    with pytest.raises(KonError, match=rf"kon-agent 9\.9 hands over in format {FORMAT + 1}.*restart the agent"):
        handover.load(fd)
    os.close(fd)


@pytest.mark.parametrize("data", ["nonsense", {"format": FORMAT}, {"version": "1"}, []])
def test_nonsense_is_refused(data: object) -> None:
    """What cannot be a handover is an error of ours, not a crash."""
    for fd in stored(data):
        with pytest.raises(KonError, match="restart the agent"):
            handover.load(fd)


def test_either_side_may_be_newer() -> None:
    """A field this version does not know is ignored, one the other did not know has its default."""
    data = msgspec.json.decode(msgspec.json.encode(ALL))
    data["invented_later"] = data["plugins"][0]["invented_later"] = 1
    del data["plugins"][0]["missed_ticks"], data["counters"], data["plugins"][0]["life"]["kill_reason"]
    for fd in stored(data):
        assert (0, None) == (handover.load(fd).plugins[0].missed_ticks, handover.load(fd).counters)


def test_a_state_unknown_here_is_refused() -> None:
    """A lifecycle the new code does not know could not be gone on with."""
    data = msgspec.json.decode(msgspec.json.encode(ALL))
    data["plugins"][0]["life"]["state"] = "DREAMING"
    for fd in stored(data):
        with pytest.raises(KonError, match="DREAMING"):
            handover.load(fd)


def test_what_cannot_change_is_compared() -> None:
    """The spool, the socket and the user are what they were, or it takes a restart."""
    handover.check(ALL, Config())
    with pytest.raises(KonError, match=r"cache\.path \(/var/lib/kon-agent/spool -> /elsewhere\)"):
        handover.check(ALL, Config(cache=CacheConfig(path="/elsewhere")))


def test_reports_of_another_form_take_a_restart() -> None:
    """The new sender must be able to read where its predecessor has come."""
    other = msgspec.structs.replace(SENDER, spool_bytes=SENDER.spool_bytes + 8)
    with pytest.raises(KonError, match="restart"):
        handover.check(msgspec.structs.replace(ALL, sender=other), Config())


# ── the change ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (["python", "-m", "kon_agent.cli.agent", "run"], ["-m", "kon_agent.cli.agent", "run"]),
        (
            ["/opt/bin/python", "-I", "/opt/bin/kon-agent", "run", "-c", "x"],
            ["-I", "/opt/bin/kon-agent", "run", "-c", "x"],
        ),
        (["/opt/bin/python", "/opt/bin/kon-agent", "run", "--take-over", "9"], ["/opt/bin/kon-agent", "run"]),
    ],
)
def test_the_command_is_the_one_it_was_started_with(
    monkeypatch: pytest.MonkeyPatch, before: list[str], kept: list[str]
) -> None:
    """Same interpreter by its full name, same arguments, whether a module, a script, or one that was upgraded."""
    monkeypatch.setattr(sys, "orig_argv", before)
    assert [sys.executable, *kept] == handover.command()
    assert [sys.executable, *kept, "--take-over", "5"] == handover.command(5)
    assert [sys.executable, *kept, "--take-over", "5", "--rehearse"] == handover.command(5, is_rehearsal=True)


def test_where_it_cannot_be_executed_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the named descriptors, and they alone, are inherited; after a failure none is, and no other is open."""
    named, other = os.pipe2(os.O_CLOEXEC)
    monkeypatch.setattr(Handover, "descriptors", lambda self: iter([named]))
    before, seen = open_descriptors(), []

    def refuse(path: str, argv: list[str], environment: object) -> None:
        seen.append((os.get_inheritable(named), os.get_inheritable(other), os.get_inheritable(int(argv[-1]))))
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "execve", refuse)
    with pytest.raises(FileNotFoundError):
        handover.execute(ALL)
    assert [(True, False, True)] == seen
    assert (False, before) == (os.get_inheritable(named), open_descriptors())
    os.close(named)
    os.close(other)


def test_what_is_received_is_inherited_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once taken over, a descriptor is no child's, and the memory that named it is gone."""
    named, other = os.pipe()
    os.set_inheritable(named, True)
    monkeypatch.setattr(Handover, "descriptors", lambda self: iter([named]))
    before = open_descriptors()
    assert ALL == handover.receive(handover.store(ALL))
    assert (False, before) == (os.get_inheritable(named), open_descriptors())
    os.close(named)
    os.close(other)


# ── the memory ────────────────────────────────────────────────────────────────────────────────────────────────────


def duplicated(ring: Ring) -> Ring:
    """Return the ring with descriptors of its own, as in another process."""
    return msgspec.structs.replace(ring, producer_fd=os.dup(ring.producer_fd), consumer_fd=os.dup(ring.consumer_fd))


def test_a_ring_is_the_same_ring() -> None:
    """Who adopts a ring sees what was and what will be published, and lets go of all of it."""
    before = open_descriptors()
    ring = SharedRing(3, "cpu", 16384)
    producer = ring.map_producer()
    producer.publish(b"one")
    adopted = SharedRing.adopt(duplicated(ring.capture()))
    producer.publish(b"two")
    assert (3, "cpu", ring.epoch, False) == (adopted.number, adopted.plugin, adopted.epoch, adopted.is_closed)
    assert (2, ring.observer.stats()) == (adopted.observer.stats().produced, adopted.observer.stats())
    adopted.map_producer()  # can be written, as by a worker
    adopted.release()
    ring.release()
    assert before == open_descriptors()


def test_what_is_no_such_ring_is_refused() -> None:
    """Areas of another size would be read beyond their end."""
    ring = SharedRing(3, "cpu", 16384)
    with pytest.raises(KonError, match="ring 3 of cpu"):
        SharedRing.adopt(msgspec.structs.replace(ring.capture(), size_bytes=32768))
    ring.release()


def test_a_page_keeps_its_value() -> None:
    """Who takes a page over reads what was and what will be published; one of another size is refused."""
    before = open_descriptors()
    page, other = SharedPage("old", 8), SharedPage("new", 8)
    page.writer.publish(b"one")
    other.take_over(os.dup(page.fd))
    assert b"one" == other.reader.read()
    page.writer.publish(b"two")
    assert b"two" == other.reader.read()
    longer = SharedPage("longer", 64)
    with pytest.raises(KonError, match=f"{page_size(8)} bytes"):
        longer.take_over(page.fd)
    for each in (page, other, longer):
        each.release()
    assert before == open_descriptors()


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    """Return a plugin with a running worker; processes that are adopted are not there."""
    monkeypatch.setattr(child_module, "PidFd", lambda pid: FakePidFd())
    plugin = make_plugin(monkeypatch)
    plugin.start()
    yield plugin
    plugin.release()


def successor(old: Plugin, config: PluginConfig | None = None) -> Unit:
    """Return a unit that has taken over from `old`."""
    taken = old.unit.capture()
    taken = msgspec.structs.replace(
        taken, rings=[duplicated(ring) for ring in taken.rings], orders_fd=os.dup(taken.orders_fd)
    )
    unit = Unit("cpu", "module:Class", config or PluginConfig(), old.unit._around)
    unit.adopt(taken)
    return unit


def test_a_plugin_goes_on(old: Plugin) -> None:
    """Process, state, rings and figures are those it had; the restart counts as none."""
    old.die()
    old.start()
    for _ in range(3):
        old.producer.publish(b"record")
    old.producer.beat(START_NS, 1, 2)
    unit = successor(old)
    assert (old.unit.pid, State.RUNNING, 1) == (unit.pid, unit.lifecycle.state, unit.lifecycle.restarts)
    assert old.unit.figures() == unit.figures()
    assert [ring.number for ring in old.unit.rings()] == [ring.number for ring in unit.rings()]
    assert (2, old.unit.last_exit) == (unit.missed_ticks, unit.last_exit)
    assert old.unit.deaths == unit.deaths
    unit.release()


def test_what_rests_is_tried_at_once(old: Plugin) -> None:
    """New code may be the cure for what the old one died of: neither a wait nor an open breaker is taken over."""
    for _ in range(5):
        old.die()
        old.start()
    old.die()
    unit = successor(old)
    assert (State.FAILED, False) == (old.unit.lifecycle.state, old.unit.is_due(START_NS))
    assert (State.STOPPED, True, "closed") == (unit.lifecycle.state, unit.is_due(START_NS), unit.lifecycle.breaker)
    assert old.unit.lifecycle.restarts == unit.lifecycle.restarts
    unit.release()


def test_what_was_changed_by_hand_stays(old: Plugin) -> None:
    """A period that was set and a plugin that was disabled by command are the same afterwards."""
    old.unit.set_period(0.25)
    old.unit.is_wanted = False
    unit = successor(old)
    assert (0.25, False) == (unit.period_s, unit.is_wanted)
    unit.release()


def test_a_changed_configuration_goes_before(old: Plugin) -> None:
    """Where the file says something else than before, it is newer than what was done by hand."""
    old.unit.set_period(0.25)
    unit = successor(old, PluginConfig(period=Duration(7.0), enable=False))
    assert (7.0, False) == (unit.period_s, unit.is_wanted)
    unit.release()
