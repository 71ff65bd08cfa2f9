"""The seccomp filter, run by a small interpreter of the same instructions, for every architecture."""

from __future__ import annotations

import pytest

from kon_agent.linux import seccomp
from kon_agent.linux.seccomp import ALLOW, KILL_PROCESS, REFUSE, UNKNOWN, build_filter
from kon_agent.linux.syscalls import ARCHITECTURES, Architecture

PID = 4242
GETPID = {"x86_64": 39, "aarch64": 172}


def verdict(
    architecture: Architecture,
    number: int,
    *arguments: int,
    allow: frozenset[str] = frozenset(),
    audit: int | None = None,
) -> int:
    """Return what the filter answers to a call, as the kernel would run it (linux/filter.h)."""
    words = {0: number, 4: architecture.audit if audit is None else audit}
    words |= {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate((*arguments, *[0] * 6)[:6])}
    program, position, accumulator = build_filter(architecture, PID, allow), 0, 0
    while True:
        step = program[position]
        position += 1
        match step.code:
            case seccomp._LOAD:
                accumulator = words[step.value]
            case seccomp._RETURN:
                return step.value
            case seccomp._JUMP_EQ:
                position += step.if_true if accumulator == step.value else step.if_false
            case seccomp._JUMP_GE:
                position += step.if_true if accumulator >= step.value else step.if_false
            case seccomp._JUMP_SET:
                position += step.if_true if accumulator & step.value else step.if_false
            case _:
                raise AssertionError(step)


@pytest.fixture(params=sorted(ARCHITECTURES))
def machine(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_ordinary_call_passes(name: str) -> None:
    """What is not named is allowed."""
    assert ALLOW == verdict(ARCHITECTURES[name], GETPID[name])


@pytest.mark.parametrize("name", seccomp._DENIED)
def test_every_named_call_is_refused(machine: Architecture, name: str) -> None:
    """Each call on the deny list that the architecture has answers EPERM."""
    if name in machine.numbers:
        assert REFUSE == verdict(machine, machine.numbers[name])


def test_every_name_has_a_number() -> None:
    """No name on the deny list is misspelt."""
    assert set() == set(seccomp._DENIED) - ARCHITECTURES["x86_64"].numbers.keys()


def test_another_architecture_kills(machine: Architecture) -> None:
    """The 32-bit calls of the same machine have other numbers: the process ends."""
    assert KILL_PROCESS == verdict(machine, 1, audit=0x40000003)


def test_the_x32_table_is_refused() -> None:
    """execve through x32 (520 | bit 30) does not slip past."""
    assert REFUSE == verdict(ARCHITECTURES["x86_64"], 0x40000000 | 520)


@pytest.mark.parametrize("name", seccomp._SELF_ONLY)
@pytest.mark.parametrize(("expected", "target"), [(ALLOW, PID), (REFUSE, PID + 1), (REFUSE, 0), (REFUSE, -1)])
def test_signals_reach_only_oneself(machine: Architecture, name: str, expected: int, target: int) -> None:
    """Own pid passes, so that abort() works; others, groups (0, negative) do not."""
    assert expected == verdict(machine, machine.numbers[name], target)


@pytest.mark.parametrize("name", seccomp._SELF_OR_ZERO)
@pytest.mark.parametrize(("expected", "target"), [(ALLOW, PID), (ALLOW, 0), (REFUSE, PID + 1)])
def test_limits_concern_only_oneself(machine: Architecture, name: str, expected: int, target: int) -> None:
    """0 means the caller; another process's limits and scheduling are out of reach."""
    assert expected == verdict(machine, machine.numbers[name], target)


def test_threads_yes_processes_no(machine: Architecture) -> None:
    """clone passes with CLONE_THREAD only; clone3 does not exist, so that libc falls back to clone."""
    assert ALLOW == verdict(machine, machine.numbers["clone"], 0x003D0F00)  # glibc's pthread_create
    assert REFUSE == verdict(machine, machine.numbers["clone"], 17)  # fork: SIGCHLD
    assert UNKNOWN == verdict(machine, machine.numbers["clone3"])


@pytest.mark.parametrize(
    ("expected", "name", "command"),
    [
        (ALLOW, "fcntl", 1),
        (REFUSE, "fcntl", 8),
        (REFUSE, "fcntl", 10),
        (ALLOW, "ioctl", 0x5401),
        (REFUSE, "ioctl", 0x5412),
        (REFUSE, "ioctl", 0x8901),
    ],
)
def test_back_doors_to_signals_are_shut(machine: Architecture, expected: int, name: str, command: int) -> None:
    """Neither a descriptor's owner signal nor keystrokes into an inherited terminal."""
    assert expected == verdict(machine, machine.numbers[name], 3, command)


@pytest.mark.parametrize(("expected", "family"), [(ALLOW, 2), (ALLOW, 10), (REFUSE, 1), (ALLOW, 16), (REFUSE, 17)])
def test_the_network_is_a_handful_of_families(machine: Architecture, expected: int, family: int) -> None:
    """With `network`, UDP and name resolution work; packet sockets and other services' unix sockets do not."""
    network = frozenset({"network"})
    assert expected == verdict(machine, machine.numbers["socket"], family, allow=network)
    assert ALLOW == verdict(machine, machine.numbers["connect"], allow=network)
    assert REFUSE == verdict(machine, machine.numbers["execve"], allow=network)


def test_an_unknown_group_is_an_error() -> None:
    """A misspelt group must not silently deny or allow."""
    with pytest.raises(ValueError, match="netwrok"):
        build_filter(ARCHITECTURES["x86_64"], PID, frozenset({"netwrok"}))


def test_the_filter_fits(machine: Architecture) -> None:
    """Shorter than BPF_MAXINSNS, and every jump within its byte."""
    program = build_filter(machine, PID)
    assert len(program) < 4096
    assert all(len(step.encode()) == 8 for step in program)


EXEC = frozenset({"exec"})
SIGNALS = frozenset({"exec", "signals"})


@pytest.mark.parametrize("name", ["execve", "fork", "vfork", "pidfd_open"])
def test_exec_lets_programs_be_started(machine: Architecture, name: str) -> None:
    """What starting one and noticing its end takes, as far as the architecture has it."""
    if name in machine.numbers:
        assert ALLOW == verdict(machine, machine.numbers[name], allow=EXEC)


@pytest.mark.parametrize(
    "name", ["setsid", "setpgid", "memfd_create", "execveat", "pidfd_send_signal", "socket", "bpf"]
)
def test_exec_opens_no_way_out(machine: Architecture, name: str) -> None:
    """No session or group of its own, no program from memory, no signal by descriptor, no network."""
    for groups in (EXEC, SIGNALS):
        assert REFUSE == verdict(machine, machine.numbers[name], allow=groups)


@pytest.mark.parametrize("name", ["memfd_create", "shmget", "msgget", "semget"])
@pytest.mark.parametrize("groups", [frozenset[str](), frozenset({"network"}), EXEC, SIGNALS])
def test_memory_that_no_process_shows_is_refused(machine: Architecture, name: str, groups: frozenset[str]) -> None:
    """Nobody's limit would see it, and System V's outlives whoever made it."""
    assert REFUSE == verdict(machine, machine.numbers[name], allow=groups)


@pytest.mark.parametrize(
    ("expected", "kind"), [(ALLOW, 1), (ALLOW, 0x80001), (ALLOW, 0x80801), (REFUSE, 2), (REFUSE, 0x80002), (REFUSE, 5)]
)
def test_a_pair_of_sockets_leads_nowhere(machine: Architecture, expected: int, kind: int) -> None:
    """With `network`, streams only: an end of a pair of datagrams could send to other services' unix sockets."""
    network = frozenset({"network"})
    assert expected == verdict(machine, machine.numbers["socketpair"], 1, kind, allow=network)


@pytest.mark.parametrize(
    ("expected", "flags"),
    [
        (ALLOW, 17),  # fork: SIGCHLD
        (ALLOW, 0x4111),  # vfork where it is no call of its own: CLONE_VM | CLONE_VFORK | SIGCHLD
        (ALLOW, 0x003D0F00),  # glibc's pthread_create
        (REFUSE, 0x8011),  # CLONE_PARENT
        *[
            (REFUSE, flag | 17)
            for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
        ],
    ],
)
def test_exec_makes_processes_but_no_namespaces(machine: Architecture, expected: int, flags: int) -> None:
    """Children and threads of its own, in the namespaces it is in."""
    assert expected == verdict(machine, machine.numbers["clone"], flags, allow=EXEC)
    assert UNKNOWN == verdict(machine, machine.numbers["clone3"], allow=EXEC)


@pytest.mark.parametrize(
    ("expected", "target"), [(ALLOW, PID), (ALLOW, 0), (ALLOW, -PID), (REFUSE, -1), (REFUSE, 1), (REFUSE, -PID - 1)]
)
def test_exec_signals_its_own_group(machine: Architecture, expected: int, target: int) -> None:
    """Where nothing else confines signals: oneself and one's group, which all that was started is in."""
    assert expected == verdict(machine, machine.numbers["kill"], target, allow=EXEC)
    assert REFUSE == verdict(machine, machine.numbers["tgkill"], PID + 1, allow=EXEC)


@pytest.mark.parametrize("name", sorted(seccomp.GROUPS["signals"]))
def test_signals_are_free_where_landlock_confines_them(machine: Architecture, name: str) -> None:
    """The filter leaves them alone then, whomever they are for."""
    assert {ALLOW} == {verdict(machine, machine.numbers[name], target, allow=SIGNALS) for target in (PID, 0, -1, 99)}


@pytest.mark.parametrize(("name", "command"), [("fcntl", 4), ("ioctl", 0x5421)])
def test_exec_may_make_its_descriptors_nonblocking(machine: Architecture, name: str, command: int) -> None:
    """A program shares none of its descriptors with others; a worker without one does."""
    assert ALLOW == verdict(machine, machine.numbers[name], 3, command, allow=EXEC)
    assert REFUSE == verdict(machine, machine.numbers[name], 3, command)


def test_no_filter_is_installed_here() -> None:
    """A process that has none does not believe to be confined: it would signal everybody."""
    assert None is seccomp.installed()
