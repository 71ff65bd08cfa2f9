"""Who else is on an interface: other programs at its hooks, whose they are, and the devices above it.

Invariant: a program is only taken away where it is this project's and nobody alive answers for it: every process that
holds its link is an orphaned child of an agent. A second agent, wherever it runs, keeps what it has; so does whoever we
may not look at.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from kon_agent.bpf import objects
from kon_agent.errors import BpfError
from kon_agent.linux import xdp

SUPERVISOR_TITLE = "kon-agent: supervisor"
_CHILD_TITLES = ("kon-agent: worker ", "kon-agent: sender", "kon-agent: rehearsal", "kon-agent: tries ")


@dataclass(frozen=True, slots=True)
class Occupant:
    """A program at a hook: the kernel's number of it, its name where we may ask, and the XDP mode, or "tc"."""

    program_id: int
    name: str
    mode: str

    def __str__(self) -> str:
        called = f" {self.name}" if self.name else ""
        return f"{self.mode} program {self.program_id}{called}"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a descriptor of a program or its link: its title and its parent's."""

    title: str
    parent_title: str

    @property
    def is_orphan(self) -> bool:
        """Whether it is a child of an agent that is no more."""
        return self.title.startswith(_CHILD_TITLES) and self.parent_title != SUPERVISOR_TITLE


def xdp_occupant(ifindex: int) -> Occupant | None:
    """Return the XDP program an interface has, if it has one; None as well where that cannot be found out."""
    try:
        found = xdp.programs(ifindex)
    except OSError:
        return None
    return next((Occupant(number, name_of(number), mode) for mode, number in found.items()), None)


def name_of(program_id: int) -> str:
    """Return a program's name; empty where we may not ask (it takes CAP_SYS_ADMIN) or it is gone."""
    try:
        return objects.program(program_id).name
    except BpfError:
        return ""


def evict_orphaned(ifindex: int, occupant: Occupant) -> bool:
    """Take a program of ours off an interface if only orphans hold its link; return whether that was done.

    What the kernel or the privileges at hand do not allow is not done: the link may be looked at with CAP_SYS_ADMIN,
    its holders where /proc shows them.
    """
    if not is_any_orphaned():
        return False
    try:
        for fd, link in objects.links():
            is_it = (link.kind, link.program_id, link.ifindex) == (
                objects.BPF_LINK_TYPE_XDP, occupant.program_id, ifindex
            )  # fmt: skip
            if is_it and is_abandoned(list(holders(f"link_id:\t{link.id}\n"))):
                objects.detach_link(fd)
                return True
    except BpfError:
        pass
    return False


def is_unattended(program_id: int) -> bool:
    """Whether no agent that is alive has a program open, as far as /proc shows."""
    return all(holder.is_orphan for holder in holders(f"prog_id:\t{program_id}\n"))


def is_abandoned(found: list[Holder]) -> bool:
    """Whether nobody alive answers for what these processes hold. Without a visible holder there is an unseen one."""
    return bool(found) and all(holder.is_orphan for holder in found)


def holders(line: str, root: str = "/proc") -> Iterator[Holder]:
    """Yield every other process that has a descriptor whose fdinfo contains `line`, as far as /proc shows them."""
    for folder in _others(root):
        if _has(f"{folder}/fdinfo", line):
            yield _holder(folder, root)


def is_any_orphaned(root: str = "/proc") -> bool:
    """Whether there is an orphaned child of an agent at all, whatever it holds.

    Asked first: to look through every descriptor of a large machine takes seconds, and there is hardly ever one.
    """
    return any(_holder(folder, root).is_orphan for folder in _others(root) if _title(folder).startswith(_CHILD_TITLES))


def _others(root: str) -> Iterator[str]:
    return (f"{root}/{name}" for name in os.listdir(root) if name.isdigit() and int(name) != os.getpid())


def _holder(folder: str, root: str) -> Holder:
    return Holder(_title(folder), _title(f"{root}/{_parent(folder)}"))


def _has(folder: str, line: str) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:  # ended meanwhile, or not ours to look at
        return False
    return any(line in _text(f"{folder}/{name}") for name in names)


def _title(folder: str) -> str:
    return _text(f"{folder}/cmdline").rstrip("\0").replace("\0", " ")


def _parent(folder: str) -> str:
    # proc_pid_stat(5): the name in parentheses may hold anything; the state and the parent follow the last one.
    fields = _text(f"{folder}/stat").rpartition(")")[2].split()
    return fields[1] if len(fields) > 1 else "0"


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM, errno.EBADF):
            return ""
        raise
