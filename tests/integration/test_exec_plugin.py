"""Programs under the `exec` plugin, in its worker's real sandbox: what they can do, and what is left of them."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kon_agent import process
from kon_agent.config.schema import Duration, ExecConfig
from kon_agent.control_protocol import Op
from kon_agent.linux import landlock, seccomp
from kon_agent.linux.privileges import User
from kon_agent.linux.tasks import count_tasks
from kon_agent.plugins.context import Context
from kon_agent.plugins.exec import MAX_OUTPUT_BYTES, Exec
from kon_agent.process import Role
from kon_agent.supervisor.profiles import PROGRAM_MAX_PROCESSES, profile_for
from tests.support.agent import Agent
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

DEADLINE_S = 30.0
NOBODY = User("nobody", 65534, 65534)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: workers change their user"),
    pytest.mark.skipif(seccomp.current_architecture() is None, reason="no seccomp filter for this machine"),
]
needs_landlock = pytest.mark.skipif(landlock.supported_abi() < 6, reason="needs Landlock ABI 6 in the kernel")

Install = Callable[..., ExecConfig]


@pytest.fixture
def install(folder: Path) -> Install:
    """Return what writes a shell script anyone may run, and configures it."""

    def install(script: str, **settings: Any) -> ExecConfig:
        program = folder / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return ExecConfig(**{"command": [str(program)], "period": Duration(5.0), **settings})

    return install


def body_collect(report: tuple[int, Any]) -> int:
    """Collect some cycles and report each one's metrics; `until_s` passes while the worker waits for a signal."""
    writer, (config, cycles, waits) = report
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    collector = Exec(config, Context())
    collector.start()
    for _ in range(cycles):
        values = {metric.name: metric.value for metric in collector.collect()}
        os.write(writer, json.dumps(values).encode() + b"\n")
    if waits:
        signal.pause()
    collector.stop()
    return 0


@dataclass(frozen=True)
class Worker:
    """A worker that collects."""

    child: process.Child
    reader: int

    def cycle(self) -> dict[str, float]:
        """Return the next cycle's values by name."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.reader], [], [], DEADLINE_S)[0], "the worker said nothing in time"
            part = os.read(self.reader, 1)
            assert part, "the worker has ended"
            line += part
        return dict(json.loads(line))

    def others(self) -> list[int]:
        """Return the processes of its session but itself, those that have ended and wait for their parent aside."""
        return [pid for pid in session_members(self.child.pid) if pid != self.child.pid]

    def wait(self) -> None:
        """Wait for its end, and reap it as the supervisor does."""
        assert self.child.pidfd.wait(DEADLINE_S)
        process.reap({self.child.pid})


def session_members(session: int) -> list[int]:
    members = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            state, _, _, sid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state not in "ZX":
            members.append(pid)
    return members


Start = Callable[..., Worker]


@pytest.fixture(params=[True, False], ids=["scoped", "unscoped"])
def has_scoped_signals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Landlock confines signals; where it does, it is also made believe that it does not."""
    if not request.param:
        monkeypatch.setattr(process, "SCOPED_SIGNALS_ABI", landlock.supported_abi() + 1)
    elif landlock.supported_abi() < process.SCOPED_SIGNALS_ABI:
        pytest.skip(f"needs Landlock ABI {process.SCOPED_SIGNALS_ABI} in the kernel")
    return bool(request.param)


@pytest.fixture
def start() -> Iterator[Start]:
    """Return what starts a worker for a configuration; none is left."""
    workers: list[Worker] = []

    def start(config: ExecConfig, cycles: int = 1, waits: bool = False) -> Worker:
        reader, writer = os.pipe()
        role = Role("kon-agent: test", f"{__name__}:{body_collect.__name__}", (writer,), NOBODY, profile_for(config))
        worker = Worker(process.spawn(role, (writer, (config, cycles, waits))), reader)
        os.close(writer)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.child.pidfd.send(signal.SIGKILL)
        worker.wait()
        worker.child.pidfd.close()
        os.close(worker.reader)
        wait_for(lambda: not session_members(worker.child.pid), "its programs are gone")  # noqa: B023 - called here


@pytest.mark.usefixtures("has_scoped_signals")
def test_what_it_prints_is_reported(install: Install, start: Start) -> None:
    """A script's values come out, and that it did well."""
    values = start(install("echo 'temperature_celsius{sensor=\"a\"} 21.5'; echo 'fans 3'")).cycle()
    assert (21.5, 3.0) == (values["temperature_celsius"], values["fans"])
    assert (1.0, 0.0, 0.0) == (values["exec_success"], values["exec_exit_code"], values["exec_breaker_open"])


ATTEMPTS = """
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name 1"; else echo "$name 0"; fi; }
try other_program /bin/ls /
try listed_program /bin/true
try via_loader /lib64/ld-linux-x86-64.so.2 /bin/ls /
try write_tmp sh_write
try read_proc sh_read /proc/stat
try read_root_folder sh_read /var/log/lastlog
try signal_init kill -0 1
try signal_sibling kill -0 $SIBLING
sleep 100 & child=$!
try signal_own_child kill -9 $child
"""


@needs_landlock
def test_it_can_do_no_harm(install: Install, start: Start) -> None:
    """It runs what is listed and nothing else, writes nothing, and signals nobody but its own."""
    sibling = start(install("echo up 1"), waits=True)
    assert 1.0 == sibling.cycle()["up"]
    functions = 'sh_write() { echo x >/tmp/kon-exec-test; }\nsh_read() { read line <"$1"; }\n'
    values = start(
        install(
            functions + ATTEMPTS, execute=["/bin/true", "/bin/sleep"], environment={"SIBLING": str(sibling.child.pid)}
        )
    ).cycle()
    assert {"listed_program", "read_proc", "signal_own_child"} == {
        name for name, value in values.items() if value and not name.startswith("exec_")
    }
    assert 8 + 1 == sum(not name.startswith("exec_") for name in values)


PYTHON_ATTEMPTS = """#!/usr/bin/env python3
import ctypes, os, socket
def try_(name, attempt):
    try:
        attempt()
        print(name, 1)
    except OSError:
        print(name, 0)
def memfd():
    fd = os.memfd_create("program")
    os.write(fd, b"#!/bin/sh\\n")
    os.execve(fd, ["program"], {})
libc = ctypes.CDLL(None, use_errno=True)
def unshare():
    if libc.unshare(0x10000000) < 0:
        raise OSError(ctypes.get_errno())
print("exec_descriptors", len(os.listdir("/proc/self/fd")) - 1)
try_("fork", lambda: os.waitpid(os.fork() or os._exit(0), 0))
try_("setsid", os.setsid)
try_("setpgid", lambda: os.setpgid(0, 0))
try_("socket", socket.socket)
try_("memfd", memfd)
try_("unshare", unshare)
try_("sibling_memory", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
try_("nonblocking", lambda: os.set_blocking(1, True))
"""


@needs_landlock
def test_the_filter_holds_the_program_too(install: Install, start: Start) -> None:
    """It may fork; a session or group of its own, the network, a program in memory, a namespace it cannot have."""
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("needs /usr/bin/python3")
    config = install("")
    Path(config.command[0]).write_text(PYTHON_ATTEMPTS)
    values = start(config).cycle()
    assert {"fork", "nonblocking"} == {name for name, value in values.items() if value and not name.startswith("exec_")}
    assert (1.0, 3.0) == (values["exec_success"], values["exec_descriptors"])


@pytest.mark.usefixtures("has_scoped_signals")
def test_one_that_never_ends_is_killed_at_its_timeout(install: Install, start: Start) -> None:
    """With its children, and the worker goes on: the next cycle is told like the first."""
    script = "echo before 1; sleep 1000 & sleep 1000"
    worker = start(install(script, timeout=Duration(0.5), execute=["/bin/sleep"]), cycles=2, waits=True)
    for values in (worker.cycle(), worker.cycle()):
        assert (1.0, 0.0) == (values["before"], values["exec_success"])
        assert 0 > values["exec_exit_code"]
        assert 5.0 > values["exec_duration_seconds"]
    assert [] == worker.others()


def test_one_that_ignores_hangups_is_killed_too(install: Install, start: Start, has_scoped_signals: bool) -> None:
    """No signal it can ignore is relied on where the kernel confines signals; elsewhere its worker goes with it."""
    worker = start(install("trap '' HUP TERM INT; while :; do :; done", timeout=Duration(0.3)), waits=True)
    if has_scoped_signals:
        assert -signal.SIGKILL == worker.cycle()["exec_exit_code"]
    else:
        worker.wait()
    wait_for(lambda: [] == worker.others(), "the program is gone")


def test_a_timeout_reaches_no_other_worker(install: Install, start: Start) -> None:
    """All workers are of one user: what ends one's program leaves another's alone."""
    sleeps = {"execute": ["/bin/sleep"], "timeout": Duration(0.3)}
    other = start(install("sleep 1000 & echo up 1; sleep 1000", mode="stream", execute=["/bin/sleep"]), waits=True)
    other.cycle()
    wait_for(lambda: len(other.others()) == 3, "the other's program and its children run")
    assert 0.0 == start(install("sleep 1000", **sleeps)).cycle()["exec_success"]
    assert 3 == len(other.others())
    assert not other.child.pidfd.wait(0)


@pytest.mark.usefixtures("has_scoped_signals")
def test_what_it_leaves_behind_is_ended(install: Install, start: Start) -> None:
    """A background process does not outlive the run that made it."""
    worker = start(install("sleep 1000 & echo up 1", execute=["/bin/sleep"]), waits=True)
    values = worker.cycle()
    assert (1.0, 1.0) == (values["up"], values["exec_success"])
    assert 4.0 > values["exec_duration_seconds"]
    wait_for(lambda: [] == worker.others(), "the background process is gone")


def test_a_killed_worker_takes_all_with_it(install: Install, start: Start) -> None:
    """After kill -9 of the worker neither its program nor that one's children are left."""
    script = "sleep 1000 & sleep 1000 & echo up 1; sleep 1000"
    worker = start(install(script, mode="stream", execute=["/bin/sleep"]), waits=True)
    worker.cycle()
    wait_for(lambda: len(worker.others()) == 4, "the program and its children run")
    worker.child.pidfd.send(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: [] == session_members(worker.child.pid), "all are gone")


@pytest.mark.usefixtures("has_scoped_signals")
def test_a_fork_bomb_is_bounded(install: Install, start: Start) -> None:
    """No more than its share of processes come to be, and at its timeout all are ended."""
    others = count_tasks(NOBODY.uid)  # when those end, there is room for more
    bomb = "bomb() { bomb & bomb & while :; do sleep 1; done; }; bomb & exec sleep 30"  # the first one forks no more
    worker = start(install(bomb, timeout=Duration(2.0), execute=["/bin/sleep"]), waits=True)
    most = 0
    while not select.select([worker.reader], [], [], 0.05)[0]:
        most = max(most, len(worker.others()))
    assert 0.0 == worker.cycle()["exec_success"]
    assert 2 < most <= PROGRAM_MAX_PROCESSES + others + 1
    wait_for(lambda: [] == worker.others(), "the bomb is gone")


def test_endless_output_is_bounded(install: Install, start: Start) -> None:
    """A program that prints without end is stopped after a megabyte, in time, and its worker stays small."""
    worker = start(install("while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1; done"), waits=True)
    values = worker.cycle()
    assert (0.0, -float(signal.SIGKILL)) == (values["exec_success"], values["exec_exit_code"])
    assert values["exec_rejected_lines_total"] < MAX_OUTPUT_BYTES
    status = Path(f"/proc/{worker.child.pid}/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kb < 100_000


def test_a_crash_is_told(install: Install, start: Start) -> None:
    """A program that kills itself with a signal counts as failed, by that signal's number."""
    values = start(install("echo before 1; kill -SEGV $$; echo after 1")).cycle()
    assert (0.0, -float(signal.SIGSEGV)) == (values["exec_success"], values["exec_exit_code"])
    assert (1.0, False) == (values["before"], "after" in values)


# ── under the agent ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def agent(install: Install, folder: Path, start_agent: Callable[..., Agent]) -> Agent:
    """Return an agent with two programs: one prints and ends, one hangs with a child."""
    ends = install("echo up 1")
    hangs = folder / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 1000 & sleep 1000\n")
    hangs.chmod(0o755)
    return start_agent(
        {
            "ends": {"type": "exec", "command": ends.command},
            "hangs": {"type": "exec", "command": [str(hangs)], "execute": ["/bin/sleep"], "timeout": "1000s"},
        }
    )


def test_its_records_arrive(agent: Agent, receiver: Receiver) -> None:
    """What a program prints is stored by the receiver under the name of its section."""
    agent.wait_for_acks("ends", more=10)
    assert "ends" in {row.plugin for row in receiver.ledger()}


@pytest.mark.parametrize("victim", ["worker", "supervisor"])
def test_whatever_is_killed_no_program_is_left(agent: Agent, victim: str) -> None:
    """kill -9 of the worker, or of the supervisor, in the middle of a run."""
    agent.wait_until_running("ends")
    wait_for(lambda: len(session_members(agent.worker("hangs"))) == 4, "the program and its children run")
    worker = agent.worker("hangs")
    if victim == "worker":
        os.kill(worker, signal.SIGKILL)
    else:
        agent.kill()
    wait_for(lambda: [] == session_members(worker), "the program and its children are gone")


def test_a_disabled_one_is_gone_at_once(agent: Agent) -> None:
    """Disabling a plugin in the middle of a run ends its worker and program within the half second promised."""
    agent.wait_until_running("ends")
    wait_for(lambda: len(session_members(agent.worker("hangs"))) == 4, "the program and its children run")
    worker = agent.worker("hangs")
    agent.change(Op.PLUGIN_DISABLE, "hangs")
    wait_for(lambda: [] == session_members(worker), "all are gone", deadline_s=2.0)
