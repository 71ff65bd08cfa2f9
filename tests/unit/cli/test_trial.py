"""One collection in the foreground."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable

import pytest

from kon_agent.cli import trial
from kon_agent.config.schema import Config, PluginConfig
from kon_agent.errors import ControlError, NoData
from kon_agent.metric import Metric
from kon_agent.plugins import BUILTIN
from kon_agent.plugins.context import Context


class Rate:
    """A collector that has nothing to say the first time."""

    calls: list[str] = []  # noqa: RUF012 - each test empties it

    def __init__(self, config: PluginConfig, context: Context) -> None:
        self.calls.clear()

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def collect(self) -> Iterable[Metric]:
        self.calls.append("collect")
        if self.calls.count("collect") == 1:
            raise NoData("nothing to compare with")
        return [Metric("rate", 1.0), Metric("stamped", 2.0, ts_ns=7)]


class Raising(Rate):
    """A collector with a bug in its collection."""

    def collect(self) -> Iterable[Metric]:
        raise ZeroDivisionError


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `cpu` be one of the collectors above, and the interval be short."""
    module = types.ModuleType("fake_collectors")
    module.Rate, module.Raising = Rate, Raising  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_collectors", module)
    monkeypatch.setitem(BUILTIN, "cpu", "fake_collectors:Rate")
    monkeypatch.setattr(trial, "INTERVAL_S", 0.0)


def test_second_cycle_is_what_counts() -> None:
    """A rate plugin is started, asked twice and stopped; its second answer is returned, with time stamps."""
    rate, stamped = trial.collect("cpu", Config())
    assert ["start", "collect", "collect", "stop"] == Rate.calls
    assert rate.ts_ns > 0
    assert 7 == stamped.ts_ns


def test_plugin_is_stopped_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that raises is stopped all the same, and its own exception reaches its author."""
    monkeypatch.setitem(BUILTIN, "cpu", "fake_collectors:Raising")
    with pytest.raises(ZeroDivisionError):
        trial.collect("cpu", Config())
    assert ["start", "stop"] == Rate.calls


def test_agent_needs_the_agent() -> None:
    """The plugin that reports on the agent says that it has nothing to report on, and where to look."""
    with pytest.raises(ControlError, match="running agent") as caught:
        trial.collect("agent", Config())
    assert "kon-agent status" in caught.value.hint
