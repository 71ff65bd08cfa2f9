"""The real folder keeps what the spool expects of a disk, and its lock has one holder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kon_agent.errors import SpoolError
from kon_agent.spool import lock
from kon_agent.spool.disk import BLOCK_BYTES, Folder, on_disk
from tests.support.program import environment_of

HOLD = """
import os, sys
from kon_agent.spool.disk import Folder
folder = Folder(os.open(sys.argv[1], os.O_RDONLY))
folder.lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """An empty folder."""
    folder = Folder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    yield folder
    folder.release()


def test_a_file_is_written_cut_back_and_removed(folder: Folder) -> None:
    """Each operation does what its name says, and writing goes on behind what was kept."""
    fd = folder.create("a")
    folder.write(fd, b"0123456789")
    folder.sync(fd)
    folder.truncate(fd, 4)
    folder.write(fd, b"xy")
    folder.close(fd)
    folder.harden("a")
    assert b"0123xy" == folder.read("a", 0, 100)
    assert b"3x" == folder.read("a", 3, 2)
    facts = folder.facts("a")
    assert facts is not None
    assert (6, True) == (facts.size, facts.disk_bytes <= on_disk(6))
    assert ["a"] == folder.names()
    folder.unlink("a")
    assert [] == folder.names()
    assert 0 < folder.free_bytes()


def test_a_name_is_created_once(folder: Folder) -> None:
    """A file that is there is never written over."""
    folder.close(folder.create("a"))
    with pytest.raises(FileExistsError):
        folder.create("a")


def test_a_file_whose_folder_cannot_be_synced_is_not_left(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that might be gone after a power cut is not used, and not left either."""

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output"):
        folder.create("a")
    assert [] == folder.names()
    assert before == len(os.listdir("/proc/self/fd"))


def test_what_is_no_file_is_not_ours(folder: Folder, tmp_path: Path) -> None:
    """Folders, links and pipes are not files, and opening them for reading neither follows nor waits."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    for name in ("dir", "link", "pipe"):
        assert folder.facts(name) is None
        with pytest.raises(OSError, match=r"Errno"):
            folder.read(name, 0, 1)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 16384, 16385, 1_000_000])
def test_what_a_file_takes_is_not_underestimated(folder: Folder, size: int) -> None:
    """`on_disk` is at least what `du` shows of a file written in many pieces."""
    fd = folder.create("a")
    for at in range(0, size, 999):
        folder.write(fd, bytes(min(999, size - at)))
        folder.sync(fd)
    facts = folder.facts("a")
    assert facts is not None
    assert facts.disk_bytes <= on_disk(size) <= size + 2 * BLOCK_BYTES
    folder.close(fd)


def test_a_folder_has_one_user(folder: Folder, tmp_path: Path) -> None:
    """Another process is refused, told the holder's pid, and let in once the holder is dead, however it died."""
    fd = os.open(tmp_path, os.O_RDONLY)
    assert lock.holder(fd) is None
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment_of(), text=True
    ) as process:
        assert process.stdout is not None
        assert "held\n" == process.stdout.readline()
        for _ in range(2):  # asking does not take it
            assert process.pid == lock.holder(fd)
        with pytest.raises(SpoolError, match=rf"in use by pid {process.pid}; stop that agent or choose another"):
            folder.lock()
        process.kill()
    assert lock.holder(fd) is None
    folder.lock()
    folder.lock()  # it is ours: no reason to refuse
    assert os.getpid() == lock.holder(fd)
    os.close(fd)


def test_a_lock_is_taken_where_its_pid_cannot_be_written(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the spool still has one user; only who that is remains unknown."""

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    folder.lock()
    fd = os.open(tmp_path, os.O_RDONLY)
    assert 0 == lock.holder(fd)
    os.close(fd)


def test_a_file_removed_by_somebody_else_is_not_durable(folder: Folder) -> None:
    """What goes into a file that has no name any more would be gone with its descriptor: syncing it fails."""
    fd = folder.create("a")
    folder.write(fd, b"0")
    folder.unlink("a")
    with pytest.raises(FileNotFoundError, match="removed by somebody else"):
        folder.sync(fd)
    folder.close(fd)
