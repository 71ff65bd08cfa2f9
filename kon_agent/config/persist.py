"""A change written into the configuration file: whole or not at all, and nothing but the change.

What is on disk now is edited, whatever was loaded once. The new text must load, and differ from the old one in the
intended setting exactly; it replaces the file by a rename, so that no reader ever sees half of it.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import tempfile

from kon_agent.config.edit import Change, edited
from kon_agent.config.load import check, check_text
from kon_agent.config.schema import Config
from kon_agent.errors import ConfigError


def persist(path: str, change: Change) -> None:
    """Make a change in the file `path`, or in the file that it is a symbolic link to.

    Raises:
        ConfigError: the file cannot be read or written, has mistakes, or cannot be edited so; it is as it was.
    """
    settings, mistakes = check(path)
    if settings is None:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as file:
            old = file.read()
        new = _changed(path, old, change)
        if new != old:
            _replace(real, old, new)
    except OSError as err:
        raise ConfigError(f"{real}: cannot be written: {err.strerror or err}; {_remedy(err)}") from err


def _changed(path: str, content: bytes, change: Change) -> bytes:
    """Return the file's new content."""
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    text = content.decode("utf-8-sig")
    before = _load(path, text)
    wanted = change.applied(before)
    if wanted == before:
        return content
    new = edited(text, change)
    try:
        is_wanted = _load(path, new) == wanted
    except ConfigError:
        is_wanted = False
    if not is_wanted:
        raise ConfigError(
            f"{path}: plugins.{change.plugin} is written in a way that is not edited here; edit it by hand"
        )
    return mark + new.encode()


def _load(path: str, text: str) -> Config:
    config, mistakes = check_text(text, path)
    if config is None:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    return config


def _replace(path: str, old: bytes, new: bytes) -> None:
    """Put another file in the place of `path`, with the same owner, mode and attributes, and have it on disk."""
    folder = os.path.dirname(path)
    there = os.stat(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with open(fd, "wb") as file:
            file.write(new)
            file.flush()
            ours = os.fstat(fd)
            if (ours.st_uid, ours.st_gid) != (there.st_uid, there.st_gid):
                os.fchown(fd, there.st_uid, there.st_gid)
            os.fchmod(fd, there.st_mode & 0o7777)
            for name in os.listxattr(path):  # an access list, a label
                with contextlib.suppress(OSError):
                    os.setxattr(fd, name, os.getxattr(path, name))
            os.fsync(fd)
        with open(path, "rb") as file:
            if file.read() != old:
                raise ConfigError(f"{path}: is being changed by somebody else; try again")
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Have the rename on disk; where that cannot be had the file is whole all the same, old or new."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remedy(err: OSError) -> str:
    if isinstance(err, PermissionError):
        return "the agent's user may not; edit the file by hand and use 'kon-agent reload'"
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on its disk, and try again"
    return "make its folder writable to the agent (under systemd: ReadWritePaths=), or edit it by hand and reload"
