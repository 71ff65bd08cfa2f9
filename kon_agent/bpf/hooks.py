"""An interface's two hooks: how a program gets onto them, and how it leaves.

    ingress   XDP in the driver (native), else in the stack (generic)
    egress    TCX (Linux 6.6), else a filter in a clsact qdisc

Invariants:
* What is there already stays, unless it is our own and nobody alive answers for it.
* A link's fd is the attachment. A clsact filter has none: it outlives us if we are killed, and the next agent replaces
  it, knowing it by name and handle. The qdisc goes with the filter only if we added it and nothing else is in it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from kon_agent.bpf import layout, libbpf, objects, surroundings
from kon_agent.bpf.layout import EgressMode, IngressMode
from kon_agent.errors import BpfError
from kon_agent.linux import tc

XDP_PROGRAM = "kon_xdp_ingress"  # the functions in ebpf/kon_net.bpf.c
FRAGS_PROGRAM = "kon_xdp_frags"  # the same for frames in more than one piece (Linux 5.18): may be missing
TC_PROGRAM = "kon_tc_egress"
_XDP_NAMES = (XDP_PROGRAM, FRAGS_PROGRAM)
TC_HANDLE = 0x6B6F6E  # "kon": with the name, what tells our filter from everybody else's
MAX_PRIORITY = 64  # how many priorities may be somebody else's before we give up; a handful is much

# Another program holds the hook (EBUSY), or the device's other XDP mode or a device above (EEXIST): leave it alone.
OCCUPIED = (errno.EBUSY, errno.EEXIST)
# Why no native program is tried: a bond with one would take no port that has one (bond_enslave).
BOND = "a bond: its ports have native programs"
ASKED = "asked for: plugins.ebpf.generic"
_NO_TCX = "EINVAL: TCX needs kernel 6.6"


@dataclass(frozen=True, slots=True)
class Ingress:
    """One interface's way in.

    Attributes:
        mode: how its packets are counted.
        reason: why not in a better way; empty: there is none.
        fd: the link; -1: none.
        occupant_id: the number of the program that is in the way; 0: none is known.
        is_blocked_above: a device above (a bridge, a bond, a macvlan) has a program, and that excludes one here.
    """

    mode: IngressMode
    reason: str = ""
    fd: int = -1
    occupant_id: int = 0
    is_blocked_above: bool = False

    def release(self) -> None:
        """Let the program go."""
        if self.fd >= 0:
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Egress:
    """One interface's way out; as for `Ingress`.

    Attributes:
        mode: how its packets are counted.
        reason: why not in a better way.
        fd: the link; -1: none.
        has_added_qdisc: the clsact qdisc is ours.
    """

    mode: EgressMode
    reason: str = ""
    fd: int = -1
    has_added_qdisc: bool = False

    def release(self, ifindex: int) -> None:
        """Let the program go, and with it what was made for it."""
        if self.fd >= 0:
            os.close(self.fd)
        elif self.mode == "clsact":
            remove_filter(ifindex, self.has_added_qdisc)


class Hooks:
    """Who attaches.

    Args:
        library: libbpf.
        programs: their descriptors, by name.
        looks_around: ask who else is there, and make filters, too; else nothing but links.
    """

    def __init__(self, library: libbpf.Library, programs: Mapping[str, int], *, looks_around: bool) -> None:
        self._library = library
        self._programs = programs
        self._looks_around = looks_around

    def run(self, programs: Mapping[str, int]) -> None:
        """Attach these programs from now on, which have the same names."""
        self._programs = programs

    def renew(self, ifindex: int, ingress: Ingress, egress: Egress) -> bool:
        """Put the programs of now in the place of what is attached; return False where that cannot be.

        No packet passes without being counted, and none is counted twice.
        """
        try:
            if egress.fd >= 0:
                self._library.exchange(egress.fd, self._programs[TC_PROGRAM])
            elif egress.mode == "clsact":
                self._put_filter(ifindex, is_ours=True)  # so nobody's descriptors need to be looked through for it
            return ingress.fd < 0 or any(self._is_exchanged(ingress.fd, fd) for fd in self._xdp_programs())
        except (BpfError, OSError):
            return False

    def _is_exchanged(self, link_fd: int, program_fd: int) -> bool:
        try:
            self._library.exchange(link_fd, program_fd)
        except BpfError:
            return False
        return True

    def _xdp_programs(self) -> list[int]:
        """Return what may run on the way in, the best first.

        One that takes no frames in pieces keeps jumbo frames off: veth lowers its peer's greatest MTU for it.
        """
        return [self._programs[name] for name in (FRAGS_PROGRAM, XDP_PROGRAM) if name in self._programs]

    def attach_ingress(self, ifindex: int, why_generic: str = "") -> Ingress:
        """Count what comes in: native, else generic. A refusal is no error, but a reason.

        Args:
            ifindex: the interface.
            why_generic: why a native program is not even tried; empty: it is.
        """
        found = self._try_ingress(ifindex, why_generic)
        if found.occupant_id:
            occupant = surroundings.xdp_occupant(ifindex)
            if occupant and occupant.name in _XDP_NAMES and surroundings.evict_orphaned(ifindex, occupant):
                return self._try_ingress(ifindex, why_generic)
        return found

    def attach_egress(self, ifindex: int, ingress: Ingress) -> Egress:
        """Count what goes out: by TCX, else by a clsact filter. A refusal is no error, but a reason.

        Args:
            ifindex: the interface.
            ingress: what its way in has come to: another agent there has the way out as well.
        """
        try:
            return Egress("tcx", fd=self._library.link(self._programs[TC_PROGRAM], ifindex, libbpf.BPF_TCX_EGRESS))
        except BpfError as err:
            if err.errno != errno.EINVAL:  # what kernels before 6.6 answer to an attach type they do not know
                return Egress("none", reason_of(err.errno))
        if not self._looks_around:
            return Egress("none", _NO_TCX)
        if ingress.occupant_id and surroundings.name_of(ingress.occupant_id) in _XDP_NAMES:
            return Egress("none", "busy: another kon-agent counts this interface")
        try:
            return Egress("clsact", _NO_TCX, has_added_qdisc=self._put_filter(ifindex))
        except OSError as err:
            return Egress("none", reason_of(err.errno or 0))

    def is_attached(self, ifindex: int, ingress: Ingress, egress: Egress) -> bool:
        """Whether what was attached still is: an interface that went took its programs along.

        Raises:
            BpfError: the kernel does not say.
            OSError: neither does rtnetlink.
        """
        if not self._looks_around:
            return True
        if any(fd >= 0 and objects.link_of(fd).ifindex != ifindex for fd in (ingress.fd, egress.fd)):
            return False
        return egress.mode != "clsact" or _own_filter(ifindex) is not None  # anybody may take a filter away

    def has_way_cleared(self, ifindex: int, ingress: Ingress) -> bool:
        """Whether what kept a program off is there no longer, or cannot be told to be."""
        if ingress.occupant_id:
            occupant = surroundings.xdp_occupant(ifindex)
            return occupant is None or occupant.program_id != ingress.occupant_id
        return ingress.is_blocked_above

    def _try_ingress(self, ifindex: int, why_generic: str) -> Ingress:
        programs = self._xdp_programs()
        # The kernel's automatic mode stops at the driver's refusal; we go on, and say so.
        ways = [(program, libbpf.XDP_FLAGS_DRV_MODE) for program in programs if not why_generic]
        ways.append((programs[0], libbpf.XDP_FLAGS_SKB_MODE))
        refusals: list[int] = []
        for program, flags in ways:
            try:
                fd = self._library.link(program, ifindex, libbpf.BPF_XDP, flags)
            except BpfError as err:
                if err.errno in OCCUPIED:
                    return self._refused(ifindex, err.errno)
                refusals.append(err.errno)
            else:
                if flags == libbpf.XDP_FLAGS_DRV_MODE:
                    return Ingress("native", fd=fd)
                return Ingress("generic", why_generic or reason_of(refusals[0]), fd)
        return Ingress("none", reason_of(refusals[-1]))

    def _refused(self, ifindex: int, number: int) -> Ingress:
        if not self._looks_around:
            return Ingress("none", reason_of(number))
        occupant = surroundings.xdp_occupant(ifindex)
        if occupant is not None:
            return Ingress("none", reason_of(number, f"{occupant} is attached"), occupant_id=occupant.program_id)
        # dev_xdp_attach, net/core/dev.c: with a program on a device above, there can be none below.
        if number == errno.EEXIST:
            return Ingress("none", reason_of(number, "a device above has a program"), is_blocked_above=True)
        return Ingress("none", reason_of(number))

    def _put_filter(self, ifindex: int, *, is_ours: bool = False) -> bool:
        """Put our filter in place, of the lowest priority there is; return whether the qdisc was added for it."""
        has_added = tc.add_clsact(ifindex)
        if not has_added and tc.qdisc_kind(ifindex) != "clsact":
            raise OSError(errno.EBUSY, "another qdisc has the place of clsact")
        present = tc.filters(ifindex)
        own = next((each for each in present if _is_own(each)), None)
        if own and not is_ours and not surroundings.is_unattended(own.program_id):
            raise OSError(errno.EBUSY, "another agent's filter")
        taken = {each.priority for each in present}
        priority = own.priority if own else next((n for n in range(1, MAX_PRIORITY) if n not in taken), MAX_PRIORITY)
        try:
            tc.set_filter(ifindex, priority, TC_HANDLE, self._programs[TC_PROGRAM], TC_PROGRAM)
        except OSError:
            if has_added:
                with suppress(OSError):
                    tc.delete_clsact(ifindex)
            raise
        return has_added


def remove_filter(ifindex: int, has_added_qdisc: bool) -> None:
    """Take our filter away, and the qdisc if it is ours and empty; nothing happens where it is gone already."""
    with suppress(OSError):  # with its interface, or by somebody else's hand
        own = _own_filter(ifindex)
        if own is not None:
            tc.delete_filter(ifindex, own.priority, own.handle)
        if has_added_qdisc and not tc.filters(ifindex) and not tc.filters(ifindex, tc.INGRESS):
            tc.delete_clsact(ifindex)


def reason_of(number: int, obstacle: str = "another program is attached") -> str:
    """Return why an attachment failed, as a label: an errno, and what is in the way where something is."""
    busy = f"busy: {obstacle}, " if number in OCCUPIED else ""
    return (busy + libbpf.errno_text(number))[: layout.MAX_REASON_CHARS]


def _own_filter(ifindex: int) -> tc.Filter | None:
    return next((each for each in tc.filters(ifindex) if _is_own(each)), None)


def _is_own(found: tc.Filter) -> bool:
    return (found.kind, found.handle, found.name) == ("bpf", TC_HANDLE, TC_PROGRAM)
