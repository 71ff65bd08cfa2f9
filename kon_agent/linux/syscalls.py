"""System call numbers of the architectures the seccomp filter knows.

Source: x86_64 arch/x86/entry/syscalls/syscall_64.tbl, aarch64 include/uapi/asm-generic/unistd.h. A name that
    an
architecture lacks (fork on aarch64) is left out there. Numbers from 424 on are the same on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_COMMON: Final = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "process_mrelease": 448,
}

# name: (x86_64, aarch64)
_BY_ARCHITECTURE: Final = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "acct": (163, 89),
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fcntl": (72, 25),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "ioctl": (16, 29),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "listen": (50, 201),
    "memfd_create": (319, 279),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "msgget": (68, 186),
    "move_pages": (279, 239),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "setsid": (112, 157),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}

_ONLY_X86_64: Final = {"fork": 57, "vfork": 58, "iopl": 172, "ioperm": 173}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One machine type.

    Attributes:
        audit: AUDIT_ARCH_* of linux/audit.h, by which the kernel says whose numbers a call uses.
        has_x32: the kernel may offer a second table under the same `audit` word.
    """

    audit: int
    numbers: dict[str, int]
    has_x32: bool = False


ARCHITECTURES: Final = {
    "x86_64": Architecture(
        0xC000003E,
        {name: pair[0] for name, pair in _BY_ARCHITECTURE.items()} | _COMMON | _ONLY_X86_64,
        has_x32=True,
    ),
    "aarch64": Architecture(0xC00000B7, {name: pair[1] for name, pair in _BY_ARCHITECTURE.items()} | _COMMON),
}
