"""A BPF program of somebody else's: two instructions that pass every packet, attached as other tools do it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from kon_agent.bpf import libbpf
from kon_agent.linux import rtnetlink
from kon_agent.linux.libc import syscall
from kon_agent.linux.syscalls import ARCHITECTURES

NAME = "not_ours"
XDP, SCHED_CLS = 6, 3  # enum bpf_prog_type
_PROG_LOAD = 5
_RTM_SETLINK = 19
_IFLA_XDP, _IFLA_XDP_FD, _IFLA_XDP_FLAGS = 43, 1, 3


def load(kind: int = XDP, name: str = NAME) -> int:
    """Load the program; return its descriptor."""
    verdict = 2 if kind == XDP else 0xFFFFFFFF  # XDP_PASS, TC_ACT_UNSPEC
    code = struct.pack("=BBhI", 0xB7, 0, 0, verdict) + struct.pack("=BBhI", 0x95, 0, 0, 0)  # r0 = verdict; exit
    instructions, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16s",
        kind,
        2,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        name.encode(),
    )
    number = ARCHITECTURES[platform.machine()].numbers["bpf"]
    block = ctypes.create_string_buffer(attr, 128)
    fd = syscall(number, _PROG_LOAD, ctypes.byref(block), len(block), what="load a program")
    os.set_inheritable(fd, False)
    return fd


def link_xdp(ifindex: int, flags: int, name: str = NAME) -> int:
    """Attach by a link, in the mode of `flags`; return its descriptor, with which it ends."""
    program = load(XDP, name)
    try:
        return libbpf.library().link(program, ifindex, libbpf.BPF_XDP, flags)
    finally:
        os.close(program)


def set_xdp(ifindex: int, flags: int, program: int) -> None:
    """Attach as `ip link set xdp` does; -1: detach."""
    nested = rtnetlink.attribute(_IFLA_XDP_FD, struct.pack("=i", program)) + rtnetlink.attribute(
        _IFLA_XDP_FLAGS, struct.pack("=I", flags)
    )
    body = struct.pack("=BxHiII", 0, 0, ifindex, 0, 0) + rtnetlink.attribute(_IFLA_XDP | 0x8000, nested)
    rtnetlink.order(_RTM_SETLINK, 0, body)
