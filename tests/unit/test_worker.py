"""The worker's promises: a collector's metrics on schedule, into its ring, and a crash rather than a limp."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import pytest

from kon_agent import clock, worker
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Duration, LogConfig, PluginConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric
from kon_agent.page import PageReader, PageWriter, page_size
from kon_agent.plugins.context import Context
from kon_agent.ring import (
    CONSUMER_BYTES,
    LAST_WORDS_BYTES,
    MAX_RECORD_BYTES,
    Consumer,
    Observer,
    Producer,
    Record,
    format_ring,
    producer_bytes,
)
from kon_agent.spec import ORDERS_BYTES, WorkerSpec, encode_orders
from kon_agent.wire import kon_agent_pb2 as pb
from kon_agent.wire.encode import encode_record

SIZE = 16 * 1024
PERIOD_S = 0.01
MS = 1_000_000
LOAD = Metric("load", 1.5)

Script = list[Callable[[], Iterable[Metric]]]
script: Script = []
"""What the collector does in each of its cycles; after the last one the worker is told to stop."""


class Scripted:
    """A collector that plays `script`."""

    instances: list[Scripted] = []  # noqa: RUF012 - the worker makes them out of the test's sight

    def __init__(self, config: PluginConfig, context: Context) -> None:
        self.config, self.context = config, context
        self.calls: list[str] = []
        self.instances.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def collect(self) -> Iterable[Metric]:
        self.calls.append("collect")
        act = script.pop(0)
        if not script:
            os.kill(os.getpid(), signal.SIGTERM)
        return act()

    def stop(self) -> None:
        self.calls.append("stop")


class Bare:
    """A collector with nothing but what it must have."""

    def __init__(self, config: PluginConfig, context: Context) -> None:
        pass

    def collect(self) -> Iterable[Metric]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [LOAD]


class Rig:
    """A worker's surroundings in this process: its ring, its doorbell, and the supervisor's view."""

    def __init__(self, target: str = "Scripted") -> None:
        producer_area, consumer_area = bytearray(producer_bytes(SIZE)), bytearray(CONSUMER_BYTES)
        format_ring(memoryview(producer_area), 1, SIZE)
        producer, consumer = memoryview(producer_area), memoryview(consumer_area)
        self.observer = Observer(producer, consumer, SIZE)
        self.consumer = Consumer(producer, consumer, SIZE)
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.orders = memoryview(bytearray(page_size(ORDERS_BYTES)))
        self.order(PERIOD_S)
        self.spec = WorkerSpec(
            name="test",
            target=f"{__name__}:{target}",
            config=PluginConfig(period=Duration(PERIOD_S)),
            producer=Producer(producer, consumer),
            doorbell=self.doorbell,
            grants={"telemetry": memoryview(b"page")},
            log=LogConfig(),
            orders=PageReader(self.orders),
        )

    def order(self, period_s: float) -> None:
        """Order another period."""
        PageWriter(self.orders).publish(encode_orders(int(period_s * NS_PER_S)))

    def run(self, *acts: Callable[[], Iterable[Metric]]) -> int:
        """Run the worker's body for as many cycles as there are acts."""
        script[:] = acts
        return worker.main(self.spec)

    def records(self) -> list[Record]:
        """Return everything in the ring."""
        return list(iter(lambda: self.consumer.read(0), None))

    def rings(self) -> int:
        """Return how often the doorbell has been rung."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.doorbell)
        return 0


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Give back the signals and the logging a worker sets up as a process of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    wakeup_fd = signal.set_wakeup_fd(-1)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    signal.set_wakeup_fd(wakeup_fd)
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:] = handlers
    root.setLevel(level)
    Scripted.instances.clear()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A worker's surroundings, on a machine whose clock has been set."""
    monkeypatch.setattr(worker, "_has_clock_been_set", lambda: True)
    made = Rig()
    yield made
    os.close(made.doorbell)


def one() -> Iterable[Metric]:
    return [LOAD]


def two() -> Iterable[Metric]:
    return [LOAD, LOAD]


def none() -> Iterable[Metric]:
    return []


def no_data() -> Iterable[Metric]:
    raise NoData("no such file")


def test_metrics_become_records(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is encoded once, stamped with its cycle's time unless it brings its own, and numbered."""
    monkeypatch.setattr(clock, "wall_ns", lambda: 77)
    dated = Metric("dated", 2.0, {"a": "b"}, ts_ns=5)
    assert os.EX_OK == rig.run(lambda: [LOAD, dated])
    assert [Record(0, encode_record(LOAD, 77)), Record(1, encode_record(dated, 5))] == rig.records()


def test_the_collector_is_given_what_is_its_own(rig: Rig) -> None:
    """Its section of the configuration and its grants; it starts, collects and stops in this order."""
    rig.run(one, one)
    [collector] = Scripted.instances
    assert ["start", "collect", "collect", "stop"] == collector.calls
    assert (rig.spec.config, rig.spec.grants) == (collector.config, collector.context.grants)


def test_start_and_stop_may_be_missing() -> None:
    """A collector is a class with one method."""
    rig = Rig("Bare")
    assert os.EX_OK == worker.main(rig.spec)
    assert 1 == len(rig.records())
    os.close(rig.doorbell)


def test_every_cycle_beats_and_rings_once(rig: Rig) -> None:
    """The supervisor sees it live, and the sender is woken once for all records of a cycle."""
    before_ns = clock.now_ns()
    rig.run(two, two, two)
    pulse = rig.observer.pulse()
    assert (3, 3) == (pulse.cycles, rig.rings())
    assert before_ns < pulse.heartbeat_ns <= clock.now_ns()


@pytest.mark.parametrize("act", [none, no_data])
def test_nothing_to_report_is_life_without_a_ring(rig: Rig, act: Callable[[], Iterable[Metric]]) -> None:
    """Absence is no failure: the heart beats on, and nobody is woken for nothing."""
    assert os.EX_OK == rig.run(act, act)
    assert (2, 0, []) == (rig.observer.pulse().cycles, rig.rings(), rig.records())


def test_data_that_ends_early_is_delivered_all_the_same(rig: Rig) -> None:
    """A collector that yields and then finds no more has published what it has yielded."""

    def some() -> Iterator[Metric]:
        yield LOAD
        raise NoData("no more")

    rig.run(some)
    assert (1, 1) == (len(rig.records()), rig.rings())


@pytest.mark.parametrize(
    "metric",
    [
        Metric("broken", "text"),  # type: ignore[arg-type]
        Metric("broken", 1.0, {"label": 5}),  # type: ignore[dict-item]
        Metric("broken\udcff", 1.0),
        Metric("broken", 1.0, ts_ns=2**63),
    ],
    ids=["value", "label", "surrogate", "time stamp"],
)
def test_what_cannot_be_encoded_is_rejected_and_counted(
    rig: Rig, metric: Metric, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves its mark where it stood, the others go through, and it is told once, not at every cycle."""
    rig.run(lambda: [LOAD, metric, LOAD], lambda: [metric])
    assert [False, True, False, True] == [record.payload == b"" for record in rig.records()]
    assert 1 == capsys.readouterr().err.count("cannot be encoded")


def test_what_is_too_long_is_rejected_and_counted(rig: Rig) -> None:
    """A record no ring takes is a loss with a reason."""
    rig.run(lambda: [Metric("x" * MAX_RECORD_BYTES, 1.0), LOAD])
    assert [True, False] == [record.payload == b"" for record in rig.records()]


def test_a_full_ring_costs_records_not_the_worker(rig: Rig) -> None:
    """The newest are dropped and counted; the collector never waits."""
    assert os.EX_OK == rig.run(lambda: [LOAD] * 2000, one)
    kept = len(rig.records())
    assert (2001, 2001 - kept) == (rig.observer.stats().produced, sum(rig.observer.stats().dropped.values()))


def test_a_crash_leaves_last_words(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Why it ended is left for the supervisor, the traceback on stderr, and the exit code says crash."""

    def fail() -> Iterable[Metric]:
        raise ValueError("no such column")

    assert os.EX_SOFTWARE == rig.run(one, fail)
    assert "ValueError: no such column" == rig.observer.last_words()
    assert "Traceback" in capsys.readouterr().err
    assert 1 == len(rig.records())


@pytest.mark.parametrize("target", ["Missing", "Scripted.nothing"])
def test_a_collector_that_is_not_there_is_a_crash(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails before the first cycle is told the same way."""
    rig = Rig(target)
    assert os.EX_SOFTWARE == worker.main(rig.spec)
    assert target.partition(".")[0] in rig.observer.last_words()
    os.close(rig.doorbell)


def test_last_words_are_cut_to_their_place(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """A novel of an error still leaves its beginning."""

    def fail() -> Iterable[Metric]:
        raise ValueError("x" * 10_000)

    rig.run(fail)
    assert LAST_WORDS_BYTES == len(rig.observer.last_words())


def test_a_cycle_that_overruns_misses_ticks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks passed during a cycle are skipped and counted with the next beat, never caught up."""
    now_ns = 0
    monkeypatch.setattr(clock, "now_ns", lambda: now_ns)

    def overrun() -> Iterable[Metric]:
        nonlocal now_ns
        now_ns += 45 * MS  # four periods and a half
        return [LOAD]

    rig.run(overrun, one)
    pulse = rig.observer.pulse()
    # Due at 10 ms; after the first cycle at 20 ms, which the second meets at 45 ms: 30 and 40 ms are missed.
    assert (2, 2, 45 * MS, 0) == (pulse.cycles, pulse.missed_ticks, pulse.heartbeat_ns, pulse.collect_ns)


def test_it_shows_how_long_a_cycle_takes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time from the start of a cycle to its end."""
    now_ns = 0
    monkeypatch.setattr(clock, "now_ns", lambda: now_ns)

    def slow() -> Iterable[Metric]:
        nonlocal now_ns
        now_ns += 3 * MS
        return [LOAD]

    rig.run(slow)
    assert 3 * MS == rig.observer.pulse().collect_ns


def test_sigterm_ends_it_after_the_cycle(rig: Rig) -> None:
    """What the cycle has collected is published, the collector may tidy up, and the exit is a good one."""
    assert os.EX_OK == rig.run(two)
    assert 2 == len(rig.records())
    assert "stop" == Scripted.instances[0].calls[-1]


def test_an_orphan_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose supervisor has died without a signal notices at its next tick."""
    parents = iter([41])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    assert os.EX_OK == rig.run(one)
    assert ([], "stop") == (rig.records(), Scripted.instances[0].calls[-1])


def test_a_full_doorbell_is_no_trouble(rig: Rig) -> None:
    """A sender that has not looked for ages cannot make its workers wait."""
    os.eventfd_write(rig.doorbell, 2**64 - 2)
    with pytest.raises(BlockingIOError, match=os.strerror(errno.EAGAIN)):
        os.eventfd_write(rig.doorbell, 1)
    assert os.EX_OK == rig.run(one)
    assert 1 == len(rig.records())


def test_a_new_order_changes_the_period(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that waits for a tick an hour away runs at once when it is told to run more often."""
    rig.order(3600.0)

    def hurry() -> Iterable[Metric]:
        rig.order(PERIOD_S)
        os.kill(os.getpid(), signal.SIGUSR1)  # as the supervisor does
        return [LOAD]

    monkeypatch.setattr("kon_agent.schedule.FIRST_TICK_MAX_NS", MS)
    assert os.EX_OK == rig.run(hurry, one)
    assert 2 == rig.observer.pulse().cycles


def test_records_are_marked_until_the_clock_is_set(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before a time service has set the clock says so; once it has been set, it stays so."""
    synchronized = iter([False, True, False])
    monkeypatch.setattr(worker, "_has_clock_been_set", lambda: next(synchronized))
    rig.run(one, one, one)
    members = [pb.BatchMetricsRequest.FromString(record.payload).metrics[0] for record in rig.records()]
    assert [True, False, False] == [member.clock_unsynced for member in members]


def test_an_unknown_clock_marks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not tell, no record is marked."""

    def refuse() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(worker, "read_clock_state", refuse)
    assert worker._has_clock_been_set()


# ── event style ───────────────────────────────────────────────────────────────────────────────────────────────────


class Following:
    """An event-style collector that follows a pipe, and tells the worker to stop once it has seen enough."""

    reader, writer = -1, -1
    answers: list[bool] = []  # noqa: RUF012 - the worker makes it out of the test's sight
    calls: list[str] = []  # noqa: RUF012
    enough = 3

    def __init__(self, config: PluginConfig, context: Context) -> None:
        self.answers.clear()
        self.calls.clear()

    def fileno(self) -> int:
        return self.reader

    def run(self, emit: Callable[[Metric], None]) -> Iterator[object]:
        try:
            while True:
                if len(self.answers) == self.enough:
                    os.kill(os.getpid(), signal.SIGTERM)
                self.answers.append((yield self))
                emit(LOAD)
        finally:
            self.calls.append("closed")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Return a pipe for `Following` to follow."""
    reader, writer = os.pipe()
    monkeypatch.setattr(Following, "reader", reader)
    monkeypatch.setattr(Following, "writer", writer)
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_events_are_published_and_the_end_is_told(pipe: tuple[int, int]) -> None:
    """A collector that yields a source is resumed when it is readable; at the end it is closed, then stopped."""
    os.write(pipe[1], b"x")
    rig = Rig("Following")
    assert os.EX_OK == worker.main(rig.spec)
    assert [True] * Following.enough == Following.answers
    assert ["closed", "stop"] == Following.calls
    assert Following.enough == rig.observer.stats().produced


def test_a_quiet_source_is_waited_for_a_period_and_is_alive(pipe: tuple[int, int]) -> None:
    """Each period without an event is a resumption and a heartbeat."""
    since_ns = clock.now_ns()
    rig = Rig("Following")
    assert os.EX_OK == worker.main(rig.spec)
    assert [False] * Following.enough == Following.answers
    assert clock.now_ns() - since_ns >= Following.enough * PERIOD_S * NS_PER_S
    assert rig.observer.pulse().heartbeat_ns > since_ns


def test_a_source_that_has_hung_up_keeps_nobody_busy(pipe: tuple[int, int]) -> None:
    """A pipe whose writers are gone is asked again once a period, not at once and for ever."""
    os.close(pipe[1])
    since_ns = clock.now_ns()
    assert os.EX_OK == worker.main(Rig("Following").spec)
    assert [False] * Following.enough == Following.answers
    assert clock.now_ns() - since_ns >= Following.enough * PERIOD_S * NS_PER_S
