"""The fault matrix: one case per row, its injections, and the balance that must come out even.

A case runs the real agent and receiver, lets a test inject one fault any number of times, and then asks three who
cannot have agreed on a lie: the rings themselves, held open by `Book` beyond the death of everyone who owned them, say
how many records each epoch produced; the receiver's ledger says what became of every sequence number; the agent's own
status says what it believes. The row holds if, for every epoch, produced = stored + declared lost, and none is missing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kon_agent.control_protocol import Op, Status
from kon_agent.errors import ControlError
from kon_agent.receiver.reader import epoch_text
from kon_agent.ring import DATA_OFFSET, MAGIC
from tests.support import law
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

IS_LONG = bool(os.environ.get("KON_FAULT_LONG"))
LOAD: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"per_core": True},
    "memory": {},
    "disk": {},
    "ebpf": {"interfaces": ["lo"], "exclude": []},
    "agent": {},
}
RATE = 1200  # records a second that LOAD makes at most on this machine's two processors
DRAIN_DEADLINE_S = 30.0  # after a long outage on a machine that does other things
RECONNECT_DEADLINE_S = 45.0  # after a long outage attempts are half a minute apart
LOOK_S = 0.03  # a ring that is made, drained and gone between two looks held nothing

Plugins = Mapping[str, Mapping[str, Any]]


def times(short: int, long: int) -> int:
    """Return how often to inject: the short form is part of every test run."""
    return long if IS_LONG else short


def tight(ring_size: str) -> Plugins:
    """Return the load with smaller rings: they are half full within a second, and the spool is written at once."""
    return {name: {**keys, "ring_size": ring_size} for name, keys in LOAD.items()}


# ── the book ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Book:
    """Every ring of every supervisor it is told of, kept open: what was produced stays known when all are dead."""

    def __init__(self) -> None:
        self._rings: dict[str, tuple[int, str, mmap.mmap]] = {}  # epoch to run, plugin, header
        self._run = 0
        self._supervisor = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="book", daemon=True)
        self._thread.start()

    def watch(self, supervisor: int) -> None:
        """Watch another supervisor from now on."""
        self._run += 1
        self._supervisor = supervisor

    def produced(self, run: int | None = None) -> dict[str, int]:
        """Return how many records each epoch's worker has made: of one run, by default of all."""
        return {epoch: _word(ring, 4) for epoch, (of, _, ring) in self._rings.items() if run in (None, of)}

    def produced_now(self) -> Counter[str]:
        """Return how many records each plugin has made in the present run."""
        return self.by_plugin(self.produced(self._run))

    def wait_writing(self, plugin: str, deadline_s: float = 5.0) -> None:
        """Return while the worker of a plugin is in the middle of a cycle's records, by looking without a pause."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            ring = next(ring for of, name, ring in reversed(self._rings.values()) if (of, name) == (self._run, plugin))
            before, until = ring[32:40], time.monotonic() + 0.3  # word 4: produced; a dead worker's ring stays as it is
            while time.monotonic() < until:
                if ring[32:40] != before:
                    return

    def by_plugin(self, counts: Mapping[str, int]) -> Counter[str]:
        """Return the sum of counts by epoch over the epochs of each plugin."""
        totals = Counter[str]()
        for epoch, count in counts.items():
            totals[self._rings[epoch][1]] += count
        return totals

    def close(self) -> None:
        """Let go of everything."""
        self._is_over.set()
        self._thread.join()
        for _, _, ring in self._rings.values():
            ring.close()

    def _look_on(self) -> None:
        known: set[tuple[int, int]] = set()
        while not self._is_over.wait(LOOK_S):
            with contextlib.suppress(OSError):  # it is dead, or a descriptor has been closed meanwhile
                self._look(self._run, self._supervisor, known)

    def _look(self, run: int, pid: int, known: set[tuple[int, int]]) -> None:
        for entry in os.scandir(f"/proc/{pid}/fd") if pid else ():
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is just being made, and empty
                name = os.readlink(entry.path)
                if not name.startswith("/memfd:kon-ring-"):
                    continue
                inode = os.stat(entry.path).st_ino
                if (pid, inode) in known:
                    continue
                with open(entry.path, "rb") as file:
                    ring = mmap.mmap(file.fileno(), DATA_OFFSET, access=mmap.ACCESS_READ)
                if _word(ring, 0) == MAGIC:  # else it will be in a moment
                    plugin = name.removeprefix("/memfd:kon-ring-").removesuffix(" (deleted)")
                    self._rings[epoch_text(_word(ring, 1))] = run, plugin, ring
                    known.add((pid, inode))


def _word(ring: mmap.mmap, number: int) -> int:
    return int.from_bytes(ring[8 * number : 8 * number + 8], "little")


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Line:
    """One row of the table."""

    row: str
    injections: int = 0
    produced: int = 0
    stored: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    buried: int = 0
    duplicates: int = 0
    seconds: float = 0.0
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        lost = [f"{reason} {count}" for reason, count in sorted(self.lost.items())]
        lost += [f"with the rings {self.buried}"] if self.buried else []
        numbers = (self.injections, self.produced, self.stored)
        return (
            self.row,
            *map(str, numbers),
            ", ".join(lost) or "0",
            str(self.duplicates),
            f"{self.seconds:.1f}",
            self.note,
        )


HEAD = ("row", "injections", "produced", "stored", "declared lost", "duplicates refused", "seconds", "note")
TABLE: list[Line] = []


def table() -> list[str]:
    """Return the lines of the table so far, as Markdown."""
    rows = [HEAD, *(line.cells() for line in TABLE)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


# ── a case ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Case:
    """One row: an agent, a receiver, a fault.

    Args:
        row: what the table calls it.
        agent: not started yet.
        receiver: started or not.
    """

    def __init__(self, row: str, agent: Agent, receiver: Receiver) -> None:
        self.agent = agent
        self.receiver = receiver
        self.line = Line(row)
        self.book = Book()
        self.chance = random.Random(row)
        self._began_s = time.monotonic()
        self._runs = 0

    # The agent's life.

    def start(self) -> None:
        """Start the agent."""
        self.agent.start()
        self.book.watch(self.agent.pid)
        self._runs += 1

    @property
    def spool(self) -> Path:
        """Return the folder of the agent's spool."""
        return self.agent.folder / "spool"

    def is_up(self, more: int = 5) -> None:
        """Wait until the agent is connected and runs, and fresh records of every plugin are acknowledged."""
        wait_for(lambda: "connected" == self.status().server.state, "it is connected", RECONNECT_DEADLINE_S)
        self.agent.wait_until_running()
        self.agent.wait_for_acks(more=more)

    def status(self) -> Status:
        """Return the agent's status; whenever one looks, the conservation law holds."""
        status = self.agent.status()
        for plugin in status.plugins:
            law.conservation(plugin)
            assert 0 <= min(plugin.spooled, plugin.in_ring, plugin.in_flight, plugin.acked, plugin.recovered), plugin
        return status

    def spooled(self) -> int:
        """Return how many records are in the spool."""
        return sum(plugin.spooled for plugin in self.status().plugins)

    def wait_produced(self, more: int) -> None:
        """Wait until that many more records have been made."""
        goal = self.book.produced_now().total() + more
        wait_for(lambda: self.book.produced_now().total() >= goal, f"{more} more records are made", DRAIN_DEADLINE_S)

    def wait_spooled(self, more: int, deadline_s: float = DRAIN_DEADLINE_S) -> None:
        """Wait until that many more records are in the spool."""
        goal = self.spooled() + more
        wait_for(lambda: self.spooled() >= goal, f"{more} more records are in the spool", deadline_s)

    def kill_all(self) -> None:
        """Kill the agent's whole tree, and its receiver, at once."""
        pids = [self.agent.pid, *self.agent.children().values()]
        pids += [self.receiver.pid] if self.receiver.is_running else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()
        if self.receiver.is_running:
            self.receiver.wait()
        wait_for(self.agent.is_gone, "no process of the agent is left", 5)

    def kill_child(self, title: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill a child of the agent and wait until it is gone from the table; return its process id."""
        pid = wait_for(lambda: self.agent.children().get(title, 0), f"there is a {title}", DRAIN_DEADLINE_S)
        os.kill(pid, number)
        self.line.injections += 1
        wait_for(lambda: self.agent.children().get(title) != pid, f"{title} {pid} is gone")
        return pid

    def kill_worker_writing(self, plugin: str) -> None:
        """Kill a worker between two records of a cycle."""
        pid = self.wait_child(f"kon-agent: worker {plugin}")
        self.book.wait_writing(plugin)
        os.kill(pid, signal.SIGKILL)
        self.line.injections += 1
        wait_for(lambda: self.agent.children().get(f"kon-agent: worker {plugin}") != pid, f"{plugin} {pid} is gone")

    def wait_spool_written(self, deadline_s: float = 5.0) -> None:
        """Return just after something was written to the spool, by looking without a pause."""
        before, deadline = bytes_in(self.spool), time.monotonic() + deadline_s
        while bytes_in(self.spool) == before and time.monotonic() < deadline:
            pass

    def wait_child(self, title: str) -> int:
        """Wait until there is such a child and return its process id."""
        return wait_for(lambda: self.agent.children().get(title, 0), f"there is a {title}", DRAIN_DEADLINE_S)

    def nap(self, longest_s: float) -> None:
        """Let a random time pass."""
        time.sleep(self.chance.uniform(0, longest_s))

    # The balance.

    def settle(self) -> Status:
        """Have every worker end and everything delivered, compare the status with the rings, and stop the agent."""
        names = [plugin.name for plugin in self.status().plugins if plugin.enabled]
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: self.agent.change(Op.PLUGIN_DISABLE, name), names))
        try:
            wait_for(lambda: law.is_drained(self.status()), "everything is delivered", DRAIN_DEADLINE_S)
        except AssertionError:
            print(*self.status().plugins, self.status().spool, *self.receiver.ledger(), sep="\n")
            raise
        wait_for(lambda: 0 == self.status().spool.records, "the spool is empty")
        status = self.status()
        made = self.book.produced_now()
        assert {plugin.name: made[plugin.name] for plugin in status.plugins} == {
            plugin.name: plugin.produced - plugin.recovered for plugin in status.plugins
        }, "what the status says was produced is not what the rings say"
        self.stop()
        return status

    def stop(self) -> None:
        """End the agent as an operator would; nothing of it is left."""
        assert 0 == self.agent.stop()
        wait_for(self.agent.is_gone, "no process of the agent is left", 5)

    def finish(self, may_lose: Sequence[str] = (), buried_at_most: int = 0, note: str = "") -> Line:
        """See that the agent is up, settle, and balance the books.

        Args:
            may_lose: legal reasons for a loss in this row.
            buried_at_most: records that may have died with the memory of the rings.
        """
        self.is_up()
        status = self.settle()
        line = self.balance(may_lose, buried_at_most, note)
        if self._runs == 1:  # else earlier runs have taken their figures with them
            dropped = Counter[str]()
            for plugin in status.plugins:
                dropped.update(plugin.dropped)
            assert +dropped == line.lost, "what the status says was dropped is not what the ledger has been told"
        return line

    def balance(self, may_lose: Sequence[str] = (), buried_at_most: int = 0, note: str = "") -> Line:
        """Compare rings and ledger, epoch by epoch, with everything stopped that makes records."""
        line, rows = self.line, {row.epoch: row for row in self.receiver.ledger()}
        produced = self.book.produced()
        assert set() == rows.keys() - produced.keys(), "the ledger knows epochs nobody has seen"
        for epoch, count in produced.items():
            row = rows.get(epoch)
            if row is None:
                line.buried += count
                continue
            assert 0 == row.missing, row
            line.buried += count - row.stored - sum(row.declared_lost.values())
            line.stored += row.stored
            line.duplicates += row.duplicates_refused
            line.lost.update(row.declared_lost)
        line.produced = sum(produced.values())
        line.note = note
        assert 0 <= line.buried <= buried_at_most, f"{line.buried} of {line.produced} records are unaccounted for"
        assert line.produced == line.stored + sum(line.lost.values()) + line.buried
        assert line.lost.keys() <= set(may_lose), line.lost
        assert stored_rows(self.receiver.store) == line.stored, "the store does not hold what its ledger says"
        self.enter()
        return line

    def enter(self) -> None:
        """Enter the row into the table."""
        self.line.seconds = time.monotonic() - self._began_s
        TABLE.append(self.line)
        print(" | ".join(self.line.cells()), flush=True)

    def close(self) -> None:
        """Let go of what outlives the agent."""
        self.book.close()


def bytes_in(folder: Path) -> int:
    """Return the length of all files of a folder."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


def stored_rows(store: Path) -> int:
    """Return how many records a store holds, duplicates included if there were any."""
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        (count,) = db.execute("SELECT count(*) FROM records").fetchone()
        (distinct,) = db.execute("SELECT count(*) FROM (SELECT DISTINCT stream, seq FROM records)").fetchone()
    assert count == distinct
    return int(count)


@contextlib.contextmanager
def pressing(action: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Repeat an action in the background for a while; ControlError is what an agent that is not there raises."""
    is_over = threading.Event()

    def press() -> None:
        while not is_over.wait(interval_s):
            with contextlib.suppress(ControlError):
                action()

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
