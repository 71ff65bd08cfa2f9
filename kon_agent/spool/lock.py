"""The lock on a spool's folder: a file `lock` that its one user holds locked, with the user's pid in it.

An open file description lock (fcntl(2), F_OFD_SETLK): it ends with the process whatever ends it, and, unlike flock(2),
anybody may ask about it without taking it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

from kon_agent.errors import SpoolError

NAME = "lock"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid
_WHOLE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_PID_BYTES = 16


def take(folder_fd: int) -> int:
    """Take the lock and return the descriptor that holds it.

    Raises:
        SpoolError: another process has it; the message names its pid.
        OSError: the folder cannot be written.
    """
    fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder_fd)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE)
    except (BlockingIOError, PermissionError) as err:
        pid = _pid_in(fd)
        os.close(fd)
        raise SpoolError(
            f"the spool is in use by pid {pid or 'unknown'}; stop that agent or choose another cache.path"
        ) from err
    except OSError:
        os.close(fd)
        raise
    with contextlib.suppress(OSError):  # on a full disk the spool must still be delivered; only the pid is missing
        os.pwrite(fd, f"{os.getpid()}\n".ljust(_PID_BYTES).encode(), 0)
    return fd


def holder(folder_fd: int) -> int | None:
    """Return the pid of the process that has the lock; None where nobody has, 0 where it is not known who."""
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE)
        return None if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK else _pid_in(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _pid_in(fd: int) -> int:
    text = os.pread(fd, _PID_BYTES, 0).strip()
    return int(text) if text.isdigit() else 0
