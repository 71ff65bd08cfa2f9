"""The process's own control group (cgroup v2), where it has been delegated: the kernel's limits below ours.

The governor asks; the kernel makes sure. In a group that was handed to us (systemd: `Delegate=yes`) two are made:

    <ours>/core      supervisor, sender, the heartbeat plugin's worker: never held up
    <ours>/workers   the other workers: `cpu.max` and `memory.high`

`cgroup.subtree_control` wants all processes in leaves, so this is done before the first fork, with this process alone
in the group; workers are moved when they have been forked. Where anything of this cannot be had, nothing is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

MOUNT = "/sys/fs/cgroup"
PERIOD_US = 1_000_000  # the longest there is: a cycle of a few hundredths of a second is not cut in pieces
MIN_QUOTA_US = 1_000  # the least the kernel takes
CORE = "/core"
NEEDED = frozenset({"cpu", "memory"})


@dataclass(frozen=True, slots=True)
class Delegated:
    """A group of our own with its two leaves.

    Attributes:
        path: its folder.
    """

    path: str

    def limit(self, cpu: float, memory_bytes: int) -> None:
        """Hold the workers to so many cores and so much memory.

        Raises:
            OSError: the group is gone, or no longer ours.
        """
        quota_us = max(MIN_QUOTA_US, int(cpu * PERIOD_US))
        _write(f"{self.path}/workers/cpu.max", f"{quota_us} {PERIOD_US}")
        _write(f"{self.path}/workers/memory.high", str(memory_bytes))

    def admit(self, pid: int) -> None:
        """Move a worker to where the limits are.

        Raises:
            OSError: it has ended, or the group is no longer ours.
        """
        _write(f"{self.path}/workers/cgroup.procs", str(pid))


def is_marked(path: str) -> bool:
    """Whether systemd says that a group is its service's own: `user.delegate` is "1" (systemd CGROUP_DELEGATION)."""
    try:
        return os.getxattr(path, "user.delegate") == b"1"
    except OSError:
        return False


def claim(
    pid: int, mount: str = MOUNT, proc: str = "/proc", is_delegated: Callable[[str], bool] = is_marked
) -> Delegated | None:
    """Divide this process's group, and return it; None where it is not ours to divide, which is no error.

    Args:
        pid: this process, the only one in the group.
        mount: where cgroup v2 is mounted.
        proc: where /proc is.
        is_delegated: whether a folder below `mount` is the group's user's own.

    Raises:
        OSError: it is ours, and yet a file of it cannot be written.
    """
    place = _own_place(_read(f"{proc}/self/cgroup"))
    if place in ("", "/"):
        return None  # only cgroup v1, or the root group, which is nobody's own
    path = mount + place
    if place.endswith(CORE) and is_delegated(path.removesuffix(CORE)):
        return Delegated(path.removesuffix(CORE))  # divided already, by the code whose place we have taken
    if not is_delegated(path) or not set(_read(f"{path}/cgroup.controllers").split()) >= NEEDED:
        return None
    if _read(f"{path}/cgroup.procs").split() != [str(pid)]:
        return None  # somebody else is in it: it could not be divided
    for leaf in ("core", "workers"):
        os.makedirs(f"{path}/{leaf}", exist_ok=True)
    _write(f"{path}/core/cgroup.procs", str(pid))
    _write(f"{path}/cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(NEEDED)))
    return Delegated(path)


def _own_place(text: str) -> str:
    """Return the group in /proc/PID/cgroup (cgroups(7)): the line of hierarchy 0 is that of version 2."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::").removesuffix(" (deleted)")
    return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
