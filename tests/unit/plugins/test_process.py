"""The process collector's promises."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ProcessConfig
from kon_agent.errors import NoData
from kon_agent.plugins import process
from kon_agent.plugins.context import Context
from kon_agent.plugins.process import Process, _parse_stat, printable_name

HZ = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

Values = dict[tuple[str, str], float]


def stat(pid: int, name: bytes, state: str, ticks: int, *, threads: int = 1, start: int = 5, pages: int = 0) -> bytes:
    """Return a stat file's content; the ticks are half user, half system."""
    user = ticks // 2
    fields = f"{state} 1 2 3 0 -1 4194304 10 20 30 40 {user} {ticks - user} 7 8 20 0 {threads} 0 {start} 12345 {pages}"
    return b"%d (%s) %s 18446744073709551615 1 1 0 0\n" % (pid, name, fields.encode())


class Table:
    """A /proc with processes, and a clock that a test moves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_ns = 100 * NS_PER_S
        (root / "proc").mkdir()
        (root / "proc/uptime").write_text("100.0 100.0\n")
        self.put(1, b"init", "S", 100)

    def put(
        self, pid: int, name: bytes, state: str, ticks: int, *, threads: int = 1, start: int = 5, pages: int = 0
    ) -> None:
        """Have a process in it, in place of the one that had its pid."""
        folder = self.root / f"proc/{pid}"
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_bytes(stat(pid, name, state, ticks, threads=threads, start=start, pages=pages))

    def collector(self, top: int = 10) -> Process:
        """Return a collector that has taken its baseline."""
        collector = Process(ProcessConfig(top=top), Context(root=str(self.root), now_ns=lambda: self.now_ns))
        collector.start()
        return collector


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Return a table with one process, init."""
    return Table(tmp_path)


def values(collector: Process) -> Values:
    """Collect; return the values by name and pid, or state, or nothing."""
    return {
        (metric.name, metric.labels.get("pid") or metric.labels.get("state", "")): metric.value
        for metric in collector.collect()
    }


def test_cpu_is_percent_of_one_core_over_the_interval(table: Table) -> None:
    """A process that used three seconds of CPU time in two used 150 percent, whatever it used before."""
    table.put(7, b"busy", "R", 5000, threads=4)
    collector = table.collector()
    table.put(7, b"busy", "R", 5000 + 3 * HZ, threads=4)
    table.now_ns += 2 * NS_PER_S
    collected = values(collector)
    assert 150.0 == pytest.approx(collected["process_cpu_percent", "7"])
    assert (4.0, 0.0) == (collected["process_threads", "7"], collected["process_other_cpu_percent", ""])


def test_memory_is_in_bytes(table: Table) -> None:
    """Resident memory is pages times the page size, labelled with pid and name."""
    table.put(7, b"large one", "S", 0, pages=300)
    metric = next(m for m in table.collector().collect() if m.name == "process_resident_bytes")
    assert (300 * PAGE, {"pid": "7", "name": "large one"}) == (metric.value, metric.labels)


def test_memory_of_the_reported_is_the_exact_one(table: Table) -> None:
    """What statm says goes before stat's estimate."""
    table.put(7, b"large", "S", 0, pages=300)
    (table.root / "proc/7/statm").write_text("1000 310 20 1 0 90 0\n")
    assert 310 * PAGE == values(table.collector())["process_resident_bytes", "7"]


def test_the_union_of_both_tops_is_reported_and_the_rest_summed(table: Table) -> None:
    """One busy, one large: both are reported; reported and other together are the total."""
    for pid in range(10, 20):
        table.put(pid, b"p", "S", 0, pages=pid)
    collector = table.collector(top=1)
    for pid in range(10, 20):
        table.put(pid, b"p", "S", 30 - pid, pages=pid)
    table.now_ns += NS_PER_S
    collected = values(collector)
    assert {"10", "19"} == {pid for name, pid in collected if name == "process_cpu_percent"}
    cpu = sum(value for (name, _), value in collected.items() if name.endswith("_cpu_percent"))
    memory = sum(value for (name, _), value in collected.items() if name.endswith("_resident_bytes"))
    assert 100.0 * sum(range(11, 21)) / HZ == pytest.approx(cpu)
    assert sum(range(10, 20)) * PAGE == memory


def test_a_pid_used_again_is_another_process(table: Table) -> None:
    """The new owner of a pid has used what it has used since its own start."""
    table.put(7, b"old", "S", 100, start=50)
    collector = table.collector()
    table.put(7, b"new", "R", 200, start=60)
    table.now_ns += 10 * NS_PER_S
    assert 100.0 * 200 / HZ / 10 == pytest.approx(values(collector)["process_cpu_percent", "7"])


def test_an_old_process_seen_late_counts_from_the_next_cycle(table: Table) -> None:
    """One that is older than another we knew was hidden: the CPU time of its whole life is no usage of now."""
    table.put(8, b"known", "S", 1, start=900)
    collector = table.collector()
    table.put(7, b"hidden", "S", 10**9, start=50)
    table.now_ns += NS_PER_S
    assert ("process_cpu_percent", "7") not in values(collector)
    table.put(7, b"hidden", "S", 10**9 + HZ, start=50)
    table.now_ns += NS_PER_S
    assert 100.0 == pytest.approx(values(collector)["process_cpu_percent", "7"])


def test_without_an_interval_there_is_no_cpu_figure(table: Table) -> None:
    """Where no time has passed, memory and numbers are reported, CPU is not."""
    table.put(7, b"large", "S", 0, pages=1)
    names = {name for name, _ in values(table.collector())}
    assert "process_resident_bytes" in names
    assert not {"process_cpu_percent", "process_other_cpu_percent"} & names


def test_processes_are_counted_by_state(table: Table) -> None:
    """Every state is reported, those nobody is in as well, and all threads are summed up."""
    for pid, state in enumerate("RDZTtIX", 10):
        table.put(pid, b"p", state, 0, threads=2)
    collected = values(table.collector())
    assert {
        "running": 1,
        "sleeping": 1,
        "blocked": 1,
        "idle": 1,
        "zombie": 1,
        "stopped": 2,
        "other": 1,
    } == {state: value for (name, state), value in collected.items() if name == "process_count"}
    assert 15 == collected["process_threads_count", ""]


def test_a_process_that_vanishes_is_skipped(table: Table) -> None:
    """A folder whose stat file is gone is no process."""
    collector = table.collector()
    (table.root / "proc/99").mkdir()
    assert (1, 0) == (sum_of_counts(values(collector)), values(collector)["process_omitted", ""])


def sum_of_counts(collected: Values) -> float:
    """Return how many processes were counted."""
    return sum(value for (name, _), value in collected.items() if name == "process_count")


def test_more_processes_than_the_bound_are_counted_as_omitted(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than MAX_PROCESSES are read; how many were not is reported."""
    monkeypatch.setattr(process, "MAX_PROCESSES", 4)
    for pid in range(10, 20):
        table.put(pid, b"p", "S", 0)
    collected = values(table.collector())
    assert (4, 7) == (sum_of_counts(collected), collected["process_omitted", ""])


def test_a_proc_that_hides_processes_is_warned_about_once(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    """Where the first process is not shown (hidepid), that is said, once, and what is seen is reported."""
    (table.root / "proc/1/stat").rename(table.root / "gone")
    table.put(7, b"own", "S", 0)
    collector = table.collector()
    with caplog.at_level(logging.WARNING):
        assert 1 == sum_of_counts(values(collector))
        values(collector)
    assert [True] == ["hidepid" in record.message for record in caplog.records]


def test_processes_we_may_not_read_are_counted_as_omitted(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """hidepid=1 lists processes it lets nobody read: they are omitted, and the others reported."""
    read: Callable[[Process, str, str], bytes] = Process._read

    def refuse(collector: Process, pid: str, name: str) -> bytes:
        if pid == "1":
            raise PermissionError(1, "Operation not permitted")
        return read(collector, pid, name)

    table.put(7, b"own", "S", 0)
    monkeypatch.setattr(Process, "_read", refuse)
    collected = values(table.collector())
    assert (1, 1) == (sum_of_counts(collected), collected["process_omitted", ""])


def test_no_process_is_no_data(tmp_path: Path) -> None:
    """A /proc without a single process is no failure."""
    (tmp_path / "proc").mkdir()
    with pytest.raises(NoData, match="no process"):
        Process(ProcessConfig(), Context(root=str(tmp_path))).collect()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"a b", "a b"),
        (b"(sd-pam)", "(sd-pam)"),
        (b"caf\xc3\xa9", "café"),
        (b"\xff\x1b[2J", "\ufffd\ufffd[2J"),
        (b"kworker/0:1-events", "kworker/0:1"),
        (b"kworker/u8:3+flush-252:0", "kworker/u8:3"),
        (b"kworker/0:1H-kblockd", "kworker/0:1H"),
        (b"kworker/R-rcu_gp", "kworker/R-rcu_gp"),
    ],
)
def test_names_become_labels(raw: bytes, shown: str) -> None:
    """A label is printable UTF-8, and a kernel worker's does not change with what it does."""
    assert shown == printable_name(raw)


@given(st.binary(max_size=64))
def test_any_name_is_parsed(name: bytes) -> None:
    """Whatever a process calls itself, parentheses, spaces and newlines included, the fields behind are found."""
    reading = _parse_stat(stat(42, name, "R", 9, threads=3, start=11, pages=8))
    assert ((42, 11), name, "running", 9, 3, 8) == (
        reading.identity,
        reading.name,
        reading.state,
        reading.ticks,
        reading.threads,
        reading.resident_pages,
    )


def test_this_machine_shows_a_busy_child() -> None:
    """On the real /proc, a child that spins is among the top by CPU and uses some of one core."""
    collector = Process(ProcessConfig(top=100), Context())
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        collector.start()
        busy = ("process_cpu_percent", str(child.pid))
        collected = values(collector)
        while not collected.get(busy):  # until a tick of 10 ms is counted; the suite's timeout is the deadline
            collected = values(collector)
    finally:
        child.kill()
        child.wait()
    assert 0.0 < collected[busy]
