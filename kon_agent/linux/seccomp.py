"""A seccomp filter: the system calls a confined process is refused (EPERM), as a classic BPF program.

A deny list, because a collector's legitimate calls differ between libc versions and what must never happen
does not: reach the network, run a program, make a process, trace, mount, signal or slow down another process.
Calls not named pass at no cost: the kernel (5.11 and later) remembers which numbers a filter always allows.

The filter is built by `build_filter`, which is pure, and installed by `apply`. Source: seccomp(2),
linux/filter.h.

A filter outlives execve(2) and cannot tell a worker from the program it has started, so with `exec` one filter holds
both. What that decides:
* setsid and setpgid stay denied, to everybody: a worker leads its session and group, whatever it starts stays in
  that group, and one kill of the group by the supervisor leaves nothing of it.
* Signals: the filter sees numbers, not kinship, and the sender and the other workers are of the same user. Where
  Landlock confines signals to what the worker has started (ABI 6), `signals` opens the calls, and a worker ends its
  program with one kill(-1). Elsewhere only the own group can be signalled: kill(0) and kill(-own pid).
* pidfd_open is free, to notice a program's end: without pidfd_getfd and pidfd_send_signal that is all it is good for.
* F_SETFL and FIONBIO are free: the program holds no descriptor but /dev/null and two pipes of its own.
* execveat stays denied: Landlock lets anything in a memfd be executed.
* clone with CLONE_NEW* is refused, as are namespaces elsewhere; with CLONE_PARENT, too: what it makes would be the
  supervisor's child.

Memory that no process's figures show is refused to all: that of memory files, and of System V's queues, segments and
semaphores, which besides outlives whoever made it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kon_agent.linux import libc
from kon_agent.linux.syscalls import ARCHITECTURES, Architecture

GROUPS: Final[dict[str, frozenset[str]]] = {
    "network": frozenset({"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"}),
    "exec": frozenset({"execve", "fork", "vfork", "pidfd_open"}),
    "signals": frozenset({"kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"}),
}
"""Names that `allow` understands, each with the calls it takes off the deny list.

`signals` is for processes only whose signals Landlock confines.
"""

_DENIED: Final = (
    *sorted(GROUPS["network"]),
    *("execve", "execveat", "fork", "vfork", "setsid", "setpgid"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp"),
    *(
        "pidfd_open",
        "pidfd_getfd",
        "pidfd_send_signal",
        "migrate_pages",
        "move_pages",
        "setpriority",
        "ioprio_set",
    ),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "setns", "unshare", "open_by_handle_at"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("add_key", "request_key", "keyctl", "swapon", "swapoff", "acct", "syslog", "iopl", "ioperm"),
    *("settimeofday", "clock_settime", "sethostname", "setdomainname"),
    *("memfd_create", "shmget", "msgget", "semget"),
)

# Calls whose first argument is a process and which may only concern the caller itself. abort() signals
# itself.
_SELF_ONLY: Final = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_SELF_OR_ZERO: Final = (
    "prlimit64",
    "sched_setaffinity",
    "sched_setattr",
    "sched_setparam",
    "sched_setscheduler",
)

# The families a process with the network may use: AF_INET, AF_INET6, and AF_NETLINK, with which getaddrinfo sorts
# addresses. Not AF_UNIX: the supervisor's control socket is one, and other services' are too.
_SOCKET_FAMILIES: Final = (2, 10, 16)
# A pair of AF_UNIX may be a stream, as event loops wake themselves with; with or without SOCK_CLOEXEC, SOCK_NONBLOCK.
# One of datagrams would reach any socket in the file system: its end takes an address in each sendto (unix(7)).
_PAIR_TYPES: Final = (1, 0x80001, 0x801, 0x80801)

# Ways round the rule above, by second argument: signals sent on a descriptor's behalf (F_SETOWN, F_SETSIG,
# F_SETOWN_EX, FIOSETOWN, SIOCSPGRP), keystrokes pushed into an inherited terminal (TIOCSTI, TIOCLINUX).
_FORBIDDEN_COMMANDS: Final = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902, 0x5412, 0x541C)}
# And, for those with neither network nor program, ways to make a descriptor shared with others block them (F_SETFL,
# FIONBIO).
_FORBIDDEN_TO_WORKERS: Final = {"fcntl": (4,), "ioctl": (0x5421,)}

_CLONE_THREAD: Final = 0x00010000
# CLONE_PARENT, then every CLONE_NEW* that clone can take: NS, CGROUP, UTS, IPC, USER, PID, NET.
_CLONE_ESCAPES: Final = 0x00008000 | 0x00020000 | 0x7E000000
_X32_BIT: Final = 0x40000000  # the x32 calls of x86_64: the same machine code, other numbers

ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000
REFUSE: Final = 0x00050000 | errno.EPERM
UNKNOWN: Final = 0x00050000 | errno.ENOSYS

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]. Both machines are
# little-endian.
_OFFSET_NR: Final = 0
_OFFSET_ARCH: Final = 4
_OFFSET_ARGS: Final = 16

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQ: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GE: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_SECCOMP_MODE_FILTER: Final = 2


@dataclass(frozen=True, slots=True)
class Instruction:
    """One struct sock_filter: `if_true` and `if_false` are counts of instructions to skip."""

    code: int
    value: int
    if_true: int = 0
    if_false: int = 0

    def encode(self) -> bytes:
        """Return the eight bytes the kernel reads."""
        return struct.pack("=HBBI", self.code, self.if_true, self.if_false, self.value)


def current_architecture() -> Architecture | None:
    """Return this machine's architecture, None where there is no filter for it."""
    if sys.maxsize < 2**32:  # a 32-bit Python on a 64-bit kernel uses other numbers
        return None
    return ARCHITECTURES.get(platform.machine())


_installed: frozenset[str] | None = None


def installed() -> frozenset[str] | None:
    """Return the groups allowed by the filter this process has installed, or was forked with; None without one."""
    return _installed


def apply(allow: frozenset[str] = frozenset()) -> bool:
    """Install the filter on this thread, for good, and return whether this machine has one.

    Args:
        allow: names of `GROUPS` not to deny.

    Raises:
        OSError: no_new_privs is not set.
        ValueError: `allow` holds an unknown name.
    """
    architecture = current_architecture()
    if architecture is None:
        return False
    program = build_filter(architecture, os.getpid(), allow)
    code = ctypes.create_string_buffer(b"".join(instruction.encode() for instruction in program))
    header = _Program(len(program), ctypes.addressof(code))
    words = (ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(header), ctypes.c_ulong(0), ctypes.c_ulong(0))
    try:
        libc.check(libc.libc.prctl(libc.PR_SET_SECCOMP, *words), "cannot install the seccomp filter")
    except OSError as err:
        if err.errno == errno.EINVAL:  # a kernel without CONFIG_SECCOMP_FILTER
            return False
        raise
    global _installed
    _installed = allow
    return True


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def build_filter(architecture: Architecture, own_pid: int, allow: frozenset[str] = frozenset()) -> list[Instruction]:
    """Return the filter for a process numbered `own_pid`.

    Raises:
        ValueError: `allow` holds a name that is not in `GROUPS`.
    """
    unknown = sorted(allow - GROUPS.keys())
    if unknown:
        raise ValueError(f"unknown system call group {unknown[0]!r}; there are: {', '.join(sorted(GROUPS))}")
    allowed = frozenset[str]().union(*(GROUPS[name] for name in allow))
    numbers = architecture.numbers
    program = [
        Instruction(_LOAD, _OFFSET_ARCH),
        Instruction(_JUMP_EQ, architecture.audit, if_true=1),
        Instruction(_RETURN, KILL_PROCESS),
        Instruction(_LOAD, _OFFSET_NR),
    ]
    if architecture.has_x32:
        program += [Instruction(_JUMP_GE, _X32_BIT, if_false=1), Instruction(_RETURN, REFUSE)]
    has_programs = "execve" in allowed
    for name in _DENIED:
        if name in numbers and name not in allowed:
            program += _when(numbers[name], [Instruction(_RETURN, REFUSE)])
    for name in _SELF_ONLY:
        if name not in allowed:
            own_group = (0, -own_pid) if has_programs and name == "kill" else ()
            program += _when(numbers[name], _only(0, (own_pid, *own_group)))
    for name in _SELF_OR_ZERO:
        program += _when(numbers[name], _only(0, (0, own_pid)))
    for name, commands in _FORBIDDEN_COMMANDS.items():
        shared = () if "socket" in allowed or has_programs else _FORBIDDEN_TO_WORKERS[name]
        program += _when(numbers[name], _never(1, (*commands, *shared)))
    if "socket" in allowed:
        program += _when(numbers["socket"], _only(0, _SOCKET_FAMILIES))
        program += _when(numbers["socketpair"], _only(1, _PAIR_TYPES))
    # clone3 takes its flags by pointer, which no filter can follow; libc falls back to clone.
    program += _when(numbers["clone3"], [Instruction(_RETURN, UNKNOWN)])
    program += _when(numbers["clone"], _without_flags(_CLONE_ESCAPES) if has_programs else _threads_only())
    return [*program, Instruction(_RETURN, ALLOW)]


def _when(number: int, verdict: list[Instruction]) -> list[Instruction]:
    """Run `verdict`, which must end in a return on every path, for the call `number`; otherwise skip it."""
    return [Instruction(_JUMP_EQ, number, if_false=len(verdict)), *verdict]


def _only(argument: int, values: Iterable[int]) -> list[Instruction]:
    return _match(argument, tuple(values), found=ALLOW, otherwise=REFUSE)


def _never(argument: int, values: Iterable[int]) -> list[Instruction]:
    return _match(argument, tuple(values), found=REFUSE, otherwise=ALLOW)


def _match(argument: int, values: tuple[int, ...], found: int, otherwise: int) -> list[Instruction]:
    # The low half is enough: the kernel itself takes these arguments as 32-bit integers.
    jumps = [
        Instruction(_JUMP_EQ, value & 0xFFFFFFFF, if_true=len(values) - index) for index, value in enumerate(values)
    ]
    load = Instruction(_LOAD, _OFFSET_ARGS + 8 * argument)
    return [load, *jumps, Instruction(_RETURN, otherwise), Instruction(_RETURN, found)]


def _threads_only() -> list[Instruction]:
    return [
        Instruction(_LOAD, _OFFSET_ARGS),
        Instruction(_JUMP_SET, _CLONE_THREAD, if_true=1),
        Instruction(_RETURN, REFUSE),
        Instruction(_RETURN, ALLOW),
    ]


def _without_flags(flags: int) -> list[Instruction]:
    return [
        Instruction(_LOAD, _OFFSET_ARGS),
        Instruction(_JUMP_SET, flags, if_true=1),
        Instruction(_RETURN, ALLOW),
        Instruction(_RETURN, REFUSE),
    ]
