"""The control client."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kon_agent.cli.client import call
from kon_agent.control_protocol import MAX_RESPONSE_BYTES, Op, Reload, Request, encode_result
from kon_agent.errors import ControlError

if TYPE_CHECKING:
    from tests.unit.cli.conftest import FakeAgent

ASK = Request(op=Op.RELOAD)


def test_answer_is_typed(agent: FakeAgent) -> None:
    """The agent's answer comes back as the type asked for."""
    agent.reply = lambda _: encode_result(Reload(changed=["plugins.cpu"], unchanged=[]))
    assert Reload(changed=["plugins.cpu"], unchanged=[]) == call(agent.path, ASK, Reload)
    assert [ASK] == agent.requests


def test_long_answer_is_put_together(agent: FakeAgent) -> None:
    """An answer longer than a socket buffer arrives whole."""
    names = [f"plugins.{number}" for number in range(50_000)]
    agent.reply = lambda _: encode_result(Reload(changed=names, unchanged=[]))
    assert names == call(agent.path, ASK, Reload).changed


def test_nobody_there_says_how_to_start(tmp_path: Path) -> None:
    """Without a socket the error names the path and the command that helps."""
    path = str(tmp_path / "none.sock")
    with pytest.raises(ControlError, match="no kon-agent answers on") as caught:
        call(path, ASK, Reload)
    assert path in str(caught.value)
    assert ("not_running", "is it running? start it with 'kon-agent run'") == (
        caught.value.code,
        caught.value.hint,
    )


def test_socket_of_a_dead_agent_is_not_running(tmp_path: Path) -> None:
    """A socket file left by a killed agent reads like no agent."""
    path = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(ControlError) as caught:
        call(path, ASK, Reload)
    assert caught.value.code == "not_running"


def test_closed_socket_names_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket one may not open is explained by the group one must be in."""

    class Closed(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Closed)  # root, as which tests run too, may open any
    with pytest.raises(ControlError) as caught:
        call("/run/kon-agent/control.sock", ASK, Reload)
    assert caught.value.code == "permission_denied"
    assert "control.group" in caught.value.hint


def test_path_too_long_is_explained(tmp_path: Path) -> None:
    """A path longer than a socket's address (108 bytes, unix(7)) is an error of ours, not a traceback."""
    with pytest.raises(ControlError, match="too long") as caught:
        call(str(tmp_path / ("x" * 120)), ASK, Reload)
    assert caught.value.code == "bad_socket"


@pytest.mark.parametrize("garbage", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"ok": true, "result": {"cha'])
def test_garbage_is_a_bad_reply(agent: FakeAgent, garbage: bytes) -> None:
    """Something else behind the socket, or an agent dying over its answer, is said plainly."""
    agent.reply = lambda _: garbage
    with pytest.raises(ControlError) as caught:
        call(agent.path, ASK, Reload)
    assert caught.value.code == "bad_reply"


def test_silence_ends_in_time(agent: FakeAgent) -> None:
    """An agent that takes the request and says nothing costs the timeout, not more."""
    agent.reply = lambda _: None
    with pytest.raises(ControlError) as caught:
        call(agent.path, ASK, Reload, timeout_s=0.05)
    assert caught.value.code == "timeout"


def test_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch, agent: FakeAgent) -> None:
    """Many commands at once all get their answer."""
    refusals = [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")] * 3

    class Crowded(socket.socket):
        def connect(self, address: object) -> None:
            if refusals:
                raise refusals.pop()
            super().connect(str(address))

    monkeypatch.setattr(socket, "socket", Crowded)
    agent.reply = lambda _: encode_result(Reload(changed=[], unchanged=[]))
    assert Reload(changed=[], unchanged=[]) == call(agent.path, ASK, Reload)


def test_a_queue_that_stays_full_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that has stopped takes nobody in."""

    class Full(socket.socket):
        def connect(self, address: object) -> None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(socket, "socket", Full)
    with pytest.raises(ControlError) as caught:
        call("/run/kon-agent/control.sock", ASK, Reload, timeout_s=0.05)
    assert caught.value.code == "timeout"


def test_endless_answer_is_cut(agent: FakeAgent) -> None:
    """An answer without end is given up at its bound."""
    agent.reply = lambda _: b"x" * (MAX_RESPONSE_BYTES + 1_000)
    with pytest.raises(ControlError, match="longer than") as caught:
        call(agent.path, ASK, Reload)
    assert caught.value.code == "bad_reply"
