"""Ways to keep BPF from a program: each is a prefix that runs a command without it, and undoes itself with the command.

As a program, `python -m tests.support.denial COMMAND…` runs a command that the kernel refuses bpf(2), as it does in a
container.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from kon_agent.linux import libc, seccomp
from kon_agent.linux.seccomp import Instruction

Prefix = Sequence[str]

BPF_CAPABILITIES: Final = "-bpf,-perfmon,-sys_admin"  # CAP_SYS_ADMIN stands for both of the others

_LOAD, _JUMP_EQ, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_OFFSET_NR = 0  # in struct seccomp_data
_SECCOMP_MODE_FILTER = 2


def missing_tool(*tools: str) -> str:
    """Return which of these programs this machine lacks, or nothing."""
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


def without_root() -> Prefix:
    """Run as a user without any capability; in a user namespace, since there it may still read what root owns."""
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


def without_capabilities(names: str = BPF_CAPABILITIES) -> Prefix:
    """Run as root that lacks some capabilities, by default what BPF takes, as setpriv(1) writes them."""
    return ["setpriv", "--bounding-set", names]


def without_call() -> Prefix:
    """Run as root with every capability; bpf(2) is refused."""
    return [sys.executable, "-m", "tests.support.denial"]


def without_btf() -> Prefix:
    """Run where the kernel's BTF is in none of the places libbpf looks in (btf__load_vmlinux_btf)."""
    places = ("/sys/kernel/btf", "/boot", "/lib/modules", "/usr/lib/modules", "/usr/lib/debug")
    return _hiding([place for place in places if os.path.isdir(place)], [])


def without_library() -> Prefix:
    """Run where neither pylibbpf nor the system's libbpf can be found."""
    return _hiding(pylibbpf_folders(), system_libbpf())


def without_pylibbpf() -> Prefix:
    """Run where pylibbpf cannot be found, as where it has no wheel."""
    return _hiding(pylibbpf_folders(), [])


def pylibbpf_folders() -> list[str]:
    """Return where pylibbpf is; nothing where it is not installed."""
    package = importlib.util.find_spec("pylibbpf")
    return list(package.submodule_search_locations or []) if package else []


def system_libbpf() -> list[str]:
    """Return the files of the system's libbpf; none where it is not installed."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    return sorted({line.split(" => ")[1] for line in listed.splitlines() if line.strip().startswith("libbpf.so.")})


def _hiding(folders: Sequence[str], files: Sequence[str]) -> Prefix:
    """Run in a mount namespace where folders and files are there and empty."""
    mounts = [f"mount -t tmpfs none {folder}" for folder in folders]
    mounts += [f"mount --bind /dev/null {file}" for file in files]
    return ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def _refuse_bpf() -> None:
    """Install a filter under which bpf(2) fails with EPERM, for good."""
    architecture = seccomp.current_architecture()
    assert architecture is not None, "no seccomp filter is known for this machine"
    program = [
        Instruction(_LOAD, _OFFSET_NR),
        Instruction(_JUMP_EQ, architecture.numbers["bpf"], if_false=1),
        Instruction(_RETURN, seccomp.REFUSE),
        Instruction(_RETURN, seccomp.ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(instruction.encode() for instruction in program))
    header = _Program(len(program), ctypes.addressof(code))
    words = (ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(header), ctypes.c_ulong(0), ctypes.c_ulong(0))
    libc.check(libc.libc.prctl(libc.PR_SET_SECCOMP, *words), "cannot install the filter")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


if __name__ == "__main__":
    _refuse_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - that is what it is for
