"""The probes of the scheduler and of the block layer in this kernel, beside what the kernel itself accounts.

Both see the whole machine. So the scheduler's is held against the waits of processes of ours (sched_info in
/proc/PID/schedstat), which are a part of what it counts; the block layer's against a loop device that nobody else has.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf import biolat, libbpf, runqlat
from kon_agent.bpf.latency import BOUNDS_S, Latency, latency_of
from kon_agent.bpf.probe import Probe
from kon_agent.bpf.rows import ProbeSpec, sum_rows
from kon_agent.bpf.selfcost import map_costs
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import BiolatConfig, PluginConfig, RunqlatConfig
from kon_agent.errors import BpfError
from kon_agent.plugins.biolat import Biolat
from kon_agent.plugins.context import Context
from kon_agent.plugins.runqlat import Runqlat
from tests.support.bpf_programs import is_loaded, own_programs
from tests.support.loop_device import completed, loop_device, number_of
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/sys/kernel/btf/vmlinux"), reason="needs a kernel with BTF"),
]
needs_accounting = pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="needs a kernel with CONFIG_SCHED_INFO"
)
needs_losetup = pytest.mark.skipif(
    shutil.which("losetup") is None or not os.path.exists("/dev/loop-control"), reason="needs losetup and loop devices"
)

BLOCK_BYTES = 4096
BLKDISCARD = 0x1277  # linux/fs.h
WAIT_NS = 500_000_000  # a hundred waits and more
# While a program comes to a tracepoint or leaves it (another test's, another agent's), the kernel skips some of the
# calls of those that are there: measured, one or two for every hundred comings and goings.
SEEN = 0.9
ROUNDS = 200


@contextmanager
def probe(spec: ProbeSpec, config: PluginConfig) -> Iterator[Probe]:
    """Have a probe in the kernel."""
    loaded = Probe.load(spec, config)
    try:
        yield loaded
    finally:
        loaded.close()


@contextmanager
def children(cpu: int, count: int, body: Callable[[], None]) -> Iterator[list[int]]:
    """Have processes bound to a CPU, which are there and do `body`; they are killed afterwards."""
    ready, there = os.pipe()
    pids = []
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException):
                    os.sched_setaffinity(0, {cpu})  # returns on that CPU; others see the new set before
                    os.write(there, b".")
                    body()
                os._exit(0)
            pids.append(pid)
        for _ in pids:
            os.read(ready, 1)
        yield pids
    finally:
        os.close(ready)
        os.close(there)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def spin() -> None:
    """Want the CPU."""
    while True:
        pass


def accounted(pids: list[int]) -> tuple[int, int]:
    """Return how many nanoseconds these processes have waited to run, and how many times they then ran."""
    delay_ns = times = 0
    for pid in pids:
        _, delay, slices = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
        delay_ns, times = delay_ns + int(delay), times + int(slices)
    return delay_ns, times


def waits(rows: memoryview, cpu: int) -> tuple[Latency, int]:
    """Return a CPU's waits, and how many were missed."""
    columns = sum_rows(rows, runqlat.ROW_BYTES, cpu, 1)
    return latency_of(columns), columns[runqlat.MISSED]


def grown(before: Latency, after: Latency) -> Latency:
    """Return what has been observed in between."""
    counts = [late - early for early, late in zip(before.counts, after.counts, strict=True)]
    return Latency(counts, after.total_s - before.total_s)


def assert_sum_fits_buckets(latency: Latency) -> None:
    """Each duration lies above the bound below its bucket and not above its own, and so do their sums."""
    *counts, beyond = latency.counts
    lower = sum(count * bound for count, bound in zip(latency.counts, (0.0, *BOUNDS_S), strict=True))
    assert lower <= latency.total_s + 1e-9
    if not beyond:
        assert latency.total_s <= sum(count * bound for count, bound in zip(counts, BOUNDS_S, strict=True)) + 1e-9


@needs_accounting
def test_waits_for_a_busy_cpu_are_those_the_kernel_accounts() -> None:
    """Two that want one CPU: its sum and count rise by what both have waited, and more only by what others waited."""
    cpu = min(os.sched_getaffinity(0))
    with probe(runqlat.SPEC, RunqlatConfig()) as loaded, children(cpu, 2, spin) as pids:
        rows = loaded.map_rows()
        before, missed_before = waits(rows, cpu)
        delay_before, times_before = accounted(pids)
        wait_for(lambda: accounted(pids)[0] - delay_before > WAIT_NS, "both have waited for each other")
        delay, times = accounted(pids)
        after, missed = waits(rows, cpu)
    observed = grown(before, after)
    assert (delay - delay_before) / NS_PER_S * SEEN <= observed.total_s
    assert (times - times_before) * SEEN <= sum(observed.counts) + missed - missed_before
    assert_sum_fits_buckets(observed)


@needs_accounting
def test_a_woken_task_has_waited_each_time() -> None:
    """One that sleeps and is woken again and again: each time it then ran is a wait on its CPU."""
    cpu = max(os.sched_getaffinity(0))
    to_child, to_parent = os.pipe(), os.pipe()

    def answer() -> None:
        while os.read(to_child[0], 1):
            os.write(to_parent[1], b".")

    def ask() -> None:
        os.write(to_child[1], b".")
        assert b"." == os.read(to_parent[0], 1)

    with probe(runqlat.SPEC, RunqlatConfig()) as loaded, children(cpu, 1, answer) as pids:
        rows = loaded.map_rows()
        before, missed_before = waits(rows, cpu)
        times_before = accounted(pids)[1]
        for _ in range(ROUNDS):
            ask()
        times = accounted(pids)[1] - times_before
        after, missed = waits(rows, cpu)
    for fd in (*to_child, *to_parent):
        os.close(fd)
    observed = grown(before, after)
    assert ROUNDS / 2 < times  # now and then it has not yet slept when it is asked again
    assert times * SEEN <= sum(observed.counts) + missed - missed_before
    assert missed - missed_before < times / 10  # those that were runnable already when the probe came
    assert_sum_fits_buckets(observed)


def test_the_plugin_reports_the_rows_it_is_granted() -> None:
    """From the kernel to metrics: each CPU's histogram, and where it comes from."""
    with probe(runqlat.SPEC, RunqlatConfig()) as loaded:
        plugin = Runqlat(RunqlatConfig(), Context(grants=loaded.grants()))
        name = "scheduler_run_queue_latency_seconds_count"
        cpus = {str(cpu) for cpu in os.sched_getaffinity(0)}
        wait_for(lambda: cpus <= {each.labels["cpu"] for each in plugin.collect() if each.name == name}, "all CPUs")
        (source,) = (each for each in plugin.collect() if each.name == "ebpf_source")
    assert {"plugin": "runqlat", "source": "bpf", "reason": ""} == source.labels


def device_columns(rows: memoryview, device: Path) -> list[int]:
    """Return the sums of a device's slot; zeros while it has none."""
    cpus = biolat.SPEC.cpus_of(rows)
    for slot in range(biolat.DEVICES):
        columns = sum_rows(rows, biolat.ROW_BYTES, slot * cpus, cpus)
        if biolat.device_number(columns[biolat.DEVICE]) == number_of(device):
            return columns
    return [0] * (biolat.ROW_BYTES // 8)


def latencies(columns: list[int]) -> dict[str, Latency]:
    """Return a device's histograms by operation."""
    width = len(columns[: biolat.DEVICE]) // len(biolat.OPERATIONS)
    return {operation: latency_of(columns, place * width) for place, operation in enumerate(biolat.OPERATIONS)}


def transfer(device: Path, reads: int, writes: int, flushes: int, discards: int) -> dict[str, float]:
    """Give a device single requests, one after the other; return how many seconds each kind has taken in all."""
    page = mmap.mmap(-1, BLOCK_BYTES)  # O_DIRECT wants it aligned
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return {
            "read": timed(reads, lambda turn: os.preadv(fd, [page], turn * BLOCK_BYTES)),
            "write": timed(writes, lambda turn: os.pwritev(fd, [page], turn * BLOCK_BYTES)),
            "other": timed(flushes, lambda _: os.fsync(fd))
            + timed(discards, lambda turn: fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", turn * 65536, 65536))),
        }
    finally:
        os.close(fd)


def timed(count: int, one: Callable[[int], object]) -> float:
    started = time.monotonic()
    for turn in range(count):
        one(turn)
    return time.monotonic() - started


@needs_losetup
def test_each_request_of_a_disk_is_counted_once(tmp_path: Path) -> None:
    """So many reads, writes, flushes and discards are so many observations, no longer than the calls that waited.

    The kernel's own count of a flush is one flush and, of the bio that asked for it, one write.
    """
    wanted = {"read": 50, "write": 70, "other": 9 + 4}
    with probe(biolat.SPEC, BiolatConfig(exclude_devices=[])) as loaded, loop_device(tmp_path / "disk") as device:
        rows = loaded.map_rows()
        transfer(device, 1, 0, 0, 0)
        before_kernel, before = completed(device), latencies(device_columns(rows, device))
        spent_s = transfer(device, wanted["read"], wanted["write"], 9, 4)
        grew = {name: count - before_kernel[name] for name, count in completed(device).items()}
        columns = device_columns(rows, device)
    observed = {name: grown(before[name], after) for name, after in latencies(columns).items()}
    assert wanted == {name: sum(latency.counts) for name, latency in observed.items()}
    assert (wanted["read"], wanted["other"]) == (grew["read"], grew["other"])
    assert wanted["write"] <= grew["write"]
    assert 0 == columns[biolat.MISSED]
    for name, latency in observed.items():
        assert 0 < latency.total_s <= spent_s[name]
        assert_sum_fits_buckets(latency)


@needs_losetup
def test_a_device_that_is_left_out_takes_no_slot(tmp_path: Path) -> None:
    """By default loop devices are not even known to the kernel's side: their places are for disks."""
    with probe(biolat.SPEC, BiolatConfig()) as loaded, loop_device(tmp_path / "disk") as device:
        rows = loaded.map_rows()
        transfer(device, 3, 3, 0, 0)
        assert [0] * (biolat.ROW_BYTES // 8) == device_columns(rows, device)


@needs_losetup
def test_devices_beyond_the_slots_are_counted_together(tmp_path: Path) -> None:
    """More devices than there are slots: each request is counted, those of the last devices as `other`."""
    with probe(biolat.SPEC, BiolatConfig(exclude_devices=[])) as loaded, ExitStack() as stack:
        existing = {path.name for path in Path("/dev").glob("loop*")}
        stack.callback(remove_new_loops, existing)
        devices = [stack.enter_context(loop_device(tmp_path / str(n))) for n in range(biolat.DEVICES + 2)]
        rows = loaded.map_rows()
        for device in devices:
            transfer(device, 0, 5, 0, 0)
        own = [sum(latencies(device_columns(rows, device))["write"].counts) for device in devices]
        cpus = biolat.SPEC.cpus_of(rows)
        rest = latencies(sum_rows(rows, biolat.ROW_BYTES, biolat.DEVICES * cpus, cpus))["write"]
        plugin = Biolat(BiolatConfig(exclude_devices=[]), Context(grants=loaded.grants()))
        reported = {metric.labels.get("device") for metric in plugin.collect()}
    assert {0, 5} == set(own)
    assert 5 * own.count(0) <= sum(rest.counts)  # a disk of the machine may be among the others
    assert {"other", devices[0].name} <= reported


def remove_new_loops(existing: set[str]) -> None:
    """Remove the loop devices that were made for want of free ones."""
    with open("/dev/loop-control", "rb") as control:
        for path in Path("/dev").glob("loop[0-9]*"):
            if path.name not in existing:
                with suppress(OSError):  # somebody else has it now
                    fcntl.ioctl(control, 0x4C81, ctypes.c_long(int(path.name.removeprefix("loop"))).value)


@pytest.mark.parametrize(
    ("spec", "config"), [(runqlat.SPEC, RunqlatConfig()), (biolat.SPEC, BiolatConfig())], ids=["runqlat", "biolat"]
)
def test_all_its_memory_is_told(spec: ProbeSpec, config: PluginConfig) -> None:
    """What `ebpf_map_bytes` shows and the doctor reckons is what the kernel has allocated, the tables included."""
    with probe(spec, config) as loaded:
        costs = map_costs(loaded.maps.items())
        number = len(spec.tables) + 1 + bool(spec.settings_bytes)
        reckoned = spec.memory_bytes(spec.cpus_of(loaded.map_rows()))
    assert number == len(costs)
    assert reckoned <= sum(cost.bytes for cost in costs) <= reckoned + number * 2 * mmap.PAGESIZE
    assert 512 * 1024 < reckoned


@pytest.mark.parametrize(
    ("spec", "config"), [(runqlat.SPEC, RunqlatConfig()), (biolat.SPEC, BiolatConfig())], ids=["runqlat", "biolat"]
)
def test_nothing_stays_after_close(spec: ProbeSpec, config: PluginConfig) -> None:
    """With its probe the programs are gone from the kernel; mapped rows stay readable."""
    before = {program.id for program in own_programs()}
    loaded = Probe.load(spec, config)
    ids = {program.id for program in own_programs()} - before
    rows = loaded.map_rows()
    assert ids
    loaded.close()
    wait_for(lambda: not any(is_loaded(number) for number in ids), "the programs are gone")
    assert len(rows) == len(bytes(rows))


@pytest.mark.parametrize("step", ["update", "freeze", "trace"])
def test_a_load_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Whichever step is refused, programs, links and descriptors are gone; of the tracepoints, the last one refuses."""
    calls = iter(range(1, 100))
    real = getattr(libbpf.Library, step)

    def refuse(*arguments: Any) -> Any:
        if step != "trace" or next(calls) == 2:
            raise BpfError("refused", errno.EPERM)
        return real(*arguments)

    libbpf.library()
    descriptors = os.listdir("/proc/self/fd")
    programs = {program.id for program in own_programs()}
    monkeypatch.setattr(libbpf.Library, step, refuse)
    with pytest.raises(BpfError, match="refused"):
        Probe.load(biolat.SPEC, BiolatConfig())
    assert descriptors == os.listdir("/proc/self/fd")
    assert programs == {program.id for program in own_programs()}


def test_no_descriptor_outlives_the_supervisors_program() -> None:
    """When another code takes the supervisor's place by exec, the probes of the old one end, and their programs."""
    before = set(os.listdir("/proc/self/fd"))
    with probe(biolat.SPEC, BiolatConfig(exclude_devices=[])):
        ours = {fd for fd in set(os.listdir("/proc/self/fd")) - before if os.path.lexists(f"/proc/self/fd/{fd}")}
        assert len(ours) > len(biolat.SPEC.tables)
        assert [] == [fd for fd in ours if os.get_inheritable(int(fd))]


def test_loading_takes_no_memory_for_good() -> None:
    """A plugin that is switched on and off a hundred times leaves the supervisor as small as it was."""

    def own_kib() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Dirty:"))

    for _ in range(5):  # what is allocated once
        Probe.load(biolat.SPEC, BiolatConfig()).close()
    before_kib = own_kib()
    for _ in range(100):
        Probe.load(biolat.SPEC, BiolatConfig()).close()
    assert own_kib() - before_kib < 8 * 1024
