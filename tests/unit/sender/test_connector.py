"""Which server is tried when: their order, and the rest of those that keep failing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kon_agent import clock
from kon_agent.breaker import FIRST_REST_S
from kon_agent.clock import NS_PER_S
from kon_agent.config.server import ServerAddress, parse_server
from kon_agent.linkreport import REPORT_BYTES, LinkState
from kon_agent.page import PageWriter, page_size
from kon_agent.sender import connector as connector_module
from kon_agent.sender.connector import GO_BACK_EVERY_S, Connector
from kon_agent.sender.dialect import Answer
from kon_agent.spec import SenderSpec

FIRST, SECOND = "first:1", "second:2"
ROUND_S = 1.0


class Enough(Exception):
    """The script is over."""


class World:
    """Servers that answer as they are told, and a clock that a round moves on by ROUND_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, servers: Sequence[str], rounds: int) -> None:
        self.tried: list[str] = []
        self.works: Callable[[str], bool] = lambda _: False
        self._now_ns = 1_000 * NS_PER_S
        self._rounds = rounds
        monkeypatch.setattr(connector_module, "configure", lambda _: None)
        monkeypatch.setattr(clock, "now_ns", lambda: self._now_ns)
        monkeypatch.setattr(asyncio, "sleep", self._sleep)
        page = PageWriter(memoryview(bytearray(page_size(REPORT_BYTES))))
        credentials = type("Credentials", (), {"token": ""})()
        spec: Any = type("Spec", (), {})()
        spec.servers = [parse_server(f"quic://{server}") for server in servers]
        spec.report, spec.agent_id, spec.credentials = page, "edge-1", credentials
        self.connector = Connector(cast(SenderSpec, spec), has_backlog=False, client=cast(Any, self))
        monkeypatch.setattr(self.connector, "_converse", self._converse)

    async def _converse(self, server: ServerAddress) -> str:
        self.tried.append(str(server))
        self.connector._has_answered = False
        if self.works(str(server)):
            self.connector._answered([Answer(1, {})])
        return "no answer"

    async def _sleep(self, _: float) -> None:
        self._now_ns += int(ROUND_S * NS_PER_S)
        self._rounds -= 1
        if not self._rounds:
            raise Enough

    def on_answers(self, answers: list[Answer]) -> None:
        """Take the answers."""

    def run(self) -> list[str]:
        """Return the servers tried, in order."""
        with pytest.raises(Enough):
            asyncio.run(self.connector.run())
        return self.tried


def test_servers_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preferred one first, in every round."""
    assert [FIRST, SECOND, FIRST, SECOND] == World(monkeypatch, [FIRST, SECOND], 2).run()


def test_one_that_keeps_failing_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After five failures in a row the other is asked alone; after the rest, the first is asked once more."""
    world = World(monkeypatch, [FIRST, SECOND], 40)
    world.works = lambda server: server == SECOND
    tried = world.run()
    assert 5 == tried[:10].count(FIRST)
    assert [SECOND] * 14 == tried[10:24]
    assert 1 <= tried[10:].count(FIRST) <= 2


def test_the_only_server_never_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing else to ask, the wait between attempts is all the rest there is."""
    assert [FIRST] * 30 == World(monkeypatch, [FIRST], 30).run()


def test_all_resting_are_all_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the whole network opens every breaker, and is over as soon as anyone answers."""
    world = World(monkeypatch, [FIRST, SECOND], 20)
    world.works = lambda server: server == FIRST and len(world.tried) > 30
    tried = world.run()
    assert [FIRST, SECOND] * 15 == tried[:30]
    assert [FIRST] * 4 == tried[-4:]


def test_one_that_acknowledges_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that welcomes us and then never acknowledges is one that fails: the next one is tried."""
    world = World(monkeypatch, [FIRST, SECOND], 3)

    async def welcome(server: ServerAddress) -> str:
        world.tried.append(str(server))
        world.connector._has_served, world.connector._has_answered = True, False
        return "an acknowledgement is overdue"

    monkeypatch.setattr(world.connector, "_converse", welcome)
    assert [FIRST, SECOND] * 3 == world.run()


def test_the_preferred_server_is_asked_again_once_it_has_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a lesser one serves, one whose breaker is open is left alone; that it can be dialled is no success."""
    world = World(monkeypatch, [FIRST, SECOND], 1)
    connector, asked = world.connector, []

    def note(work: Any) -> None:
        work.close()
        asked.append(FIRST)

    connector._link = connector._dialect = cast(Any, SimpleNamespace(keep_alive=lambda: None, rtt_us=0))
    connector._show(LinkState.CONNECTED, SECOND, "")
    monkeypatch.setattr(connector, "_later", note)
    breaker = connector._breakers[FIRST]
    for _ in range(5):
        breaker.failed(clock.now_ns())
    connector.tick(clock.now_ns() + 1, None)
    assert [] == asked
    rested_ns = clock.now_ns() + int((FIRST_REST_S + GO_BACK_EVERY_S) * NS_PER_S)
    connector.tick(rested_ns, None)
    assert ([FIRST], "half_open") == (asked, breaker.state.value)
