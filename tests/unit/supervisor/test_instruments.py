"""kon_agent.supervisor.instruments: open before a worker, closed when none is wanted; where there is none, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from kon_agent.bpf.origin import MAX_REASON_CHARS, Origin, origin_of
from kon_agent.bpf.probe import Probe
from kon_agent.bpf.rows import ProbeSpec
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Duration, PluginConfig, TcpConfig
from kon_agent.errors import BpfError
from kon_agent.supervisor import instruments
from kon_agent.supervisor.instruments import Instrument, Tracing
from tests.unit.supervisor.fakes import START_NS, Plugin, ended, make_plugin

SPEC = ProbeSpec("kon_test", 64, settings_bytes=64, settings=lambda config: getattr(config, "namespaces", "").encode())


class Journal(Instrument):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def open(self, config: PluginConfig) -> None:
        self.notes.append("open")

    def grants(self) -> Mapping[str, memoryview]:
        self.notes.append("map")
        return {"thing": memoryview(b"x")}

    def close(self) -> None:
        self.notes.append("close")


class Board:
    """Shows warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.said.append(text)

    def withdraw(self, text: str) -> None:
        self.warnings.remove(text)


class LoadedProbe:
    """A probe that is not there."""

    def __init__(self, config: PluginConfig) -> None:
        self.config = config
        self.is_open = True
        self.origin = Origin("bpf")

    def grants(self) -> dict[str, memoryview]:
        return {"rows": memoryview(bytes(64)), **self.origin.grant()}

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Plugin, Journal]]:
    """Return a unit with an instrument that keeps a journal."""
    made = make_plugin(monkeypatch)
    journal = Journal()
    made.unit._instrument = journal
    yield made, journal
    made.release()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[LoadedProbe]:
    """Return the probes that will have been loaded."""
    loaded: list[LoadedProbe] = []

    def load(spec: ProbeSpec, config: PluginConfig) -> LoadedProbe:
        loaded.append(LoadedProbe(config))
        return loaded[-1]

    monkeypatch.setattr(Probe, "load", load)
    return loaded


def test_an_instrument_is_there_before_the_worker_and_outlives_it(plugin: tuple[Plugin, Journal]) -> None:
    """What counts in the kernel goes on while a worker is replaced: nothing is missed meanwhile."""
    made, journal = plugin
    made.start()
    made.die()
    made.start()
    assert ["open", "map", "open", "map"] == journal.notes


def test_an_instrument_goes_with_the_last_worker(plugin: tuple[Plugin, Journal]) -> None:
    """A disabled plugin costs nothing: its programs are detached once its worker has ended, not before."""
    made, journal = plugin
    made.start()
    made.unit.is_wanted = False
    made.unit.stop(START_NS)
    assert "close" not in journal.notes
    made.unit.gone(ended(made.unit.child), START_NS + NS_PER_S)
    assert "close" == journal.notes[-1]


def test_what_is_granted_reaches_the_worker(plugin: tuple[Plugin, Journal]) -> None:
    """The worker has what the instrument maps, by the same name."""
    made, _ = plugin
    made.start()
    assert ["thing"] == list(made.specs[-1].grants)


def test_without_bpf_the_worker_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is one warning in the status and a reason in the worker's hands; closing takes the warning back."""

    def refuse(spec: ProbeSpec, config: PluginConfig) -> LoadedProbe:
        raise BpfError("no BTF\nat all" + " and much more" * 100)

    monkeypatch.setattr(Probe, "load", refuse)
    board = Board()
    tracing = Tracing("tcp", SPEC, board)
    tracing.open(TcpConfig())
    tracing.open(TcpConfig())
    [warning] = board.said
    origin = origin_of(tracing.grants())
    assert warning.startswith("tcp reads procfs instead of BPF: ")
    assert "no BTF | at all" in warning
    assert len(warning) < 2 * instruments.MAX_OBSTACLE_CHARS
    assert ("procfs", MAX_REASON_CHARS) == (origin.source, len(origin.reason)), "it becomes a label"
    tracing.close()
    assert [] == board.warnings


def test_a_probe_goes_on_as_long_as_its_settings_do(probes: list[LoadedProbe]) -> None:
    """Another worker reads the same counters; only other settings take another probe, and the old one goes first."""
    tracing = Tracing("tcp", SPEC, Board())
    tracing.open(TcpConfig())
    tracing.open(TcpConfig(period=Duration(1.0)))
    assert [True] == [probe.is_open for probe in probes]
    tracing.open(TcpConfig(namespaces="own"))
    assert [False, True] == [probe.is_open for probe in probes]
    assert "bpf" == origin_of(tracing.grants()).source
    tracing.close()
    assert [False, False] == [probe.is_open for probe in probes]


def test_an_instrument_goes_with_a_plugin_that_has_no_worker(plugin: tuple[Plugin, Journal]) -> None:
    """Disabled while it waits to be restarted, a plugin leaves no programs behind either."""
    made, journal = plugin
    made.start()
    made.die()
    assert "close" not in journal.notes
    made.unit.is_wanted = False
    made.unit.stop(START_NS)
    assert "close" == journal.notes[-1]


def test_a_paused_plugin_keeps_its_instrument(plugin: tuple[Plugin, Journal]) -> None:
    """What the governor pauses is still wanted: its counters go on, and nothing is reset when it runs again."""
    made, journal = plugin
    made.start()
    made.unit.pause("too much memory", START_NS)
    made.unit.gone(ended(made.unit.child), START_NS)
    made.unit.pause("too much memory", START_NS)
    assert "close" not in journal.notes


def test_a_bug_in_an_instrument_is_one_plugins_affair(plugin: tuple[Plugin, Journal]) -> None:
    """Whatever opening raises is a death with its reason, and closing cannot end the supervisor."""
    made, journal = plugin

    def fail(*_: object) -> None:
        raise RuntimeError("never thought of")

    journal.open = journal.close = fail  # type: ignore[method-assign]
    made.unit.spawn(START_NS)
    assert (None, "could not be started: RuntimeError: never thought of") == (made.unit.pid, made.unit.last_exit)
    made.unit.is_wanted = False
    made.unit.stop(START_NS)
