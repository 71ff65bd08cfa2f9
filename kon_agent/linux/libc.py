"""The C library: loaded once, with every failure turned into an `OSError`.

Invariant: a call made through `prctl`, `syscall` or `check` either succeeded or raised; nobody tests for -1.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.restype = ctypes.c_int

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# mmap(2), madvise(2)
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 1
MADV_DONTFORK = 10


def check(result: int, what: str) -> int:
    """Return `result`, the value of a libc call named `what`.

    Raises:
        OSError: the call returned -1; carries its errno.
    """
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def prctl(option: int, argument: int = 0, what: str = "prctl") -> int:
    """Call prctl(2) with one argument; `what` names the intent in the error.

    Raises:
        OSError: the kernel refused.
    """
    words = [ctypes.c_ulong(word) for word in (argument, 0, 0, 0)]
    return check(libc.prctl(ctypes.c_int(option), *words), what)


def syscall(number: int, *arguments: object, what: str) -> int:
    """Call a system call libc has no wrapper for; integers are passed as longs, ctypes values as they are.

    Raises:
        OSError: the kernel refused.
    """
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return check(int(libc.syscall(ctypes.c_long(number), *words)), what)
