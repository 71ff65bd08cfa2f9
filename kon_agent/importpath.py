"""The import path of a child that has become another user.

The interpreter or the checkout may live below a folder that user cannot enter (a Python in root's home, a
clone in a private temporary folder). So each place on `sys.path` is held by descriptor while it can still be
opened, and those that the new user cannot reach are imported from through /proc/self/fd/N instead.

Invariants:
* A place the user can reach by name is left as it is, and its descriptor is closed.
* A held descriptor opens a folder, not what its permissions protect: files inside stay subject to their own.
* The current folder is no place to import from, unless this package itself lives there; nor is `/`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import ModuleType

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE_HOME = os.path.dirname(_PACKAGE)

_surveyed: tuple[int, list[ModuleType]] = 0, []
"""How many modules there were at the last `survey`, and which of them are packages."""


def survey() -> None:
    """Note which modules are packages: looking at them all in each child would copy a megabyte of pages there."""
    global _surveyed
    modules = list(sys.modules.values())
    _surveyed = len(modules), [module for module in modules if "__path__" in getattr(module, "__dict__", {})]


def hold() -> dict[str, int]:
    """Open every place on `sys.path` that exists, and return its O_PATH descriptor by absolute name.

    This package's own folder is held, too: the checkout around it may itself be closed to the user.
    """
    here = _current_folder()
    held: dict[str, int] = {}
    for entry in (*sys.path, _PACKAGE):
        place = os.path.normpath(os.path.join(here, entry))
        if place in held or place == os.sep or (place == here and place != _PACKAGE_HOME):
            continue
        try:
            held[place] = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # python3XX.zip is listed by default and hardly ever exists
            continue
    return held


def adopt(held: Mapping[str, int]) -> tuple[int, ...]:
    """Make `sys.path`, and the packages imported already, work for the user this process has become.

    Args:
        held: what `hold` returned before the user changed.

    Returns:
        The descriptors that imports now depend on and that must stay open; all others are closed.
    """
    moved: dict[str, str] = {}
    for place, fd in held.items():
        if _is_reachable(place):
            os.close(fd)
        else:
            moved[place] = f"/proc/self/fd/{fd}"
    sys.path[:] = [moved.get(place, place) for place in held if place != _PACKAGE]
    if moved:
        count, packages = _surveyed
        for module in packages if count == len(sys.modules) else list(sys.modules.values()):
            _move_package(module, moved)
    return tuple(held[place] for place in moved)


def unreadable(name: str) -> list[str]:
    """Return what `import name` would look at but this user may not read: why it failed, most likely."""
    parts = name.split(".")
    stems = [os.path.join(place, *parts[:depth]) for place in sys.path for depth in range(1, len(parts) + 1)]
    candidates = [*sys.path, *(stem + suffix for stem in stems for suffix in ("", ".py"))]
    return [os.path.realpath(path) for path in candidates if os.path.exists(path) and not _is_reachable(path)]


def _move_package(module: ModuleType, moved: Mapping[str, str]) -> None:
    names = getattr(module, "__dict__", {})
    if "__path__" not in names:
        return
    folders = [relocate(folder, moved) for folder in names["__path__"]]
    module.__path__ = folders
    spec = names.get("__spec__")
    if spec is not None and spec.submodule_search_locations is not None:
        spec.submodule_search_locations = folders


def relocate(folder: str, moved: Mapping[str, str]) -> str:
    """Return `folder` below the new name of the longest place in `moved` that holds it, or unchanged."""
    for place in sorted(moved, key=len, reverse=True):
        if folder == place or folder.startswith(place + os.sep):
            return moved[place] + folder[len(place) :]
    return folder


def _is_reachable(path: str) -> bool:
    mode = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK
    return os.access(path, mode)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed, or beyond our reach: nothing to import from
        return os.sep
