"""What does counting cost a packet? Nanoseconds of XDP programs, by the kernel's own test run (BPF_PROG_TEST_RUN).

    python -m tests.bench.packet_cost [--rounds N] [--repeat N]

As root, and with clang. The programs take turns, round after round, so that whatever else the machine does befalls all
alike; a figure is this thread's processor time over the repetitions of one round. Given are the median and the least of
all rounds, each also as a ratio to the empty program's. Nothing is attached: no packet of this machine is touched.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kon_agent.bpf import layout, libbpf, loader
from kon_agent.bpf.flowcount import FlowCount
from kon_agent.bpf.loader import Loaded, MapShape
from kon_agent.config.schema import FlowsConfig
from kon_agent.errors import BpfError
from tests.support.ethernet import HERE, THERE, ipv4, ipv6, tagged, tcp, udp

SOURCE = Path(__file__).with_suffix(".bpf.c")
HEADERS = Path(__file__).parents[2] / "ebpf"
FLAGS = ("-target", "bpfel", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-nostdinc")
TEST_IFINDEX = 1  # a test run's packets arrive at loopback
FRAME_BYTES = 64
_ENTRY = struct.Struct("=IHH")  # struct kon_interface

FRAMES = {
    "tcp": ipv4(6, tcp()),
    "udp": ipv4(17, udp()),
    "vlan": tagged(ipv4(6, tcp())),
    "ipv6": ipv6(6, tcp()),
}


class TestRunOptions(ctypes.Structure):
    """`struct bpf_test_run_opts` of libbpf."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


@dataclass
class Run:
    """One row of the table."""

    name: str
    program_fd: int
    frame: bytes
    costs_ns: list[float] = field(default_factory=list)

    def measure(self, repeat: int) -> None:
        """Run the program `repeat` times."""
        data = ctypes.create_string_buffer(self.frame, len(self.frame))
        options = TestRunOptions(
            sz=ctypes.sizeof(TestRunOptions),
            data_in=ctypes.addressof(data),
            data_size_in=len(self.frame),
            repeat=repeat,
        )
        run = ctypes.CDLL(libbpf.library().path).bpf_prog_test_run_opts
        started_ns = time.thread_time_ns()
        result = run(self.program_fd, ctypes.byref(options))
        took_ns = time.thread_time_ns() - started_ns
        assert (0, 2) == (result, options.retval), f"{self.name}: {os.strerror(-result)}, returned {options.retval}"
        self.costs_ns.append(took_ns / repeat)


def frame(kind: str) -> bytes:
    """Return a frame of FRAME_BYTES, or of as many as its headers need."""
    return (HERE + THERE + FRAMES[kind]).ljust(FRAME_BYTES, b"\0")


def load_others(folder: Path) -> Loaded:
    """Compile and load what ours is compared with."""
    target = folder / "packet_cost.bpf.o"
    subprocess.run(["clang", *FLAGS, f"-I{HEADERS}", "-c", str(SOURCE), "-o", str(target)], check=True)
    return loader.load(str(target), shapes={})


def load_ours(position: int = 0) -> Loaded:
    """Load the packet counters; the test's interface is the `position`th of its bucket, behind seven others at most."""
    cpus = libbpf.library().possible_cpus()
    shapes = {
        "counters": MapShape(layout.ROW_BYTES, layout.slots_for(cpus) * cpus, is_sized=True),
        "interfaces": MapShape(layout.BUCKET_BYTES, layout.BUCKETS),
    }
    loaded = loader.load(loader.object_path("kon_net"), shapes=shapes, optional={"kon_xdp_frags"})
    others = [TEST_IFINDEX + (n + 1) * layout.BUCKETS for n in range(position)]
    entries = [_ENTRY.pack(ifindex, slot * cpus, 0) for slot, ifindex in enumerate([*others, TEST_IFINDEX])]
    bucket = b"".join(entries).ljust(layout.BUCKET_BYTES, b"\0")
    libbpf.library().update(loaded.maps["interfaces"], "interfaces", TEST_IFINDEX % layout.BUCKETS, bucket)
    return loaded


def load_flows(ours: Mapping[str, int]) -> Mapping[str, int]:
    """Load the flows' programs over the same counters; empty where they cannot be."""
    try:
        return FlowCount.load(dict(ours), int(FlowsConfig().memory)).substitutes
    except BpfError as err:
        print(f"without flows: {err}")
        return {}


def prepare(folder: Path) -> list[Run]:
    """Return what is to be measured, the empty program first."""
    others = load_others(folder).programs
    ours = load_ours()
    eighth = load_ours(layout.BUCKET_ENTRIES - 1).programs
    flows = load_flows(ours.maps)
    runs = [
        Run("empty XDP_PASS", others["kon_empty"], frame("tcp")),
        Run("ours", ours.programs["kon_xdp_ingress"], frame("tcp")),
        Run("ours, eighth interface of its bucket", eighth["kon_xdp_ingress"], frame("tcp")),
        Run("ours, VLAN-tagged", ours.programs["kon_xdp_ingress"], frame("vlan")),
        Run("ours, IPv6 (74 bytes)", ours.programs["kon_xdp_ingress"], frame("ipv6")),
        Run("ours, UDP", ours.programs["kon_xdp_ingress"], frame("udp")),
        Run("the original's approach", others["kon_original"], frame("tcp")),
    ]
    if "kon_xdp_frags" in ours.programs:
        runs.insert(2, Run("ours, frames in pieces allowed", ours.programs["kon_xdp_frags"], frame("tcp")))
    if "kon_xdp_ingress" in flows:
        runs.append(Run("ours + flows", flows["kon_xdp_ingress"], frame("tcp")))
    return runs


def report(runs: list[Run]) -> None:
    """Print the table."""
    median_ns, least_ns = statistics.median(runs[0].costs_ns), min(runs[0].costs_ns)
    print(f"| {'64-byte TCP, if not said otherwise':40} | median ns | ratio | least ns | ratio |")
    print(f"|{'-' * 42}|----------:|------:|---------:|------:|")
    for run in runs:
        median, least = statistics.median(run.costs_ns), min(run.costs_ns)
        figures = f"{median:9.1f} | {median / median_ns:5.2f} | {least:8.1f} | {least / least_ns:5.2f}"
        print(f"| {run.name:40} | {figures} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeat", type=int, default=2_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kon-") as folder:
        runs = prepare(Path(folder))
    for _ in range(arguments.rounds):
        for run in runs:
            run.measure(arguments.repeat)
    report(runs)


if __name__ == "__main__":
    main()
