"""The kernel's files about one process, /proc/PID/…: `_read_*` touches them, `_parse_*` is pure.

Every function raises `OSError` (FileNotFoundError, ProcessLookupError) where the process is gone.
"""

from __future__ import annotations

import os
from typing import Literal

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

MAX_DESCENDANTS = 64  # as many as a worker with programs may have

MemoryKind = Literal["pss", "rss"]


def read_cpu_seconds(pid: int) -> float:
    """Return the processor seconds, user and system, that `pid` has used since it started."""
    return _parse_cpu_ticks(_read(pid, "stat")) / _TICKS_PER_S


def read_family_cpu_seconds(pid: int) -> float:
    """Return the same with what those of its children used that have ended and that it has waited for."""
    return _parse_family_cpu_ticks(_read(pid, "stat")) / _TICKS_PER_S


def read_descendants(pid: int) -> list[int]:
    """Return the processes that `pid` has started and those that these have, the first MAX_DESCENDANTS.

    A kernel without CONFIG_PROC_CHILDREN tells of none.
    """
    found: list[int] = []
    waiting = [pid]
    while waiting and len(found) < MAX_DESCENDANTS:
        parent = waiting.pop()
        try:
            children = [int(word) for word in _read(parent, f"task/{parent}/children").split()]
        except OSError:
            continue
        found += children
        waiting += children
    return found[:MAX_DESCENDANTS]


def read_resident_bytes(pid: int) -> int:
    """Return what `pid` has in memory, pages shared with others included: far cheaper than `read_pss_bytes`."""
    return _parse_rss_pages(_read(pid, "statm")) * _PAGE_BYTES


def read_pss_bytes(pid: int) -> tuple[int, MemoryKind]:
    """Return the memory of `pid` in bytes and what it measures.

    `pss` shares each page among the processes that map it and is what adds up; reading it needs the right to
    trace the process. Where that is missing, `rss`, which counts shared pages in every process.
    """
    try:
        return _parse_pss_bytes(_read(pid, "smaps_rollup")), "pss"
    except OSError:  # not permitted, or a kernel without it; a process that is gone raises again below
        return read_resident_bytes(pid), "rss"


def read_status(pid: int | Literal["self"] = "self") -> dict[str, str]:
    """Return /proc/PID/status as field name to value, for instance `{"CapEff": "0000000000000000"}`."""
    return _parse_status(_read(pid, "status"))


def _read(pid: int | str, name: str) -> str:
    # A process names itself, in any bytes it likes.
    with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
        return file.read()


def _parse_cpu_ticks(text: str) -> int:
    # proc_pid_stat(5): utime and stime are fields 14 and 15; field 2, the name, may itself hold ") ".
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[11]) + int(fields[12])


def _parse_family_cpu_ticks(text: str) -> int:
    # cutime and cstime are fields 16 and 17.
    return sum(map(int, text[text.rindex(")") + 2 :].split()[11:15]))


def _parse_pss_bytes(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0  # a kernel thread or a zombie has no memory


def _parse_rss_pages(text: str) -> int:
    return int(text.split()[1])


def _parse_status(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}
