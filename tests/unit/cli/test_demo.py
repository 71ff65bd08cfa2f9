"""The demo."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kon_agent.cli import demo
from kon_agent.cli.demo import Place, Record
from kon_agent.config.load import load


def _record(plugin: str, name: str = "value", value: float = 1.0, ts_ns: int = 1, **labels: str) -> Record:
    return Record(plugin=plugin, ts_ns=ts_ns, name=name, value=value, labels=labels)


def test_configuration_is_valid(tmp_path: Path) -> None:
    """The demo's configuration passes the agent's own loader and keeps every file in the folder."""
    place = Place(tmp_path, 4711)
    place.config.write_text(demo.agent_yaml(place, "edge-1"))
    config = load(str(place.config))
    assert ["quic://127.0.0.1:4711"] == config.servers()
    assert "edge-1" == config.client_id
    enabled = {name: float(plugin.period) for name, plugin in config.plugins.by_name().items() if plugin.enable}
    assert dict.fromkeys(demo.PLUGINS, 2.0) == enabled
    files = (config.control.socket, config.cache.path, config.tls.ca, config.tls.cert, config.tls.key)
    assert [str(tmp_path / name) for name in ("control.sock", "spool", "ca.pem", "edge-1.pem", "edge-1.key")] == [
        *files
    ]


def test_latest_keeps_the_newest_of_each_series() -> None:
    """Of several records of one series the newest counts; series differ by labels."""
    old, new = _record("cpu", mode="user"), _record("cpu", ts_ns=2, mode="user")
    other = _record("cpu", mode="idle")
    assert {"cpu": {"value": [other, new]}} == demo.latest([new, old, other])


@pytest.mark.parametrize(("words", "code"), [("exit 3", 3), ("killed by SIGKILL", -9)])
def test_exit_in_words(words: str, code: int) -> None:
    """An exit code names the signal where there was one."""
    assert words == demo._exit_in_words(code)


def test_given_folder_is_kept_and_closed(tmp_path: Path) -> None:
    """A folder the user names is made private and stays; one of our own vanishes."""
    with demo._private(tmp_path / "a" / "b") as folder:
        assert 0o700 == folder.stat().st_mode & 0o777
    assert folder.is_dir()
    with demo._private(None) as temporary:
        assert 0o700 == temporary.stat().st_mode & 0o777
    assert not temporary.exists()


class Stage:
    """Receiver and agent played by small programs that note in a file that they are up, and were told to end.

    Attributes:
        log: what happened, in order.
        stubborn: whoever is named here does not end on SIGTERM.
        at_query: called at every look into the store.
        plugins: those with a record in the store once both programs are up.
    """

    PROGRAM = """
import os, signal, sys
log, name, is_stubborn = sys.argv[1:]
def note(event):
    with open(log, "a") as file:
        print(name, event, file=file)
def end(*_):
    note("told")
    if not is_stubborn:
        sys.exit()
signal.signal(signal.SIGTERM, end)
note(f"up {os.getpid()}")
while True:
    signal.pause()
"""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.stubborn = ""
        self.plugins: Sequence[str] = demo.PLUGINS
        self.at_query: Callable[[], None] = lambda: None

    def command(self, name: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            self.PROGRAM,
            str(self.log),
            name,
            name if name == self.stubborn else "",
        ]

    def query(self, place: Place) -> list[Record]:
        self.at_query()
        return [_record(name) for name in self.plugins] if self.events("up") else []

    def events(self, kind: str) -> list[str]:
        """Return who noted `kind`, in order; nothing before both are up."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        is_up = sum(line[1] == "up" for line in lines) == 2
        return [line[0] for line in lines if line[1] == kind] if is_up else []

    def pids(self) -> list[int]:
        """Return the programs' process ids."""
        return [int(line.split()[2]) for line in self.log.read_text().splitlines() if " up " in line]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The demo with both programs played; afterwards neither may be left."""
    stage = Stage(tmp_path)
    monkeypatch.setattr(demo, "_prepare", lambda place: None)
    monkeypatch.setattr(demo, "_receiver_command", lambda place: stage.command("receiver"))
    monkeypatch.setattr(demo, "_agent_command", lambda place: stage.command("agent"))
    monkeypatch.setattr(demo, "_query", stage.query)
    monkeypatch.setattr(demo, "POLL_S", 0.02)
    yield stage
    assert [] == [pid for pid in stage.pids() if os.path.exists(f"/proc/{pid}")]


def test_shows_what_is_stored_and_ends_in_time(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """With records of every plugin the table is shown, and the end of the time is a success."""
    assert 0 == demo.run(None, 0.5)
    assert {"cpu", "memory", "disk", "agent"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["value"]
    }


def test_agent_ends_before_receiver(stage: Stage) -> None:
    """A signal ends the demo well, and the agent is told first, so that it can deliver."""
    stage.at_query = lambda: os.kill(os.getpid(), signal.SIGTERM) if stage.events("up") else None
    assert 0 == demo.run(None, None)
    assert ["agent", "receiver"] == stage.events("told")


def test_missing_records_are_a_failure(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """A time that ends before every plugin was heard of is a failure that names the silent."""
    stage.plugins = ["cpu", "memory", "agent", "ebpf"]
    assert 1 == demo.run(None, 0.3)
    assert "there is no record of disk" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["receiver", "agent"])
def test_a_death_is_told_and_ends_the_other(
    stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever dies is named with its exit code, and the other one is ended."""
    monkeypatch.setattr(demo, f"_{name}_command", lambda place: [sys.executable, "-c", "raise SystemExit(78)"])
    assert 1 == demo.run(None, None)
    assert f"the {name} has ended: exit 78" in capsys.readouterr().err


def test_the_stubborn_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM is gone after the timeout all the same."""
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.2)
    stage.stubborn = "agent"
    stage.at_query = lambda: os.kill(os.getpid(), signal.SIGTERM) if stage.events("up") else None
    assert 0 == demo.run(None, None)
    assert ["agent", "receiver"] == stage.events("told")


def test_without_root_procfs_is_announced(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary user sees all plugins, and is told where their packets are counted."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert 0 == demo.run(None, 0.5)
    assert "not root: packets are counted as far as procfs does" in capsys.readouterr().out
