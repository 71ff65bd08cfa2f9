"""A BPF program on an interface's way out, for kernels without TCX (before 6.6): a clsact qdisc and a filter in it.

    interface -- clsact (parent ffff:fff1) -- egress (parent ffff:fff3) -- filter: priority, handle, program (tc-bpf(8))

Unlike a link, a filter outlives whoever made it: it is taken away by its priority and handle, or with its qdisc.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from kon_agent.linux import rtnetlink
from kon_agent.linux.rtnetlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, attribute

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38  # linux/rtnetlink.h
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
CLSACT = 0xFFFFFFF1  # TC_H_CLSACT, linux/pkt_sched.h
INGRESS = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
EGRESS = 0xFFFFFFF3
_CLSACT_HANDLE = 0xFFFF0000
_ALL_PROTOCOLS = socket.htons(0x0003)  # ETH_P_ALL
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11  # linux/pkt_cls.h
_DIRECT_ACTION = 1  # the program's result is the verdict
_TCMSG = struct.Struct("=BxxxiIII")  # struct tcmsg: family, pad, ifindex, handle, parent, info
_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter of any kind.

    Attributes:
        priority: lower ones are asked first.
        handle: its number among those of its priority; 0 where it is only the head of them.
        kind: "bpf", "u32", …
        name: what its maker calls it; empty but for "bpf".
        program_id: the kernel's number of the program; 0 but for "bpf".
    """

    priority: int
    handle: int
    kind: str
    name: str = ""
    program_id: int = 0


def add_clsact(ifindex: int) -> bool:
    """Give an interface the qdisc; return False where it has one already.

    Raises:
        OSError: refused, with the kernel's errno.
    """
    body = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, CLSACT, 0) + attribute(_TCA_KIND, b"clsact\0")
    try:
        rtnetlink.order(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body)
    except OSError as err:
        if err.errno == errno.EEXIST:
            return False
        raise
    return True


def qdisc_kind(ifindex: int) -> str:
    """Return what is in the place of clsact: "clsact", its older brother "ingress", or nothing.

    An "ingress" qdisc takes filters for the way out without a word, and runs them on the way in.

    Raises:
        OSError: refused, with the kernel's errno.
    """
    for body in rtnetlink.ask(RTM_GETQDISC, _TCMSG.pack(0, ifindex, 0, 0, 0), is_dump=True):
        if len(body) < _TCMSG.size:
            continue
        _, at, _, parent, _ = _TCMSG.unpack_from(body)
        if (at, parent) == (ifindex, CLSACT):
            return _text(rtnetlink.attributes(body[_TCMSG.size :]).get(_TCA_KIND, b""))
    return ""


def delete_clsact(ifindex: int) -> None:
    """Take the qdisc away, and every filter in it.

    Raises:
        OSError: refused, with the kernel's errno.
    """
    body = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, CLSACT, 0) + attribute(_TCA_KIND, b"clsact\0")
    rtnetlink.order(RTM_DELQDISC, 0, body)


def set_filter(ifindex: int, priority: int, handle: int, program_fd: int, name: str) -> None:
    """Run a program on every frame going out; a filter of the same priority and handle is replaced in one step.

    Raises:
        OSError: refused, with the kernel's errno: EINVAL where another kind of filter has the priority.
    """
    options = (
        attribute(_TCA_BPF_FD, _U32.pack(program_fd))
        + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + attribute(_TCA_BPF_FLAGS, _U32.pack(_DIRECT_ACTION))
    )
    body = _egress(ifindex, priority, handle) + attribute(_TCA_KIND, b"bpf\0") + attribute(_TCA_OPTIONS, options)
    rtnetlink.order(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, body)


def delete_filter(ifindex: int, priority: int, handle: int) -> None:
    """Take a BPF filter away.

    Raises:
        OSError: refused, with the kernel's errno; ENOENT where there is none, ENODEV where the interface is gone.
    """
    rtnetlink.order(RTM_DELTFILTER, 0, _egress(ifindex, priority, handle) + attribute(_TCA_KIND, b"bpf\0"))


def filters(ifindex: int, parent: int = EGRESS) -> list[Filter]:
    """Return the filters on an interface's way out, or in (`parent` INGRESS); none where there is no such qdisc.

    Raises:
        OSError: refused, with the kernel's errno.
    """
    body = _TCMSG.pack(0, ifindex, 0, parent, 0)
    try:
        answers = rtnetlink.ask(RTM_GETTFILTER, body, is_dump=True)
    except OSError as err:
        if err.errno in (errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return []  # how kernels say "no such qdisc" differs
        raise
    return [found for found in map(parse_filter, answers) if found is not None]


def parse_filter(body: bytes) -> Filter | None:
    """Return the filter of an RTM_NEWTFILTER message; None where it is cut short."""
    if len(body) < _TCMSG.size:
        return None
    *_, handle, _parent, info = _TCMSG.unpack_from(body)
    found = rtnetlink.attributes(body[_TCMSG.size :])
    options = rtnetlink.attributes(found.get(_TCA_OPTIONS, b""))
    program = options.get(_TCA_BPF_ID, b"")
    return Filter(
        priority=info >> 16,
        handle=handle,
        kind=_text(found.get(_TCA_KIND, b"")),
        name=_text(options.get(_TCA_BPF_NAME, b"")),
        program_id=_U32.unpack(program)[0] if len(program) == _U32.size else 0,
    )


def _egress(ifindex: int, priority: int, handle: int) -> bytes:
    return _TCMSG.pack(0, ifindex, handle, EGRESS, priority << 16 | _ALL_PROTOCOLS)


def _text(payload: bytes) -> str:
    return payload.partition(b"\0")[0].decode(errors="backslashreplace")
