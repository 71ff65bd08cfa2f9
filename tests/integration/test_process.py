"""Real children: what they have lost, what they may still do, and how their end is told.

Bodies are functions of this module (imported before the fork), except where importing is the point.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kon_agent import process
from kon_agent.errors import PrivilegeError
from kon_agent.linux import landlock, memory, procfs, seccomp
from kon_agent.linux.pidfd import PidFd
from kon_agent.linux.privileges import User
from kon_agent.process import Exit, Profile, Role

DEADLINE_S = 20.0
NOBODY = User("nobody", 65534, 65534)
NETWORK = frozenset({"network"})

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: children change their user"),
]
needs_landlock = pytest.mark.skipif(landlock.supported_abi() < 6, reason="needs Landlock ABI 6 in the kernel")
needs_seccomp = pytest.mark.skipif(seccomp.current_architecture() is None, reason="no filter for this machine")
pytestmark = needs_root


@dataclass(frozen=True)
class Outcome:
    exit: Exit
    said: Any


def run(body: str | Callable[..., int | None], argument: object = None, **options: Any) -> Outcome:
    """Spawn a child that calls `body(report, argument)` and return its end and what it reported."""
    name = body if isinstance(body, str) else f"{__name__}:{body.__name__}"
    keep = options.pop("keep_fds", ())
    user = options.pop("user", NOBODY)
    reader, writer = os.pipe()
    role = Role("kon-agent: test", name, (writer, *keep), user, Profile(**options))
    child = process.spawn(role, (writer, argument))
    os.close(writer)
    with os.fdopen(reader) as file:
        assert select.select([reader], [], [], DEADLINE_S)[0], "the child said nothing in time"
        said = file.read()
    assert child.pidfd.wait(DEADLINE_S)
    child.pidfd.close()
    [ended] = process.reap()
    assert child.pid == ended.pid
    return Outcome(ended, json.loads(said) if said else None)


def outcome_of(attempt: Callable[[], object]) -> str:
    """Return the errno name of a refused attempt, or `done`."""
    try:
        attempt()
    except OSError as err:
        return errno.errorcode[err.errno or 0]
    return "done"


def execute() -> None:
    os.execv("/bin/true", ["true"])  # noqa: S606 - refused, that is the test


def tell(report: tuple[int, object], value: object) -> None:
    os.write(report[0], json.dumps(value).encode())


# ── what is gone ──────────────────────────────────────────────────────────────────────────────────────────────────


def body_status(report: tuple[int, object]) -> int:
    tell(report, procfs.read_status())
    return 0


def test_a_child_is_nobody_without_any_privilege() -> None:
    """Another user, no group, no capability in any set, no_new_privs, seccomp on, nothing blocked."""
    status = run(body_status).said
    assert ["65534"] * 4 == status["Uid"].split()
    assert ["65534"] * 4 == status["Gid"].split()
    assert "" == status["Groups"]
    assert {0} == {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert "1" == status["NoNewPrivs"]
    assert 0 == int(status["SigBlk"], 16)
    if seccomp.current_architecture():
        assert "2" == status["Seccomp"]


def body_wait(report: tuple[int, object]) -> int:
    tell(report, "ready")
    signal.pause()
    return 0


@contextlib.contextmanager
def waiting_child(profile: Profile = Profile()) -> Iterator[process.Child]:  # noqa: B008 - frozen
    """A child that waits for a signal; killed and reaped at the end."""
    reader, writer = os.pipe()
    child = process.spawn(
        Role("kon-agent: worker waits", f"{__name__}:body_wait", (writer,), NOBODY, profile), (writer, None)
    )
    os.close(writer)
    assert select.select([reader], [], [], DEADLINE_S)[0]
    assert b'"ready"' == os.read(reader, 100)
    os.close(reader)
    try:
        yield child
    finally:
        child.pidfd.send(signal.SIGKILL)
        assert child.pidfd.wait(DEADLINE_S)
        child.pidfd.close()
        process.reap()


def test_ps_shows_the_title() -> None:
    """The process is called what its role says."""
    with waiting_child() as child:
        cmdline = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        assert b"kon-agent: worker waits" == cmdline.rstrip(b"\0")


def test_a_signal_ends_a_child_by_default() -> None:
    """Handlers of the parent are not inherited: SIGTERM ends it, and the end is named."""
    with waiting_child() as child:
        assert child.pidfd.send(signal.SIGTERM)
        assert child.pidfd.wait(DEADLINE_S)
        assert [Exit(child.pid, signum=signal.SIGTERM)] == process.reap()


def descriptors() -> dict[str, str]:
    """Return what each open descriptor of this process is."""
    links = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            links[name] = os.readlink(f"/proc/self/fd/{name}")
    return links


def body_descriptors(report: tuple[int, object]) -> int:
    tell(report, {"links": descriptors(), "path": sys.path, "own": report[0]})
    return 0


def test_a_child_holds_only_its_own_descriptors() -> None:
    """Standard streams, what the role names, and folders of Python code; nothing of the parent's."""
    kept, stray = os.open("/etc/passwd", os.O_RDONLY), os.open("/etc/passwd", os.O_RDONLY)
    said = run(body_descriptors, keep_fds=(kept,)).said
    os.close(kept)
    os.close(stray)
    folders = {entry.rpartition("/")[2] for entry in said["path"] if entry.startswith("/proc/self/fd/")}
    others = {name: target for name, target in said["links"].items() if name not in folders}
    others = {name: target for name, target in others.items() if target != str(Path(process.__file__).parent)}
    assert {"0", "1", "2", str(said["own"]), str(kept)} == others.keys()
    assert "/dev/null" == others["0"]


def body_limits(report: tuple[int, object]) -> int:
    tell(report, [resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)])
    return 0


def test_limits_are_hard() -> None:
    """No core dump, and as many descriptors as the profile says."""
    assert [[0, 0], [48, 48]] == run(body_limits, nofile=48).said


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


def body_attempts(report: tuple[int, Any]) -> int:
    sibling, own_file = report[1]
    own = os.getpid()
    attempts: dict[str, Callable[[], object]] = {
        "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "socketpair": socket.socketpair,
        "execve": execute,
        "fork": os.fork,
        "kill sibling": lambda: os.kill(sibling, 0),
        "kill own group": lambda: os.kill(0, 0),
        "signal self": lambda: os.kill(own, 0),
        "pidfd_open sibling": lambda: os.pidfd_open(sibling),
        "slow down sibling": lambda: os.sched_setaffinity(sibling, {0}),
        "lower priority of sibling": lambda: os.setpriority(os.PRIO_PROCESS, sibling, 19),
        "read memory of sibling": lambda: Path(f"/proc/{sibling}/mem").read_bytes(),
        "read map of sibling": lambda: Path(f"/proc/{sibling}/maps").read_bytes(),
        "write own file": lambda: os.open(own_file, os.O_WRONLY),
        "write /tmp": lambda: Path("/tmp/kon-agent-test").write_bytes(b""),
        "write /dev/null": lambda: Path("/dev/null").write_bytes(b""),
        "write /dev/shm": lambda: Path("/dev/shm/kon-agent-test").write_bytes(b""),
        "mkdir": lambda: os.mkdir("/tmp/kon-agent-test"),
        "read own file": lambda: Path(own_file).read_bytes(),
        "read /proc/stat": lambda: Path("/proc/stat").read_bytes(),
        "become root": lambda: os.setresuid(0, 0, 0),
    }
    tell(report, {name: outcome_of(attempt) for name, attempt in attempts.items()})
    return 0


@needs_landlock
@needs_seccomp
def test_a_worker_can_do_no_harm() -> None:
    """No network, program, process or file written; other children of the same user are out of reach."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file, waiting_child() as sibling:
        os.chown(file.name, NOBODY.uid, NOBODY.gid)
        said = run(body_attempts, (sibling.pid, file.name)).said
    for allowed in ("signal self", "read /proc/stat"):
        assert "done" == said.pop(allowed), allowed
    for name in ("write own file", "write /tmp", "write /dev/null", "write /dev/shm", "mkdir", "read own file"):
        assert "EACCES" == said.pop(name), name
    for name in ("read memory of sibling", "read map of sibling"):
        assert said.pop(name) in ("EACCES", "EPERM"), name
    assert {"EPERM"} == set(said.values()), said


def body_thread(report: tuple[int, object]) -> int:
    heard: list[int] = []
    thread = threading.Thread(target=heard.append, args=(1,))
    thread.start()
    thread.join()
    tell(report, heard)
    return 0


def test_threads_work() -> None:
    """A collector may use threads although it may not fork."""
    assert [1] == run(body_thread).said


def body_network(report: tuple[int, Any]) -> int:
    port, tcp_port, spool = report[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", port))
    left, right = socket.socketpair()
    left.close()
    right.close()
    Path(spool, "1.log").write_bytes(b"record")
    os.rename(f"{spool}/1.log", f"{spool}/2.log")
    os.truncate(f"{spool}/2.log", 3)
    with socket.socket() as tcp:
        said = {
            "tcp": outcome_of(lambda: tcp.connect(("127.0.0.1", tcp_port))),
            "packet": outcome_of(lambda: socket.socket(socket.AF_PACKET)),
            "exec": outcome_of(execute),
            "elsewhere": outcome_of(lambda: Path(spool).with_name("other").write_bytes(b"")),
        }
    tell(report, said | {"names": [item[4][0] for item in socket.getaddrinfo("127.0.0.1", 1)][:1]})
    return 0


@needs_landlock
@needs_seccomp
def test_a_sender_has_udp_and_its_spool_only() -> None:
    """With `network` and one folder to write: datagrams, names and files there; no TCP, no program, nothing else."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        os.chmod(folder, 0o711)  # noqa: S103 - its user must pass
        spool = Path(folder, "spool")
        spool.mkdir()
        os.chown(spool, NOBODY.uid, NOBODY.gid)
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(DEADLINE_S)
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            ports = (udp.getsockname()[1], tcp.getsockname()[1])
            said = run(body_network, (*ports, str(spool)), allow=NETWORK, write=(str(spool),)).said
        assert b"hello" == udp.recv(100)
        assert b"rec" == (spool / "2.log").read_bytes()
    assert {"tcp": "EACCES", "packet": "EPERM", "exec": "EPERM", "elsewhere": "EACCES", "names": ["127.0.0.1"]} == said


def body_asyncio(report: tuple[int, object]) -> int:
    import asyncio

    tell(report, asyncio.run(asyncio.sleep(0, "slept")))
    return 0


def test_asyncio_runs_with_the_network() -> None:
    """An event loop starts under the sender's profile."""
    assert "slept" == run(body_asyncio, allow=NETWORK).said


# ── shared memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def body_memory(report: tuple[int, memoryview]) -> int:
    view = report[1]
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(memory._addresses[id(view)][0])
    refused = libc.mprotect(address, ctypes.c_size_t(len(view)), 3)
    tell(report, [bytes(view[:5]).decode(), refused, errno.errorcode[ctypes.get_errno()]])
    return 0


def test_a_granted_mapping_stays_read_only() -> None:
    """A child reads what it was given, and mprotect cannot make it writable."""
    fd = memory.create_memfd("test", 4096)
    writer = memory.map_memory(fd, 4096, writable=True, inherit=False)
    writer[:5] = b"hello"
    read_fd = memory.reopen_readonly(fd)
    reader = memory.map_memory(read_fd, 4096, writable=False)
    assert ["hello", -1, "EACCES"] == run(body_memory, reader).said
    os.close(fd)
    os.close(read_fd)
    memory.unmap_memory(reader)
    memory.unmap_memory(writer)


def body_prepared(view: memoryview) -> int:
    view[0] = 7
    return int(any("prepared" in target for target in descriptors().values()))


def test_prepare_maps_memory_of_which_no_descriptor_is_left() -> None:
    """`prepare` runs before the descriptors are closed; its mapping outlives them."""
    fd = memory.create_memfd("prepared", 4096)
    view = memory.map_memory(fd, 4096, writable=False)
    child = process.spawn(
        Role("kon-agent: test", f"{__name__}:body_prepared", (), NOBODY),
        prepare=lambda: memory.map_memory(fd, 4096, writable=True),
    )
    assert child.pidfd.wait(DEADLINE_S)
    child.pidfd.close()
    assert [Exit(child.pid, code=0)] == process.reap()
    assert 7 == view[0]
    os.close(fd)
    memory.unmap_memory(view)


# ── how it ends ───────────────────────────────────────────────────────────────────────────────────────────────────


def body_exit(report: tuple[int, Any]) -> int:
    if isinstance(report[1], int):
        return report[1]
    sys.exit(*report[1])


@pytest.mark.parametrize(("expected", "argument"), [(0, 0), (3, 3), (0, []), (4, [4]), (1, ["words"])])
def test_the_body_chooses_the_exit_code(expected: int, argument: object) -> None:
    """By return value or by sys.exit, with Python's own meaning."""
    assert expected == run(body_exit, argument).exit.code


def body_raise(report: tuple[int, object]) -> int:
    raise RuntimeError("the disk is a teapot")


def test_an_exception_is_a_traceback_and_70(capfd: pytest.CaptureFixture[str]) -> None:
    """The child never returns into the parent's stack; its reason is on stderr under its title."""
    assert 70 == run(body_raise).exit.code
    said = capfd.readouterr().err
    assert "kon-agent: test: uncaught exception" in said
    assert "RuntimeError: the disk is a teapot" in said


def test_sigabrt_prints_the_stack(capfd: pytest.CaptureFixture[str]) -> None:
    """A hung child, told to abort, shows where it hangs."""
    with waiting_child() as child:
        assert child.pidfd.send(signal.SIGABRT)
        assert child.pidfd.wait(DEADLINE_S)
        assert [Exit(child.pid, signum=signal.SIGABRT)] == process.reap()
    said = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in said
    assert "in body_wait" in said


@pytest.mark.parametrize(
    ("expected", "ended"),
    [
        ("exited with 0", Exit(1, code=0)),
        ("exited with 3", Exit(1, code=3)),
        ("exited with 70 (uncaught exception; see its traceback in the log)", Exit(1, code=70)),
        ("killed by SIGKILL", Exit(1, signum=9)),
        ("killed by signal 40", Exit(1, signum=40)),
    ],
)
def test_an_end_is_told_in_words(expected: str, ended: Exit) -> None:
    """What `plugins list` shows as the last exit."""
    assert expected == process.describe_exit(ended)


def test_reaping_nobody_is_nothing() -> None:
    """Without children there is nothing to reap, and no error."""
    assert [] == process.reap()


def test_the_death_of_the_parent_is_the_child_s_end() -> None:
    """A worker dies within a second of its supervisor, however that dies."""
    reader, writer = os.pipe()
    alive_reader, alive_writer = os.pipe()  # held by the worker only: its end is an end of file
    supervisor = os.fork()
    if supervisor == 0:
        role = Role("kon-agent: test", f"{__name__}:body_wait", (writer, alive_writer), NOBODY)
        child = process.spawn(role, (writer, None))
        os.write(writer, f"{child.pid}\n".encode())
        signal.pause()
    os.close(writer)
    os.close(alive_writer)
    said = b""
    while b"ready" not in said or b"\n" not in said:
        assert select.select([reader], [], [], DEADLINE_S)[0]
        said += os.read(reader, 100)
    os.close(reader)
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    assert [alive_reader] == select.select([alive_reader], [], [], 1.0)[0]
    assert b"" == os.read(alive_reader, 1)
    os.close(alive_reader)


def body_outlive(report: tuple[int, Any]) -> int:
    lifeline = report[1]
    tell(report, "ready")
    os.read(lifeline, 1)
    tell(report, "drained")
    return 0


def test_a_role_without_death_signal_outlives_the_parent_and_notices() -> None:
    """The sender gets no signal; the end of a pipe tells it, and it finishes its work."""
    reader, writer = os.pipe()
    lifeline, held_by_supervisor = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        role = Role("kon-agent: test", f"{__name__}:body_outlive", (writer, lifeline), NOBODY)
        process.spawn(dataclasses.replace(role, profile=Profile(death_signal=None)), (writer, lifeline))
        signal.pause()
    for fd in (writer, lifeline, held_by_supervisor):
        os.close(fd)
    assert select.select([reader], [], [], DEADLINE_S)[0]
    assert b'"ready"' == os.read(reader, 7)
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    assert select.select([reader], [], [], DEADLINE_S)[0]
    with os.fdopen(reader) as file:
        assert '"drained"' == file.read()


# ── who may be spawned ────────────────────────────────────────────────────────────────────────────────────────────


def test_root_spawns_nobody_as_root() -> None:
    """A role without a user is refused before the fork."""
    with pytest.raises(PrivilegeError, match="give the role a user"):
        process.spawn(Role("kon-agent: test", "x:y"))


def body_unprivileged(report: tuple[int, object]) -> int:
    status = procfs.read_status()
    caps = [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")]
    tell(report, [os.getuid(), caps, status["NoNewPrivs"], outcome_of(lambda: socket.socket())])
    return 0


def test_without_root_everything_else_is_still_done() -> None:
    """An unprivileged supervisor's child keeps the user, and loses the network and the rest all the same."""
    reader, writer = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.setgroups([])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        outcome = run(body_unprivileged, user=None)
        os.write(writer, json.dumps([outcome.exit.code, outcome.said]).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(supervisor, 0)
    with os.fdopen(reader) as file:
        assert [0, [1234, [0, 0, 0, 0], "1", "EPERM"]] == json.load(file)


# ── where its code comes from ─────────────────────────────────────────────────────────────────────────────────────

BODY = """
import os, json
import sqlite3, ssl  # extension modules, not imported before
from secret_package import part
def main(report):
    os.write(report[0], json.dumps([part.VALUE, os.access(report[1], os.X_OK)]).encode())
    return 0
"""


@pytest.fixture
def private_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules below one that only root may enter."""
    tmp_path.chmod(0o700)
    code = tmp_path / "code"
    (code / "secret_package").mkdir(parents=True)
    (code / "secret_package" / "__init__.py").write_text("")
    (code / "secret_package" / "part.py").write_text("VALUE = 17\n")
    (code / "secret_body.py").write_text(BODY)
    monkeypatch.syspath_prepend(str(code))
    return code


def test_code_below_a_closed_folder_is_imported(private_code: Path) -> None:
    """The body and its package come from a folder their user cannot enter by name."""
    outcome = run("secret_body:main", str(private_code))
    assert (0, [17, False]) == (outcome.exit.code, outcome.said)


def test_a_package_imported_before_goes_on_finding_its_parts(private_code: Path) -> None:
    """A package the parent has imported already is moved, too."""
    import secret_package  # type: ignore[import-not-found]

    assert str(private_code / "secret_package") in secret_package.__path__
    try:
        assert [17, False] == run("secret_body:main", str(private_code)).said
    finally:
        del sys.modules["secret_package"]


def test_unreadable_code_is_named(private_code: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file only root may read ends the child with 77 and the file's name."""
    (private_code / "secret_body.py").chmod(0o600)
    assert 77 == run("secret_body:main").exit.code
    said = capfd.readouterr().err
    assert f"{private_code}/secret_body.py" in said
    assert "chmod -R o+rX" in said


def test_a_missing_module_is_an_ordinary_crash(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing unreadable: a traceback and 70."""
    assert 70 == run("kon_agent_no_such_module:main").exit.code
    assert "No module named 'kon_agent_no_such_module'" in capfd.readouterr().err


def test_the_whole_package_runs_from_a_private_checkout(tmp_path: Path) -> None:
    """A clone in a folder that is itself 0700 still starts its workers."""
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(process.__file__).parent, checkout / "kon_agent")
    checkout.chmod(0o700)
    script = (
        "from kon_agent import process; from kon_agent.linux.privileges import User\n"
        "child = process.spawn(process.Role('t', 'kon_agent.schedule:Schedule', (), User('nobody', 65534, 65534)))\n"
        "child.pidfd.wait(20); print(process.describe_exit(process.reap()[0]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    # Imported, called with one argument too few, and crashed in its own code: it was found.
    assert "TypeError" in ran.stderr
    assert "exited with 70" in ran.stdout


def test_the_pidfd_is_the_child_s() -> None:
    """What spawn returns names the process it made."""
    with waiting_child() as child:
        assert isinstance(child.pidfd, PidFd)
        assert child.pid == child.pidfd.pid
        assert str(os.getpid()) == procfs.read_status(child.pid)["PPid"]
