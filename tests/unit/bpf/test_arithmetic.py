"""The arithmetic of the BPF programs, compiled for this machine: buckets, stamps, columns, to the last bound.

What the programs see of the kernel is not there; only functions are called that need nothing of it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kon_agent.bpf import drops, latency, tcp

EBPF = Path(__file__).parents[3] / "ebpf"
# CO-RE's questions to the loader have no answer outside of BPF, and are not asked by what is called here.
NO_LOADER = ("-D__builtin_preserve_field_info(...)=1", "-D__builtin_preserve_type_info(...)=1")


def compiled(folder: Path, source: str, functions: str) -> ctypes.CDLL:
    """Return a source or header of the programs as a shared library, with functions that call those within."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    library = folder / "library.so"
    command = ["clang", "-shared", "-fPIC", "-O2", "-w", *NO_LOADER, "-I", str(EBPF), "-x", "c", "-", "-o"]
    text = f'#include "{source}"\n{functions}\n'
    subprocess.run([*command, str(library)], input=text, text=True, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def test_a_duration_is_in_the_first_bucket_it_does_not_exceed(tmp_path: Path) -> None:
    """At every bound and a nanosecond beside it; what exceeds them all, however far, is in the last bucket."""
    library = compiled(tmp_path, "kon_latency.h", "__u32 bucket(__u64 ns) { return kon_latency_bucket(ns); }")
    library.bucket.argtypes = [ctypes.c_uint64]
    for place, bound_s in enumerate(latency.BOUNDS_S):
        bound_ns = round(bound_s * 1e9)
        around = (bound_ns // 2 + 1, bound_ns, bound_ns + 1)
        assert [place, place, place + 1] == [library.bucket(ns) for ns in around]
    assert 0 == library.bucket(0)
    assert [latency.BUCKETS - 1] * 3 == [library.bucket(ns) for ns in (1 << 31, 1 << 32, (1 << 64) - 1)]


def test_a_bucket_of_tcp_likewise(tmp_path: Path) -> None:
    """Microseconds, from 64 on."""
    call = "__u32 bucket(__u64 us) { return kon_bucket_of(us, KON_TCP_FIRST_BOUND, KON_TCP_BUCKETS); }"
    library = compiled(tmp_path, "kon_tcp.bpf.c", call)
    library.bucket.argtypes = [ctypes.c_uint64]
    for place, bound_s in enumerate(tcp.BOUNDS_S):
        bound_us = round(bound_s * 1e6)
        assert (place, place + 1) == (library.bucket(bound_us), library.bucket(bound_us + 1))
    assert (0, tcp.BUCKETS - 1) == (library.bucket(1), library.bucket((1 << 64) - 1))


def test_a_stamp_is_of_one_task(tmp_path: Path) -> None:
    """Of two tasks that meet in one place each knows its own; the time in it is to the nanosecond."""
    calls = """
        __u64 make(__u32 pid, __u64 now) { return stamp(pid, now); }
        int is_of(__u32 pid, __u64 found) { return is_stamp_of(pid, found); }
    """
    library = compiled(tmp_path, "kon_runqlat.bpf.c", calls)
    library.make.argtypes, library.make.restype = [ctypes.c_uint32, ctypes.c_uint64], ctypes.c_uint64
    library.is_of.argtypes = [ctypes.c_uint32, ctypes.c_uint64]
    now_ns, pid, other = 9 * 365 * 86_400 * 10**9, 4_194_303, 4_194_303 - 65536
    stamp = library.make(pid, now_ns)
    assert now_ns == stamp >> 6
    assert [1, 0, 0] == [library.is_of(*which) for which in ((pid, stamp), (other, stamp), (pid, 0))]


def test_a_reason_has_its_column(tmp_path: Path) -> None:
    """The core's own, one for each subsystem, and one for all beyond."""
    library = compiled(tmp_path, "kon_drops.bpf.c", "__u32 column(__u32 reason) { return column_of(reason); }")
    core, other = drops.CORE_REASONS, drops.OTHER_COLUMN
    expected = {0: 0, core - 1: core - 1, core: other, 1 << 16: core, 1 << 16 | 7: core, 2 << 16: core + 1}
    expected |= {15 << 16: other - 1, 16 << 16: other, 0xFFFFFFFF: other}
    assert expected == {reason: library.column(reason) for reason in expected}
    named = drops.names({"skb_drop_reason": {2: "SKB_DROP_REASON_NOT_SPECIFIED"}, "skb_drop_reason_subsys": {1: "X"}})
    assert "x" == named[library.column(1 << 16)]
