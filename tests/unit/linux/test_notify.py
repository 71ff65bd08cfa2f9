"""sd_notify, with and without a service manager."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kon_agent.linux.notify import notify, watchdog_interval_s


def listen(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(5)
    return sock


def test_without_a_manager_nothing_happens() -> None:
    """No NOTIFY_SOCKET: silence."""
    assert not notify("READY=1", {})


def test_a_path_receives_the_state(tmp_path: Path) -> None:
    """One datagram with exactly the state."""
    with listen(str(tmp_path / "s")) as sock:
        assert notify("READY=1\nSTATUS=läuft", {"NOTIFY_SOCKET": str(tmp_path / "s")})
        assert "READY=1\nSTATUS=läuft".encode() == sock.recv(100)


def test_an_abstract_name_receives_the_state() -> None:
    """`@name` stands for the abstract socket of that name."""
    name = f"kon-agent-test-{os.getpid()}"
    with listen("\0" + name) as sock:
        assert notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name})
        assert b"STOPPING=1" == sock.recv(100)


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """The agent does not fail because its manager does."""
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})


@pytest.mark.parametrize(
    ("expected", "environ"),
    [
        (None, {}),
        (None, {"WATCHDOG_USEC": "0"}),
        (None, {"WATCHDOG_USEC": "soon"}),
        (15.0, {"WATCHDOG_USEC": "30000000"}),
        (15.0, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}),
        (None, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}),
    ],
)
def test_the_watchdog_is_fed_at_half_time(expected: float | None, environ: dict[str, str]) -> None:
    """Half the manager's patience, and only where it watches this very process."""
    assert expected == watchdog_interval_s(environ, pid=7)
