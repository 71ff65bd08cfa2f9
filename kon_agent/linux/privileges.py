"""What a process may do beyond its user, and the ways to have less of it.

Invariant: privilege only shrinks. There is no function here that regains any, and `verify_dropped` tries to
    and
fails, or raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass

from kon_agent.errors import PrivilegeError
from kon_agent.linux import libc, procfs

FALLBACK_USER = "nobody"

# linux/capability.h, in numeric order
# fmt: off
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
    "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)
# fmt: on
_CAPABILITY_BITS = 64  # the width of a set in capset(2) version 3
_CAPSET_VERSION_3 = 0x20080522


@dataclass(frozen=True, slots=True)
class User:
    """Whom the children run as.

    Attributes:
        is_fallback: the user asked for does not exist, and `nobody` stands in.
    """

    name: str
    uid: int
    gid: int
    is_fallback: bool = False


def resolve_user(name: str) -> User:
    """Look up the user called `name`, or `nobody` where there is none.

    Raises:
        PrivilegeError: neither exists, or the user is root or in root's group.
    """
    entry, is_fallback = _find_user(name), False
    if entry is None:
        entry, is_fallback = _find_user(FALLBACK_USER), True
    if entry is None:
        raise PrivilegeError(f"user {name!r} does not exist, nor does {FALLBACK_USER!r}; create it: useradd -r {name}")
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise PrivilegeError(
            f"user {entry.pw_name!r} has uid {entry.pw_uid} and gid {entry.pw_gid}: no child runs as root; "
            "set `user:` to an unprivileged one"
        )
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, is_fallback)


def _find_user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


@dataclass(frozen=True, slots=True)
class Privileges:
    """What this process may do now, and hence what it can take from its children."""

    uid: int
    effective: frozenset[str]

    @property
    def can_change_user(self) -> bool:
        """Whether a child can become another user; otherwise it keeps ours, with everything else taken."""
        return {"CAP_SETUID", "CAP_SETGID"} <= self.effective

    @property
    def can_drop_bounding_set(self) -> bool:
        """Whether the bounding set can be emptied; with no_new_privs it grants nothing anyway."""
        return "CAP_SETPCAP" in self.effective

    def missing(self, *needed: str) -> tuple[str, ...]:
        """Return those of the `needed` capability names that this process lacks, in the order given."""
        return tuple(name for name in needed if name not in self.effective)


def current_privileges() -> Privileges:
    """Return the privileges of this process."""
    return Privileges(os.geteuid(), effective_capabilities())


def effective_capabilities() -> frozenset[str]:
    """Return the names of this process's effective capabilities."""
    return _parse_capabilities(procfs.read_status()["CapEff"])


def _parse_capabilities(mask_hex: str) -> frozenset[str]:
    mask = int(mask_hex, 16)
    return frozenset(name for number, name in enumerate(CAPABILITIES) if mask >> number & 1)


def change_user(user: User) -> None:
    """Become `user`: no supplementary group, real, effective and saved ids alike.

    Raises:
        OSError: CAP_SETUID or CAP_SETGID is missing.
    """
    os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def drop_bounding_set() -> None:
    """Empty the bounding set, so that no file capability or set-uid program can bring any back.

    Raises:
        OSError: CAP_SETPCAP is missing.
    """
    for number in range(_CAPABILITY_BITS):
        try:
            is_set = libc.prctl(libc.PR_CAPBSET_READ, number)
        except OSError:  # EINVAL: beyond the last capability of this kernel
            return
        if is_set:
            libc.prctl(libc.PR_CAPBSET_DROP, number, f"cannot drop capability {number} from the bounding set")


class _CapsetHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def clear_capabilities() -> None:
    """Empty the ambient, effective, permitted and inheritable sets.

    Raises:
        OSError: the kernel refused.
    """
    # Linux before 4.3 has no ambient set; the calling convention of PR_CAP_AMBIENT gives EINVAL there.
    with contextlib.suppress(OSError):
        libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapsetHeader(_CAPSET_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, low and high half
    libc.check(libc.libc.capset(ctypes.byref(header), nothing), "cannot clear the capabilities")


def set_no_new_privs() -> None:
    """Promise the kernel that no execve(2) shall ever add a privilege; Landlock and seccomp ask for it."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, "cannot set no_new_privs")


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send `signum` when the parent's forking thread dies. setresuid clears it (prctl(2))."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signum, "cannot set the parent death signal")


def set_dumpable(is_dumpable: bool) -> None:
    """Say whether processes of the same user may trace this one, read its memory, or find its core dumped."""
    libc.prctl(libc.PR_SET_DUMPABLE, int(is_dumpable), "cannot set dumpable")


def verify_dropped(uid: int, gid: int, *, is_user_changed: bool, is_bounding_set_dropped: bool) -> None:
    """Prove that this process runs as `uid` and `gid`, holds no capability, and cannot become root again.

    Args:
        is_user_changed: the process left another user, so no supplementary group may remain.
        is_bounding_set_dropped: the bounding set must be empty, too.

    Raises:
        PrivilegeError: something is still there; the process must not go on.
    """
    status = procfs.read_status()
    expected = {
        "Uid": [uid] * 4,
        "Gid": [gid] * 4,
        "NoNewPrivs": [1],
        **{name: [0] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
    }
    if is_bounding_set_dropped:
        expected["CapBnd"] = [0]
    if is_user_changed:
        expected["Groups"] = []
    for name, words in expected.items():
        base = 16 if name.startswith("Cap") else 10
        if words != [int(word, base) for word in status.get(name, "-1").split()]:
            raise PrivilegeError(f"{name} is {status.get(name)!r} after the drop, expected {words}")
    if uid == 0:
        raise PrivilegeError("uid is still 0 after the drop; set `user:` to an unprivileged user")
    _expect_refusal("setresuid to root", lambda: os.setresuid(0, 0, 0))
    if gid != 0:
        _expect_refusal("setresgid to root", lambda: os.setresgid(0, 0, 0))


def _expect_refusal(what: str, attempt: Callable[[], None]) -> None:
    try:
        attempt()
    except OSError:  # EPERM; EINVAL in a user namespace that has no root
        return
    raise PrivilegeError(f"{what} succeeded after the drop; refusing to run")
