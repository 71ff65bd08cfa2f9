"""`kon-agent tap` beside a real agent: it sees what the receiver stores, and nobody sees it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from kon_agent.receiver.reader import StoredRecord
from tests.support import law
from tests.support.agent import Agent
from tests.support.program import environment_of
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

PLUGINS: dict[str, dict[str, str]] = {"cpu": {}, "memory": {}, "disk": {}}

StartAgent = Callable[..., Agent]


class Tap:
    """A tap in a process of its own, its records in a file."""

    def __init__(self, agent: Agent, folder: Path, *options: str) -> None:
        self._path = folder / "tapped"
        with self._path.open("wb") as out:
            command = [sys.executable, "-m", "kon_agent.cli.agent", "tap", "--json", *options]
            self.process = subprocess.Popen(
                [*command, "--socket", str(agent.socket)],
                env=environment_of(),
                stdout=out,
                stderr=subprocess.PIPE,
                # A shell's background job, which this test may be, ignores Ctrl-C, and its children with it.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def records(self) -> list[StoredRecord]:
        """Return what it has shown so far."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        return [msgspec.json.decode(line, type=StoredRecord) for line in lines if line.endswith(b"\n")]

    def wait_for_more(self, plugin: str, count: int = 20) -> None:
        """Wait until it has shown so many more records of a plugin."""

        def shown() -> int:
            return sum(record.plugin == plugin for record in self.records())

        before = shown()
        wait_for(lambda: shown() >= before + count, f"the tap shows {count} more records of {plugin}")

    def end(self) -> bytes:
        """End it as a user does; return what it said besides records."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=15)
        assert 0 == self.process.returncode
        return said


@contextmanager
def tapping(agent: Agent, folder: Path, *options: str) -> Iterator[Tap]:
    tap = Tap(agent, folder, *options)
    try:
        yield tap
    finally:
        tap.process.kill()
        tap.process.communicate()


def by_ring(records: Sequence[StoredRecord]) -> dict[tuple[str, str], dict[int, StoredRecord]]:
    """Return records by plugin and epoch, and there by sequence number."""
    rings: dict[tuple[str, str], dict[int, StoredRecord]] = defaultdict(dict)
    for record in records:
        assert record.seq not in rings[record.plugin, record.epoch]
        rings[record.plugin, record.epoch][record.seq] = record
    return rings


@pytest.fixture
def agent(start_agent: StartAgent) -> Agent:
    agent = start_agent(PLUGINS)
    agent.wait_until_running()
    return agent


def test_a_tap_sees_what_the_receiver_stores(agent: Agent, receiver: Receiver, folder: Path) -> None:
    """From its first record of each ring to its last: the same numbers, the same records, a new worker's included."""
    with tapping(agent, folder) as tap:
        tap.wait_for_more("cpu")
        os.kill(agent.worker("cpu"), signal.SIGKILL)
        wait_for(lambda: agent.plugin("cpu").restarts, "cpu has a new worker")
        tap.wait_for_more("cpu")
        tap.wait_for_more("disk")
        assert b"" == tap.end()
        seen = by_ring(tap.records())
    assert [2, 1, 1] == [sum(plugin == name for plugin, _ in seen) for name in PLUGINS]

    def last_are_stored() -> bool:
        stored = by_ring(receiver.query())
        return all(max(seen[ring]) in stored[ring] for ring in seen)

    wait_for(last_are_stored, "the receiver has what the tap saw")
    stored = by_ring(receiver.query())
    for ring, records in seen.items():
        first, last = min(records), max(records)
        assert {seq: record for seq, record in stored[ring].items() if first <= seq <= last} == records
    newest = [records for (plugin, _), records in seen.items() if plugin == "cpu"][1]
    assert 0 == min(newest)


def test_a_tap_holds_nothing_but_read_only_memory(agent: Agent, folder: Path) -> None:
    """No mapping of it accepts a store, no descriptor of a ring is left; the agent's law holds as ever."""
    with tapping(agent, folder) as tap:
        tap.wait_for_more("memory")
        maps = Path(f"/proc/{tap.process.pid}/maps").read_text().splitlines()
        modes = [line.split()[1] for line in maps if "memfd:kon-" in line]
        fds = Path(f"/proc/{tap.process.pid}/fd")
        held = [os.readlink(fd) for fd in fds.iterdir()]
        tap.end()
    assert ["r--s"] * len(PLUGINS) == modes
    assert [] == [name for name in held if "memfd" in name]
    for plugin in agent.status().plugins:
        law.conservation(plugin)


def test_one_plugin_and_one_name(agent: Agent, folder: Path) -> None:
    """Nothing else is shown, and it ends by itself."""
    with tapping(agent, folder, "--plugin", "memory", "--name", "memory_usage_*", "--count", "6") as tap:
        assert 0 == tap.process.wait(15)
        shown = tap.records()
    assert (6, {"memory"}) == (len(shown), {record.plugin for record in shown})
    assert all(record.name.startswith("memory_usage_") for record in shown)


def test_a_reader_that_leaves_ends_it(agent: Agent) -> None:
    """`kon-agent tap | head -1`: no error, no traceback."""
    shown = subprocess.run(  # noqa: S602 - a shell's pipe is what this is about
        f'"{sys.executable}" -m kon_agent.cli.agent tap --socket "{agent.socket}" | head -1',
        shell=True,
        env=environment_of(),
        capture_output=True,
        timeout=15,
        check=True,
    )
    assert (1, b"") == (shown.stdout.count(b"\n"), shown.stderr)
