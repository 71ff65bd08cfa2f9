"""The kernel's BPF programs and links by number or descriptor: what they are called, where they are, what they cost.

Plain bpf(2), whatever libbpf there is. To open an object by its number takes CAP_SYS_ADMIN; to ask about one that is
open takes nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kon_agent.errors import BpfError
from kon_agent.linux.libc import syscall
from kon_agent.linux.syscalls import ARCHITECTURES

BPF_LINK_TYPE_XDP = 6  # linux/bpf.h, enum bpf_link_type
MAX_LINKS = 10_000  # a walk over all links of the machine ends there
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 13, 15  # enum bpf_cmd
_LINK_GET_FD_BY_ID, _LINK_GET_NEXT_ID, _ENABLE_STATS, _LINK_DETACH = 30, 31, 32, 34
_STATS_RUN_TIME = 0  # enum bpf_stats_type
# Heads of struct bpf_prog_info and bpf_link_info: the kernel fills as much as it is given room for.
_PROGRAM_INFO_BYTES = 232
_NAME_AT, _NAME_BYTES, _RUNS_AT = 64, 16, 192  # name; run_time_ns and run_cnt
_LINK_INFO_BYTES = 64
_ATTR_BYTES = 144  # union bpf_attr: more than any command here needs; the kernel wants the rest to be zero


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program: its number, its name (at most 15 bytes), and what it cost while statistics were on."""

    id: int
    name: str
    run_time_ns: int
    run_cnt: int


@dataclass(frozen=True, slots=True)
class Link:
    """A link: its number, its enum bpf_link_type, its program's number; ifindex 0 once its interface is gone."""

    id: int
    kind: int
    program_id: int
    ifindex: int


def program_of(fd: int) -> Program:
    """Return what an open program is.

    Raises:
        BpfError: it is none.
    """
    info = _info(fd, _PROGRAM_INFO_BYTES, "ask about a BPF program")
    name = info[_NAME_AT : _NAME_AT + _NAME_BYTES].partition(b"\0")[0].decode(errors="backslashreplace")
    return Program(struct.unpack_from("=I", info, 4)[0], name, *struct.unpack_from("=QQ", info, _RUNS_AT))


def program(program_id: int) -> Program:
    """Return what the program of that number is.

    Raises:
        BpfError: gone, or EPERM without CAP_SYS_ADMIN.
    """
    fd = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", program_id), f"open BPF program {program_id}")
    try:
        return program_of(fd)
    finally:
        os.close(fd)


def link_of(fd: int) -> Link:
    """Return what an open link is; its `ifindex` has a meaning for XDP and TCX only.

    Raises:
        BpfError: it is none.
    """
    kind, number, program_id, _, ifindex = struct.unpack_from("=5I", _info(fd, _LINK_INFO_BYTES, "ask about a link"))
    return Link(number, kind, program_id, ifindex)


def links() -> Iterator[tuple[int, Link]]:
    """Yield an open descriptor and what it is, for every link of the machine; the descriptor is closed afterwards.

    Raises:
        BpfError: EPERM without CAP_SYS_ADMIN.
    """
    number = 0
    for _ in range(MAX_LINKS):
        attr = ctypes.create_string_buffer(struct.pack("=I", number), _ATTR_BYTES)
        try:
            _call(_LINK_GET_NEXT_ID, attr, "list BPF links")
            number = struct.unpack_from("=I", attr, 4)[0]
            fd = _bpf(_LINK_GET_FD_BY_ID, struct.pack("=I", number), f"open BPF link {number}")
        except BpfError as err:
            if err.errno != errno.ENOENT:
                raise
            if struct.unpack_from("=I", attr, 4)[0] == 0:
                return  # that was the last
            continue  # gone between the two calls
        try:
            yield fd, link_of(fd)
        finally:
            os.close(fd)


def detach_link(fd: int) -> None:
    """Take a link's program away from where it is, whoever holds the link (Linux 5.9).

    Raises:
        BpfError: refused.
    """
    _bpf(_LINK_DETACH, struct.pack("=I", fd), "detach a BPF link")


def enable_statistics() -> int:
    """Have the kernel count every program's runs and their time; return the descriptor that ends it when closed.

    Raises:
        BpfError: a kernel before 5.8, or EPERM without CAP_SYS_ADMIN.
    """
    return _bpf(_ENABLE_STATS, struct.pack("=I", _STATS_RUN_TIME), "enable BPF run-time statistics")


def _info(fd: int, size: int, what: str) -> bytes:
    info = ctypes.create_string_buffer(size)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(info)), what)
    return info.raw


def _bpf(command: int, attr: bytes, what: str) -> int:
    return _call(command, ctypes.create_string_buffer(attr, _ATTR_BYTES), what)


def _call(command: int, attr: ctypes.Array[ctypes.c_char], what: str) -> int:
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise BpfError(f"cannot {what}: bpf(2) has no known number on {platform.machine()}", errno.ENOSYS)
    try:
        return syscall(architecture.numbers["bpf"], command, ctypes.byref(attr), _ATTR_BYTES, what=f"cannot {what}")
    except OSError as err:
        raise BpfError(f"cannot {what}: {os.strerror(err.errno or 0)}", err.errno or 0) from err
