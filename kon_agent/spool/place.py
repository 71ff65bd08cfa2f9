"""The spool's place: the folder of `cache.path`, made and handed over while that is still possible.

Done by the supervisor, as root, for a path in a place such as /tmp where others may have put something before us: the
last component is never followed if it is a link, and a folder that is somebody else's is not taken.
"""

from __future__ import annotations

import contextlib
import os
import stat

from kon_agent.errors import SpoolError

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def folder_path(path: str) -> str:
    """Return where the spool lives: `path`, or beside it where the original left its cache file."""
    return path + ".spool" if os.path.isfile(path) and not os.path.islink(path) else path


def prepare(path: str, uid: int, gid: int) -> int:
    """Make the folder if need be, give it to `uid`, and return its descriptor.

    Raises:
        SpoolError: it cannot be had, or belongs to somebody else; what to do.
    """
    place = folder_path(path)
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        fd = os.open(place, _FLAGS)
    except OSError as err:
        raise SpoolError(f"cache.path {place} cannot be used: {err.strerror}; correct it or make it writable") from err
    try:
        owner = os.fstat(fd).st_uid
        if owner not in (0, os.getuid(), uid):
            raise SpoolError(f"cache.path {place} belongs to uid {owner}; remove it or choose another")
        if os.getuid() == 0:
            _hand_over(fd, uid, gid)
        if stat.S_IMODE(os.fstat(fd).st_mode) != 0o700:
            os.fchmod(fd, 0o700)
    except OSError as err:
        os.close(fd)
        raise SpoolError(f"cache.path {place} cannot be handed to uid {uid}: {err.strerror}") from err
    except SpoolError:
        os.close(fd)
        raise
    return fd


def _hand_over(fd: int, uid: int, gid: int) -> None:
    """Give the folder and the files in it to `uid`: an earlier run may have had another user."""
    if os.fstat(fd).st_uid != uid:
        os.fchown(fd, uid, gid)
    for name in os.listdir(fd):
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISREG(info.st_mode) and info.st_uid != uid and info.st_nlink == 1:  # not somebody's hard link
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
