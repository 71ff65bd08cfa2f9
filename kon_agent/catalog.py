"""The plugins that are not built in: which there are, and where their code is. Nothing of theirs is imported here.

Two places are looked at, each when first asked for a name that is not built in:

    plugins.d/NAME.py                       a file in a folder only its owner, root, can write
    entry points, group kon_agent.plugins   NAME = module:Class, of an installed package (metadata only is read)

Invariants:
* A file is used only where nobody but root (or the agent's own user, without root) can have written it: it and its
  folder belong to them, and neither the group nor others may write. Any other is refused, and said to be.
* A file is named like a plugin; it goes before an entry point of the same name, and a built-in plugin before both.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from typing import Literal

import msgspec

from kon_agent.errors import PluginError

GROUP = "kon_agent.plugins"
MAX_SOURCE_BYTES = 1024 * 1024  # the longest module of Python's own library has a quarter of it
MAX_FOUND = 256  # five times as many as a configuration may have

_NO_PLUGINS = (".", "_", "test_")  # editors' and tests' files
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Origin(msgspec.Struct, frozen=True):
    """Where the code of a plugin is that is not built in.

    Attributes:
        name: the plugin's name.
        kind: `file`: a file of the plugin folder; `package`: an entry point.
        target: the file's absolute path, or `module:Class`.
        version: changes when the code does: the file's identity and time, or the package's name and version.
        refusal: why it must not be used; empty: it may.
    """

    name: str
    kind: Literal["file", "package"]
    target: str
    version: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        """Return where it comes from, in words."""
        return self.target if self.kind == "file" else f"{self.version}, {self.target}"


class Catalog:
    """What can be found now; a catalog is made anew for each look at the configuration.

    Args:
        folder: the plugin folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._files: dict[str, Origin] | None = None
        self._packages: dict[str, Origin] | None = None

    def find(self, name: str) -> Origin | None:
        """Return the plugin of this name; `-` and `_` are one."""
        name = _canonical(name)
        return self._in_folder().get(name) or self._in_packages().get(name)

    def found(self) -> list[Origin]:
        """Return every plugin, in the order of their names."""
        found = self._in_packages() | self._in_folder()
        return [found[name] for name in sorted(found)]

    def names(self) -> list[str]:
        """Return every plugin's name."""
        return [origin.name for origin in self.found()]

    def _in_folder(self) -> dict[str, Origin]:
        if self._files is None:
            self._files = _by_name(_scan(self.folder))
        return self._files

    def _in_packages(self) -> dict[str, Origin]:
        if self._packages is None:
            self._packages = _by_name(_entry_points())
        return self._packages


def read_source(origin: Origin) -> bytes:
    """Return the code of a file of the plugin folder, if it still may be used.

    Raises:
        PluginError: it is gone, or refused; the message says why.
    """
    folder, name = os.path.split(origin.target)
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            refusal = _why_untrusted(os.fstat(folder_fd), folder)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
        finally:
            os.close(folder_fd)
        with open(fd, "rb") as file:
            refusal = refusal or _why_unusable(os.fstat(fd), origin.target)
            source = b"" if refusal else file.read(MAX_SOURCE_BYTES)
    except OSError as err:
        raise PluginError(f"{origin.target} cannot be read: {err.strerror}") from err
    if refusal:
        raise PluginError(refusal)
    return source


def _scan(folder: str) -> Iterable[Origin]:
    """Yield the plugin of each file of the folder, the refused ones as well."""
    try:
        names = sorted(os.listdir(folder))
        refusal = _why_untrusted(os.stat(folder), folder)
    except OSError:  # most machines have no such folder
        return
    for name in [name for name in names if name.endswith(".py") and not name.startswith(_NO_PLUGINS)][:MAX_FOUND]:
        path = os.path.join(folder, name)
        try:
            status = os.lstat(path)
        except OSError:
            continue
        version = f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
        why = refusal or _why_unusable(status, path)
        yield Origin(name.removesuffix(".py"), "file", path, version, why)


def _entry_points() -> Iterable[Origin]:
    """Yield the plugin of each entry point of our group."""
    from importlib import metadata  # some hundred kilobytes that an agent with its own plugins does without

    for entry in list(metadata.entry_points(group=GROUP))[:MAX_FOUND]:
        version = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
        refusal = "" if _TARGET.fullmatch(entry.value) else f"{entry.value!r} is not module:Class"
        yield Origin(entry.name, "package", entry.value, version, refusal)


def _by_name(origins: Iterable[Origin]) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    for origin in origins:
        found.setdefault(_canonical(origin.name), origin)
    return found


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _why_unusable(status: os.stat_result, path: str) -> str:
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is refused: it is a symbolic link; put the file itself there"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is refused: it is no file"
    if status.st_size > MAX_SOURCE_BYTES:
        return f"{path} is refused: it is larger than {MAX_SOURCE_BYTES} bytes; make a package of it"
    return _why_untrusted(status, path)


def _why_untrusted(status: os.stat_result, path: str) -> str:
    """Return why somebody else could have written this; empty: nobody could."""
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} is refused: it belongs to uid {status.st_uid}, who could change it; run chown root {path}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} is refused: its group or others may write it; run chmod go-w {path}"
    return ""
