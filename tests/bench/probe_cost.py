"""What the tracing probes cost: `python -m tests.bench.probe_cost [ROUNDS]`, as root.

Each probe has a load that makes its programs run. Rounds of the load without the probe, with it, and with it and the
kernel's BPF run-time statistics on take turns. The fastest round of each kind counts: others on the machine only ever
slow one down. Printed are the time of one operation without and with the probe, and for each program how often one
operation runs it and how long the kernel says a run takes; beside that of a program that does nothing, for to measure a
run takes time, too. A program sees the whole machine: what others do runs it as well.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kon_agent.bpf import libbpf, loader, objects
from kon_agent.bpf.probe import Probe
from kon_agent.bpf.probes import PROBES
from kon_agent.config.schema import PluginConfig, PluginsConfig
from tests.support.bpf_programs import own_programs
from tests.support.loop_device import loop_device
from tests.support.netns import run

ROUNDS = 30  # many short ones: some of them are not disturbed
BLOCK_BYTES = 4096
EMPTY = Path(__file__).with_name("empty.bpf.c")
PAYLOAD = bytes(64 * 1024)

Operation = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Load:
    """What makes a probe's programs run.

    Attributes:
        noun: one operation, in words.
        count: operations per round.
        ready: makes an operation ready to be done.
    """

    noun: str
    count: int
    ready: Callable[[ExitStack], Operation]


def ready_ping(stack: ExitStack) -> Operation:
    """Two processes on one CPU that wake each other in turn: two wake-ups and two switches."""
    here, there = socket.socketpair()
    stack.enter_context(here)
    cpu = max(os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {cpu})
        while True:
            there.send(there.recv(1))
    stack.callback(os.waitpid, pid, 0)
    stack.callback(os.kill, pid, signal.SIGKILL)
    there.close()
    stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    return lambda: (here.send(b"."), here.recv(1))


def ready_read(stack: ExitStack) -> Operation:
    """Read 4 KiB of a loop device past the page cache."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kon-"))
    device = stack.enter_context(loop_device(Path(folder) / "disk"))
    page = mmap.mmap(-1, BLOCK_BYTES)  # O_DIRECT wants it aligned
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return lambda: os.preadv(fd, [page], 0)


def ready_connection(stack: ExitStack) -> Operation:
    """Connect over loopback, send 64 KiB, close."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def one() -> None:
        with socket.create_connection(server.getsockname()) as client, closing(server.accept()[0]) as accepted:
            client.sendall(PAYLOAD)
            left = len(PAYLOAD)
            while left:
                left -= len(accepted.recv(left))

    return one


def ready_drop(stack: ExitStack) -> Operation:
    """Send a datagram to a port of loopback where nobody listens."""
    sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        address = gone.getsockname()
    return lambda: sender.sendto(b".", address)


LOADS: Mapping[str, Load] = {
    "runqlat": Load("a ping and its answer between two processes on one CPU", 2_000, ready_ping),
    "biolat": Load("a direct read of 4 KiB from a loop device", 500, ready_read),
    "tcp": Load("a connection over loopback with 64 KiB", 100, ready_connection),
    "drops": Load("a datagram nobody wants", 3_000, ready_drop),
}


def attached(name: str) -> closing[Probe]:
    """Have a probe in the kernel."""
    section: PluginConfig = PluginsConfig().by_name()[name]
    return closing(Probe.load(PROBES[name], section))


@contextmanager
def empty() -> Iterator[None]:
    """Have a program in the kernel that does nothing, compiled here."""
    with tempfile.TemporaryDirectory(prefix="kon-") as folder:
        target = f"{folder}/empty.bpf.o"
        run("clang", "-target", "bpf", "-O2", "-g", "-c", str(EMPTY), "-o", target)
        with closing(loader.load(target, shapes={})) as loaded:
            (program_fd,) = loaded.programs.values()
            link_fd = libbpf.library().trace(program_fd, "kon_empty")
            try:
                yield
            finally:
                os.close(link_fd)


@contextmanager
def statistics() -> Iterator[None]:
    """Have the kernel measure every BPF program."""
    fd = objects.enable_statistics()
    try:
        yield
    finally:
        os.close(fd)


def timed(load: Load, operation: Operation) -> float:
    """Return how many nanoseconds one operation of a round took."""
    started_ns = time.perf_counter_ns()
    for _ in range(load.count):
        operation()
    return (time.perf_counter_ns() - started_ns) / load.count


def measure(name: str, load: Load, probe: Callable[[], AbstractContextManager[object]], rounds: int) -> None:
    """Measure one probe under a load, and print."""
    without: list[float] = []
    with_probe: list[float] = []
    cost: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        operation = load.ready(stack)
        timed(load, operation)
        for _ in range(rounds):
            without.append(timed(load, operation))
            with probe():
                with_probe.append(timed(load, operation))
                with statistics():
                    timed(load, operation)
                for program in own_programs():
                    if program.run_cnt:
                        figures = (program.run_time_ns / program.run_cnt, program.run_cnt / load.count)
                        cost[program.name] = min(cost.get(program.name, figures), figures)
    bare, probed = min(without), min(with_probe)
    print(f"{name}: {load.noun}: {bare / 1000:.2f} µs, with the probe {probed / 1000:.2f} µs ({probed / bare:.3f})")
    for program_name, (run_ns, runs) in sorted(cost.items()):
        print(f"    {program_name:16} {run_ns:6.0f} ns per run, {runs:6.2f} runs per operation")


def main(rounds: int) -> None:
    """Measure all probes."""
    if os.geteuid() != 0:
        print("the cost of the probes is not measured: loading them needs root")
        return
    if shutil.which("clang"):
        measure("nothing", LOADS["runqlat"], empty, rounds)
    for name, load in LOADS.items():
        measure(name, load, partial(attached, name), rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
