"""The files of /proc/PID: parsed whatever a process calls itself, and honest about what was measured."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from kon_agent.linux import procfs
from tests.support.waiting import wait_for

NO_SUCH_PID = 2**22 + 1  # above the largest pid_max


def test_cpu_ticks_survive_a_hostile_name() -> None:
    """A process named `x) R 9 (` cannot shift the fields."""
    line = "42 (x) R 9 () S 1 42 42 0 -1 4194560 100 0 0 0 250 50 7 7 20 0 1 0 5 0 0\n"
    assert 300 == procfs._parse_cpu_ticks(line)


def test_pss_is_read_in_bytes() -> None:
    """smaps_rollup speaks of kB; Pss is not Pss_Anon."""
    text = "00400000-7fff [rollup]\nRss:  900 kB\nPss:  12 kB\nPss_Anon:  3 kB\n"
    assert 12 * 1024 == procfs._parse_pss_bytes(text)


def test_no_memory_is_zero() -> None:
    """A kernel thread has an empty smaps_rollup."""
    assert 0 == procfs._parse_pss_bytes("")


def test_resident_pages_are_the_second_field() -> None:
    """statm: size, resident, shared, …"""
    assert 77 == procfs._parse_rss_pages("500 77 12 1 0 40 0\n")


def test_status_is_a_table() -> None:
    """Values keep their inner blanks; an empty one is an empty string."""
    assert {"Uid": "0\t0\t0\t0", "Groups": ""} == procfs._parse_status("Uid:\t0\t0\t0\t0\nGroups:\t \n")


def test_own_cpu_seconds_agree_with_the_clock() -> None:
    """The figure is the process's processor time, to the tick."""
    before = time.process_time()
    measured = procfs.read_cpu_seconds(os.getpid())
    assert before - 0.03 <= measured <= time.process_time() + 0.03


def test_own_pss_is_plausible() -> None:
    """A Python process has megabytes."""
    size, kind = procfs.read_pss_bytes(os.getpid())
    assert kind in ("pss", "rss")
    assert size > 1_000_000


def test_pss_falls_back_to_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trace right is missing the answer is RSS, and says so."""

    def read(pid: int | str, name: str) -> str:
        if name == "smaps_rollup":
            raise PermissionError
        return "500 3 1 1 0 1 0"

    monkeypatch.setattr(procfs, "_read", read)
    assert (3 * os.sysconf("SC_PAGE_SIZE"), "rss") == procfs.read_pss_bytes(1)


@pytest.mark.parametrize("read", [procfs.read_cpu_seconds, procfs.read_pss_bytes, procfs.read_status])
def test_a_process_that_is_gone_is_an_os_error(read) -> None:  # type: ignore[no-untyped-def]
    """Callers catch one exception type."""
    with pytest.raises(OSError):
        read(NO_SUCH_PID)


def test_a_family_counts_what_has_ended() -> None:
    """cutime and cstime come after utime and stime."""
    line = "42 (x) R 9 () S 1 42 42 0 -1 4194560 100 0 0 0 250 50 7 8 20 0 1 0 5 0 0\n"
    assert 315 == procfs._parse_family_cpu_ticks(line)


def test_descendants_are_found_at_any_depth() -> None:
    """A child of a child is one of the family; a process that is not there has none."""
    with subprocess.Popen(["/bin/sh", "-c", "sh -c 'read x; :'; :"], stdin=subprocess.PIPE) as child:
        wait_for(lambda: len(procfs.read_descendants(child.pid)) == 1, "the inner shell runs")
        assert child.pid in procfs.read_descendants(os.getpid())
        assert set(procfs.read_descendants(child.pid)) < set(procfs.read_descendants(os.getpid()))
    assert [] == procfs.read_descendants(NO_SUCH_PID)


def test_what_is_resident_is_no_less_than_the_share() -> None:
    """PSS divides what RSS counts in full."""
    share, _ = procfs.read_pss_bytes(os.getpid())
    assert 0 < share <= procfs.read_resident_bytes(os.getpid()) + 4 * 1024 * 1024
