"""The command `tap`: what it shows, what it says it could not show, and what it leaves behind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kon_agent.cli.tap import Stream, TappedRecord, Taps, line
from kon_agent.control_protocol import RingPlace, Tapping
from kon_agent.errors import ControlError, RingError
from kon_agent.linux.memory import map_memory
from kon_agent.metric import Metric
from kon_agent.receiver.reader import StoredRecord
from kon_agent.ring import CONSUMER_BYTES, Consumer, Producer, Tally, producer_bytes
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.tapping import MARGIN_BYTES
from kon_agent.wire.encode import encode_record

SIZE = 16 * 1024
TS_NS = 1_700_000_000_123_456_789


class Worker:
    """A worker's ring, its producer, and a sender that has everything acknowledged."""

    def __init__(self, number: int, plugin: str) -> None:
        self.ring = SharedRing(number, plugin, SIZE)
        self.producer: Producer = self.ring.map_producer()
        producer_fd, consumer_fd = self.ring.consumer_fds()
        self._consumer = Consumer(
            map_memory(producer_fd, producer_bytes(SIZE), writable=False),
            map_memory(consumer_fd, CONSUMER_BYTES, writable=True),
            SIZE,
        )

    def publish(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.publish_bytes(encode_record(Metric(name, value, labels), TS_NS))

    def publish_bytes(self, payload: bytes) -> None:
        assert self.producer.publish(payload)
        assert self._consumer.read(0) is not None
        seen = self._consumer.cursor_seq
        self._consumer.commit(Tally(self._consumer.cursor, seen, seen))


class Agent:
    """The supervisor's answers, and what the user is told."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.workers: list[Worker] = []
        self.notes: list[str] = []
        self.refusal: ControlError | None = None
        self.taps = Taps(self.ask, self.notes.append)

    def start(self, plugin: str) -> Worker:
        worker = Worker(next(self._numbers), plugin)
        self.workers.append(worker)
        return worker

    def ask(self, fds: list[int]) -> Tapping:
        if self.refusal is not None:
            raise self.refusal
        rings = [worker.ring for worker in self.workers]
        fds += [os.dup(ring.tap_fd) for ring in rings]
        places = [RingPlace(number=r.number, plugin=r.plugin, epoch=r.epoch, size_bytes=r.size_bytes) for r in rings]
        return Tapping(agent_id="edge-1", rings=places)

    def read(self) -> list[TappedRecord]:
        return list(self.taps.read(0))


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.taps.close()
    for worker in made.workers:
        worker.ring.release()


# ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_is_named_as_the_receiver_names_it(agent: Agent) -> None:
    """What `kon-receiver query --json` prints of it later is the same object."""
    cpu = agent.start("cpu")
    agent.taps.refresh()
    cpu.publish("cpu_usage_percent", 12.5, mode="user")
    epoch = f"{cpu.ring.epoch:016x}"
    (record,) = agent.read()
    assert TappedRecord("edge-1", "cpu", epoch, 0, TS_NS, "cpu_usage_percent", 12.5, {"mode": "user"}) == record
    assert StoredRecord.__struct_fields__ == TappedRecord.__struct_fields__


def test_only_what_passes_from_now_on_is_shown(agent: Agent) -> None:
    """Unless what is still in the rings is asked for."""
    cpu = agent.start("cpu")
    cpu.publish("before")
    agent.taps.refresh()
    all_there_is = Taps(agent.ask, agent.notes.append, from_start=True)
    all_there_is.refresh()
    cpu.publish("after")
    assert ["after"] == [record.name for record in agent.read()]
    assert ["before", "after"] == [record.name for record in all_there_is.read(0)]
    all_there_is.close()


def test_a_new_worker_is_seen_from_its_first_record_on(agent: Agent) -> None:
    """Its ring is found later than it begins to publish."""
    agent.taps.refresh()
    agent.start("cpu").publish("first")
    agent.taps.refresh()
    assert ["first"] == [record.name for record in agent.read()]
    agent.taps.refresh()
    assert [] == agent.read()


def test_a_dead_worker_is_seen_to_its_last_record_and_let_go(agent: Agent) -> None:
    """What it published before its ring went is shown; then nothing of its memory is held."""
    cpu = agent.start("cpu")
    agent.taps.refresh()
    before = mappings()
    cpu.publish("last")
    agent.workers.remove(cpu)
    agent.taps.refresh()
    assert ["last"] == [record.name for record in agent.read()]
    assert before - 1 == mappings()
    cpu.ring.release()


def mappings() -> int:
    """Return how often this process has a producer's area of cpu mapped."""
    return Path("/proc/self/maps").read_text().count("kon-ring-cpu")


def test_no_descriptor_is_kept(agent: Agent) -> None:
    """Those that come with each answer are closed, whatever comes of it."""
    agent.start("cpu")
    before = set(os.listdir("/proc/self/fd"))
    agent.taps.refresh()
    agent.taps.refresh()
    agent.workers[0].ring.size_bytes = 1 << 50  # more than can be mapped
    refused = Taps(agent.ask, agent.notes.append)
    with pytest.raises(RingError, match="the ring of cpu cannot be seen"):
        refused.refresh()
    assert before == set(os.listdir("/proc/self/fd"))


def test_descriptors_that_were_lost_on_the_way_are_an_error(agent: Agent) -> None:
    """A ring is never taken for another's: without one descriptor each, none is mapped."""

    def ask(fds: list[int]) -> Tapping:
        answer = agent.ask(fds)
        os.close(fds.pop())
        return answer

    agent.start("cpu")
    with pytest.raises(ControlError, match="0 descriptors came for 1 rings"):
        Taps(ask, agent.notes.append).refresh()


def test_what_was_missed_is_said(agent: Agent) -> None:
    """Once for each time, with the number of records and whose they were."""
    cpu = agent.start("cpu")
    agent.taps.refresh()
    count = 3 * SIZE // 24
    for _ in range(count):
        cpu.publish("fast")
    assert [] == agent.read()
    cpu.publish("next")
    assert ["next"] == [record.name for record in agent.read()]
    assert [f"missed {count} records of cpu: they passed faster than they could be shown"] == agent.notes


def test_what_is_no_record_is_left_out(agent: Agent) -> None:
    """A worker's nonsense is told once; a record it had to reject never was one."""
    cpu = agent.start("cpu")
    agent.taps.refresh()
    for payload in (b"\xff\xff", b"\x0a\x00\x0a\x00", b""):
        cpu.publish_bytes(payload)
    cpu.publish("good")
    assert ["good"] == [record.name for record in agent.read()]
    assert ["record 0 of cpu is none; more of that kind are left out"] == agent.notes


def test_a_hostile_ring_is_left_alone(agent: Agent) -> None:
    """It is told, not asked for again, and the others are shown."""
    cpu, memory = agent.start("cpu"), agent.start("memory")
    agent.taps.refresh()
    cpu.producer._words[3] = 12  # its head, where none can be
    memory.publish("good")
    assert ["good"] == [record.name for record in agent.read()]
    agent.taps.refresh()
    assert [] == agent.read()
    assert ["the ring of cpu is left alone: head 12 is impossible behind position 0"] == agent.notes


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RECORD = TappedRecord("edge-1", "cpu", "00ff", 7, TS_NS, "cpu_usage_percent", 12.5, {"mode": "user", "cpu": "0"})


def test_a_line_for_people() -> None:
    """Time, plugin, name with its labels, value."""
    shown = line(RECORD, as_json=False).decode()
    assert '.123  cpu         cpu_usage_percent{cpu="0",mode="user"}  12.5\n' == shown[8:]


def test_a_time_before_the_clock_was_set_is_marked() -> None:
    """It may be years off."""
    early = msgspec.structs.replace(RECORD, clock_unsynced=True)
    assert ".123?  cpu" == line(early, as_json=False).decode()[8:18]


def test_a_line_for_programs() -> None:
    """The whole record, one object."""
    assert RECORD == msgspec.json.decode(line(RECORD, as_json=True), type=TappedRecord)


def test_no_record_writes_to_the_terminal() -> None:
    """Whatever a plugin puts into its names and labels."""
    hostile = msgspec.structs.replace(RECORD, name="x\x1b[2J", labels={"a\n": "\x07\u202e"}, ts_ns=2**63 - 1)
    assert line(hostile, as_json=False).decode().removesuffix("\n").isprintable()
    assert b"\x1b" not in line(hostile, as_json=True)


# ── the stream ────────────────────────────────────────────────────────────────────────────────────────────────────


class Pipe:
    """Where a stream goes."""

    def __init__(self) -> None:
        read_fd, write_fd = os.pipe()
        self.reader, self.writer = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")

    def lines(self) -> list[str]:
        self.writer.close()
        return self.reader.read().decode().splitlines()


def publishing(agent: Agent, *names: str) -> Taps:
    """Return taps whose agent publishes a record of each name at every look."""
    cpu = agent.start("cpu")

    class Busy(Taps):
        def read(self, now_ns: int) -> Iterator[TappedRecord]:
            for name in names:
                cpu.publish(name)
            yield from super().read(now_ns)

    return Busy(agent.ask, agent.notes.append)


def test_enough_is_enough(agent: Agent) -> None:
    """So many records of such a name, and not one more."""
    pipe, taps = Pipe(), publishing(agent, "cpu_a", "memory_b", "cpu_c")
    Stream(taps, pipe.writer, agent.notes.append, glob="cpu_*", count=3).run()
    assert ["cpu_a", "cpu_c", "cpu_a"] == [row.split()[2] for row in pipe.lines()]
    taps.close()


def test_time_is_up(agent: Agent) -> None:
    """A stream of nothing ends in time too."""
    pipe = Pipe()
    Stream(agent.taps, pipe.writer, agent.notes.append, seconds=0.05).run()
    assert [] == pipe.lines()


def test_a_reader_that_leaves_ends_it_at_once(agent: Agent) -> None:
    """Even where nothing passes that could be written."""
    pipe = Pipe()
    pipe.reader.close()
    Stream(agent.taps, pipe.writer, agent.notes.append).run()


def test_an_agent_that_goes_is_waited_for(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it does not answer is said once; its rings are read on, those of its successor too."""
    monkeypatch.setattr("kon_agent.cli.tap.ASK_INTERVAL_NS", 0)
    cpu, looks = agent.start("cpu"), itertools.count()

    class Script(Taps):
        def read(self, now_ns: int) -> Iterator[TappedRecord]:
            look = next(looks)
            agent.refusal = ControlError("not_running", "nobody") if look in (1, 2) else None
            if look == 3:
                cpu.publish("still")
            if look == 4:
                agent.start("cpu").publish("new")
            yield from super().read(now_ns)

    pipe, taps = Pipe(), Script(agent.ask, agent.notes.append)
    Stream(taps, pipe.writer, agent.notes.append, count=2).run()
    assert ["still", "new"] == [row.split()[2] for row in pipe.lines()]
    assert ["no answer: nobody"] == agent.notes
    taps.close()


def test_an_agent_that_never_answered_is_an_error(agent: Agent) -> None:
    """As for every other command."""
    agent.refusal = ControlError("not_running", "nobody")
    with pytest.raises(ControlError, match="nobody"):
        Stream(agent.taps, Pipe().writer, agent.notes.append).run()


def test_the_margin_is_within_the_smallest_ring() -> None:
    """A tap of the smallest ring still has most of it to be late in."""
    assert MARGIN_BYTES <= SIZE // 2
