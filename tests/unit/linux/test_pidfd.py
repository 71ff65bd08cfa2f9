"""A process by descriptor."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator

import pytest

from kon_agent.linux.pidfd import PidFd


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_running_process_has_not_ended(process: subprocess.Popen[bytes]) -> None:
    """wait returns at once, and False, for a process that runs."""
    pidfd = PidFd(process.pid)
    assert not pidfd.wait(0)
    pidfd.close()


def test_a_signal_arrives_and_the_end_shows(process: subprocess.Popen[bytes]) -> None:
    """After SIGKILL the descriptor becomes readable for a selector."""
    pidfd = PidFd(process.pid)
    assert pidfd.send(signal.SIGKILL)
    assert pidfd.wait(10)
    assert ([pidfd], [], []) == select.select([pidfd], [], [], 0)
    pidfd.close()


def test_a_reaped_process_takes_no_signal(process: subprocess.Popen[bytes]) -> None:
    """Once reaped, send says so instead of hitting whoever has the number now."""
    pidfd = PidFd(process.pid)
    process.kill()
    process.wait(10)
    assert not pidfd.send(signal.SIGTERM)
    pidfd.close()


def test_closing_twice_is_harmless(process: subprocess.Popen[bytes]) -> None:
    """A closed PidFd is -1, sends nothing, and never closes somebody else's descriptor."""
    pidfd = PidFd(process.pid)
    pidfd.close()
    other = os.dup(0)
    pidfd.close()
    os.fstat(other)
    os.close(other)
    assert -1 == pidfd.fileno()
    assert not pidfd.send(signal.SIGTERM)
