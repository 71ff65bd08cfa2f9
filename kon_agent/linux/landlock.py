"""Landlock: the files, TCP ports, signals and abstract sockets a process may reach for the rest of its life.

Everything the kernel's Landlock ABI can handle is denied, then single folders are opened again. What was open
or mapped before stays usable. Absence is not failure: without Landlock in the kernel nothing is applied, and
0 is returned so that the caller can say so. Source of numbers and rules: linux/landlock.h, landlock(7).
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kon_agent.linux.libc import syscall

# The same on every architecture of Linux 5.13 and later
_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # a rule on a file may hold no other

_BIND_TCP = 1
_CONNECT_TCP = 2
_SCOPE_ABSTRACT_SOCKETS = 1
_SCOPE_SIGNALS = 2


class _Ruleset(ctypes.Structure):
    # Members an older kernel does not know must be zero; then it takes the long form.
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64))


def supported_abi() -> int:
    """Return the Landlock ABI of the running kernel, 0 where it has none or has it switched off."""
    try:
        return syscall(_SYS_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION, what="landlock version")
    except OSError:
        return 0


def restrict(
    read: Sequence[int | str],
    write: Sequence[int | str] = (),
    execute: Sequence[int | str] = (),
    connect_tcp: Sequence[int] | None = (),
) -> int:
    """Confine this thread and its future children, for good, and return the ABI applied, 0 for none.

    Args:
        read: folders beneath which files and folders may be read; a path, or a descriptor opened with O_PATH.
            Paths that do not exist or cannot be reached are skipped: they grant nothing.
        write: folders beneath which files may, besides, be made, written, renamed and removed.
        execute: folders beneath which programs may be read and run. (Loading a shared library only reads.)
        connect_tcp: TCP ports that may be connected to, None for all; ABI 4 and later deny every other, and all
            binding.

    Raises:
        OSError: no_new_privs is not set, or the kernel refused a rule.
    """
    abi = supported_abi()
    if abi == 0:
        return 0
    wanted = _ruleset(abi, _BIND_TCP if connect_tcp is None else _BIND_TCP | _CONNECT_TCP)
    ruleset = syscall(
        _SYS_CREATE_RULESET, ctypes.byref(wanted), ctypes.sizeof(wanted), 0, what="landlock_create_ruleset"
    )
    try:
        for places, rights in ((read, READ), (write, WRITE), (execute, READ | EXECUTE)):
            for place in places:
                _add_path(ruleset, place, rights & wanted.fs)
        if wanted.net:
            for port in connect_tcp or ():
                _add_rule(ruleset, _RULE_NET_PORT, _NetPort(_CONNECT_TCP, port), f"port {port}")
        syscall(_SYS_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    finally:
        os.close(ruleset)
    return abi


def _ruleset(abi: int, net: int = _BIND_TCP | _CONNECT_TCP) -> _Ruleset:
    # Rights by the ABI that brought them: 13 in the first, then REFER, TRUNCATE, and (5) IOCTL_DEV.
    rights = (1 << 13) - 1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        if abi >= since:
            rights |= right
    scoped = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if abi >= 6 else 0
    return _Ruleset(rights, net if abi >= 4 else 0, scoped)


def _add_path(ruleset: int, place: int | str, rights: int) -> None:
    with _opened(place) as fd:
        if fd is None:
            return
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        _add_rule(ruleset, _RULE_PATH_BENEATH, _PathBeneath(rights, fd), str(place))


def _add_rule(ruleset: int, kind: int, rule: ctypes.Structure, what: str) -> None:
    syscall(_SYS_ADD_RULE, ruleset, kind, ctypes.byref(rule), 0, what=f"landlock_add_rule {what}")


@contextmanager
def _opened(place: int | str) -> Iterator[int | None]:
    if isinstance(place, int):
        yield place
        return
    try:
        fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
