"""The sender's side of the spool, on disks that fail and come back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.page import PageReader, PageWriter, page_size
from kon_agent.sender.backlog import RETRY_S, Backlog
from kon_agent.spec import SpoolSeat
from kon_agent.spool.disk import Folder
from kon_agent.spool.limits import Limits
from kon_agent.spoolreport import REPORT_BYTES, SpoolMode, SpoolReport

WALL_S = 1_800_000_000.0
RETRY_NS = int(RETRY_S * NS_PER_S)
MIN_FREE = 1000


def seat(folder_fd: int, obstacle: str = "") -> SpoolSeat:
    """Return a way to the spool."""
    page = memoryview(bytearray(page_size(REPORT_BYTES)))
    return SpoolSeat(folder_fd, obstacle, Limits(1 << 20, 3600.0, MIN_FREE), PageWriter(page), PageReader(page))


def mode(place: SpoolSeat) -> SpoolMode:
    """Return what the spool says it is doing."""
    return SpoolReport.decode(place.reader.read() or b"").mode


@pytest.fixture
def place(tmp_path: Path) -> Iterator[SpoolSeat]:
    """A way to an empty folder."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield seat(fd)
    os.close(fd)


def test_no_folder_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often records are to be kept, why they cannot be is said at the start and no more."""
    backlog = Backlog(seat(-1, "it is a file"), ["cpu"])
    with caplog.at_level(logging.WARNING):
        backlog.open(WALL_S)
        for tries in range(3):
            backlog.insist()
            assert not backlog.keep([], (tries + 1) * RETRY_NS * 2, WALL_S)
    assert 1 == caplog.text.count("no spool: it is a file")


def test_a_disk_that_works_again_shows_it(place: SpoolSeat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode leaves `memory` when the disk has room again, although nothing has to be kept."""
    backlog = Backlog(place, ["cpu"])
    backlog.open(WALL_S)
    monkeypatch.setattr(Folder, "free_bytes", lambda _: MIN_FREE - 1)
    assert not backlog.keep([], RETRY_NS, WALL_S)
    backlog.show(is_connected=True)
    assert SpoolMode.MEMORY == mode(place)
    backlog.retry(2 * RETRY_NS, WALL_S)
    backlog.show(is_connected=True)
    assert SpoolMode.MEMORY == mode(place)
    monkeypatch.undo()
    backlog.retry(2 * RETRY_NS + 1, WALL_S)  # too soon
    backlog.show(is_connected=True)
    assert SpoolMode.MEMORY == mode(place)
    backlog.retry(3 * RETRY_NS, WALL_S)
    backlog.show(is_connected=True)
    assert SpoolMode.IDLE == mode(place)


def test_a_spool_that_could_not_be_opened_is_opened_later(place: SpoolSeat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be read at the start is tried again, at most every RETRY_S."""
    tries = 0

    def refuse(_: Folder) -> list[str]:
        nonlocal tries
        tries += 1
        raise OSError(5, "Input/output error")

    backlog = Backlog(place, ["cpu"])
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "names", refuse)
        backlog.open(WALL_S)
        for step in range(10):
            backlog.retry(RETRY_NS + step, WALL_S)
        assert 2 == tries
        backlog.show(is_connected=False)
        assert SpoolMode.MEMORY == mode(place)
    backlog.retry(2 * RETRY_NS + 10, WALL_S)
    backlog.show(is_connected=False)
    assert SpoolMode.IDLE == mode(place)
    assert backlog.keep([], 2 * RETRY_NS + 11, WALL_S)  # and takes records at once
