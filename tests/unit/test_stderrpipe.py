"""What a plugin says on standard error comes through, bounded and harmless."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from kon_agent.stderrpipe import MINUTE_NS, PASSED_BYTES, StderrPipe

NOW_NS = 10**12


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[StderrPipe]:
    """A worker's pipe; what is passed on is in `capfd`."""
    made = StderrPipe("worker mine")
    yield made
    if made.read_fd >= 0:
        os.close(made.read_fd)
    if made.write_fd >= 0:
        os.close(made.write_fd)


def test_words_come_through(said: StderrPipe, capfd: pytest.CaptureFixture[str]) -> None:
    """A traceback is what it was; what would steer a terminal is not."""
    os.write(said.write_fd, "Traceback:\n\tValueError: ü\x1b[2J\n".encode())
    said.pass_on(NOW_NS)
    assert "Traceback:\n\tValueError: ü?[2J\n" == capfd.readouterr().err


def test_nothing_said_is_not_waited_for(said: StderrPipe, capfd: pytest.CaptureFixture[str]) -> None:
    """An empty pipe, and one whose worker is gone, cost nothing."""
    said.pass_on(NOW_NS)
    said.handed_out()
    said.pass_on(NOW_NS)
    assert "" == capfd.readouterr().err


def test_a_flood_is_bounded_and_owned_up_to(
    said: StderrPipe, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A minute passes on what it may; how much was left out is said once the minute is over, and then it goes on."""
    flood = b"x" * PASSED_BYTES
    for _ in range(3):
        os.write(said.write_fd, flood)
        said.pass_on(NOW_NS)
    assert PASSED_BYTES == len(capfd.readouterr().err)
    with caplog.at_level(logging.WARNING):
        os.write(said.write_fd, b"again")
        said.pass_on(NOW_NS + MINUTE_NS)
    assert "worker mine: 131072 bytes of its standard error left out" in caplog.text
    assert "again" == capfd.readouterr().err[-5:]


def test_last_words_are_passed_on(said: StderrPipe, capfd: pytest.CaptureFixture[str]) -> None:
    """What a worker says as it dies is not lost with its pipe."""
    os.write(said.write_fd, b"why\n")
    said.handed_out()
    said.close()
    said.read_fd = -1
    assert "why\n" == capfd.readouterr().err
