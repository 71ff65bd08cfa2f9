"""The packet counters of the network interfaces: their BPF object, and where its programs are attached.

Owned by the supervisor, before and while it has children:

    load     pylibbpf loads the object, we take fds of our own and let it go; freeze the counters, map them
    attach   a slot, an entry in the kernel's interface table, then a link per direction
    detach   the links, then the entry; the slot goes to the end of the queue

Invariants:
* A link's fd is the attachment: whoever dies with all of them leaves nothing behind. No child may keep one.
* All fds are close-on-exec, and plain numbers: nothing here closes an fd from a finalizer, which in a forked
  child could hit a stranger's.
* The counters' mapping survives fork and the closing of every fd, and can never become writable.
* An interface's numbers never go backwards while it is attached, and go on where they were if it comes back
  before its slot is given to another.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kon_agent.bpf import handover, interfaces, layout, libbpf
from kon_agent.bpf.layout import EgressMode, IngressMode, Interface
from kon_agent.errors import BpfError
from kon_agent.linux.memory import map_memory

_PACKAGED = Path(__file__).parent / "objects" / "kon_net.bpf.o"  # in a wheel
_IN_CHECKOUT = Path(__file__).parents[2] / "ebpf" / "kon_net.bpf.o"
_ENTRY = struct.Struct("=IHH")  # struct kon_interface
# Another program holds the hook (EBUSY), or the device's other XDP mode (EEXIST): leave it alone.
_OCCUPIED = (errno.EBUSY, errno.EEXIST)

Attachment = Interface


@dataclass(slots=True)
class _Slot:
    """One interface's rows: whose (ifindex, name) they are or last were, and what they had counted before."""

    number: int
    owner: tuple[int, str] = (0, "")
    base: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Watched:
    attachment: Attachment
    slot: _Slot | None = None
    link_fds: list[int] = field(default_factory=list)


class NetCounters:
    """The loaded object. Make one with `load`; end it with `close`."""

    def __init__(
        self, library: libbpf.Library, fds: dict[str, int], counters: memoryview, cpus: int, digest: str = ""
    ) -> None:
        self._library = library
        self._digest = digest
        self._fds = fds
        self._counters = counters
        self._cpus = cpus
        self._watched: dict[int, _Watched] = {}
        # Left to right: never used, then least recently released.
        self._free = deque(_Slot(number) for number in range(layout.slots_for(cpus)))
        self._buckets = [[bytes(_ENTRY.size)] * layout.BUCKET_ENTRIES for _ in range(layout.BUCKETS)]

    @classmethod
    def load(cls, object_path: str | None = None) -> NetCounters:
        """Load the BPF object and freeze its counters.

        Args:
            object_path: the compiled object; by default the one this package brings.

        Raises:
            BpfError: no pylibbpf for this platform, no object, or the kernel refused it: in libbpf's words.
        """
        library = libbpf.library()
        path = object_path or _default_object()
        cpus = library.possible_cpus()
        if layout.slots_for(cpus) == 0:
            raise BpfError(f"{cpus} possible CPUs are more than the counters' {layout.ROWS} rows; no interface fits")
        fds = _load_fds(library, path)
        try:
            library.freeze(fds["counters"], "counters")
            counters = _map_counters(fds["counters"])
            digest = _digest(path)
        except BpfError:
            _close(fds.values())
            raise
        return cls(library, fds, counters, cpus, digest)

    @classmethod
    def adopt(cls, taken: handover.Counters, object_path: str | None = None) -> NetCounters | None:
        """Go on with what another supervisor has loaded and attached, as long as our object is the same.

        Returns:
            None where it is another one: everything of the old one is detached then.

        Raises:
            BpfError: no object, no libbpf, or the counters cannot be mapped; everything is detached, too.
        """
        try:
            library = libbpf.library()
            if taken.digest != _digest(object_path or _default_object()):
                taken.discard()
                return None
            counters = _map_counters(taken.fds["counters"])
        except BpfError:
            taken.discard()
            raise
        adopted = cls(library, dict(taken.fds), counters, library.possible_cpus(), taken.digest)
        adopted._watched = {each.attachment.ifindex: _watched(each) for each in taken.watched}
        adopted._free = deque(_slot(each) for each in taken.free)
        for number, bucket in taken.buckets.items():
            adopted._buckets[number] = list(bucket)
        return adopted

    def capture(self) -> handover.Counters:
        """Return what `adopt` takes; it remains ours until we are no more."""
        return handover.Counters(
            digest=self._digest,
            fds=self._fds,
            watched=[
                handover.Watched(
                    attachment=watched.attachment,
                    slot=None if watched.slot is None else _captured(watched.slot),
                    link_fds=watched.link_fds,
                )
                for watched in self._watched.values()
            ],
            free=[_captured(slot) for slot in self._free],
            buckets={number: bucket for number, bucket in enumerate(self._buckets) if any(map(any, bucket))},
        )

    @property
    def cpus(self) -> int:
        """Rows per slot: the number of possible CPUs."""
        return self._cpus

    def counters(self) -> memoryview:
        """Return the counters, read-only, as this process sees them; its children do not."""
        return self._counters

    def map_counters(self) -> memoryview:
        """Map the counters once more, read-only, for who is to read them. Called in that child before the drop."""
        return _map_counters(self._fds["counters"])

    def attachments(self) -> list[Attachment]:
        """Return every watched interface, in the order they were attached, with how and why."""
        return [watched.attachment for watched in self._watched.values()]

    def table(self) -> bytes:
        """Return the table of interfaces as `layout.encode` writes it, to be published to the worker."""
        return layout.encode(layout.make_table(self._cpus, self.attachments()))

    def attach(self, ifindex: int, name: str) -> Attachment:
        """Count an interface's packets: ingress native, else generic; egress by TCX where the kernel has it.

        A refusal is no error: that direction has mode "none" and a reason, which begins with "busy" where
        another program is in the way. An interface already watched is attached anew.
        """
        self.detach(ifindex)
        slot = self._take_slot(ifindex, name)
        name = _printable(name)
        if slot is None:
            limit = layout.slots_for(self._cpus)
            reason = f"no free slot: {len(self._watched)} interfaces are watched, {limit} at most can be counted"
            attachment = Attachment(-1, ifindex, name, "none", reason, "none", reason)
            self._watched[ifindex] = _Watched(attachment)
            return attachment
        link_fds: list[int] = []
        ingress = self._attach_ingress(ifindex, link_fds)
        egress = self._attach_egress(ifindex, link_fds)
        if link_fds:
            attachment = Attachment(slot.number, ifindex, name, *ingress, *egress, slot.base)
            self._watched[ifindex] = _Watched(attachment, slot, link_fds)
        else:
            self._release_slot(ifindex, slot)
            attachment = Attachment(-1, ifindex, name, *ingress, *egress)
            self._watched[ifindex] = _Watched(attachment)
        return attachment

    def detach(self, ifindex: int) -> None:
        """Stop counting an interface; nothing happens where it is not watched."""
        watched = self._watched.pop(ifindex, None)
        if watched is None:
            return
        _close(watched.link_fds)
        if watched.slot is not None:
            self._release_slot(ifindex, watched.slot)

    def close(self) -> None:
        """Detach everything and let the object go; the mapping of the counters stays readable."""
        for ifindex in list(self._watched):
            self.detach(ifindex)
        _close(self._fds.values())
        self._fds.clear()

    def _attach_ingress(self, ifindex: int, link_fds: list[int]) -> tuple[IngressMode, str]:
        program = self._fds["xdp_programs"]
        try:
            link_fds.append(self._library.link(program, ifindex, libbpf.BPF_XDP, libbpf.XDP_FLAGS_DRV_MODE))
        except BpfError as native:
            if native.errno in _OCCUPIED:
                return "none", _reason(native)
            # The kernel's automatic mode stops at the driver's refusal; we go on, and say so.
            try:
                link_fds.append(self._library.link(program, ifindex, libbpf.BPF_XDP, libbpf.XDP_FLAGS_SKB_MODE))
            except BpfError as generic:
                return "none", _reason(generic)
            return "generic", _reason(native)
        return "native", ""

    def _attach_egress(self, ifindex: int, link_fds: list[int]) -> tuple[EgressMode, str]:
        try:
            link_fds.append(self._library.link(self._fds["tc_programs"], ifindex, libbpf.BPF_TCX_EGRESS))
        except BpfError as err:
            if err.errno == errno.EINVAL:  # what kernels before 6.6 answer to an attach type they do not know
                return "none", "EINVAL: TCX needs kernel 6.6"
            return "none", _reason(err)
        return "tcx", ""

    def _take_slot(self, ifindex: int, name: str) -> _Slot | None:
        """Give the interface a slot, and an entry in the kernel's table before its first packet."""
        slot = next((slot for slot in self._free if slot.owner == (ifindex, name)), None)
        if slot:
            self._free.remove(slot)
        elif self._free:
            slot = self._free.popleft()
            if slot.owner != (0, ""):
                slot.base = layout.read_sums(self._counters, slot.number, self._cpus)
            slot.owner = (ifindex, name)
        else:
            return None
        interface = interfaces.read(name)
        flags = layout.IS_RAW_IP if interface and interface.is_raw_ip else 0
        if self._set_entry(ifindex, _ENTRY.pack(ifindex, slot.number * self._cpus, flags)):
            return slot
        self._free.append(slot)
        return None

    def _release_slot(self, ifindex: int, slot: _Slot) -> None:
        self._set_entry(ifindex, bytes(_ENTRY.size))
        self._free.append(slot)

    def _set_entry(self, ifindex: int, entry: bytes) -> bool:
        """Write the interface's entry in its bucket, or else a free one; return whether there was room."""
        number = ifindex % layout.BUCKETS
        bucket = self._buckets[number]
        owners = [_ENTRY.unpack(present)[0] for present in bucket]
        wanted = next((owner for owner in (ifindex, 0) if owner in owners), None)
        if wanted is None:
            return False
        bucket[owners.index(wanted)] = entry
        self._library.update(self._fds["interfaces"], "interfaces", number, b"".join(bucket))
        return True


def _captured(slot: _Slot) -> handover.Slot:
    ifindex, name = slot.owner
    return handover.Slot(number=slot.number, ifindex=ifindex, name=os.fsencode(name), base=slot.base)


def _slot(taken: handover.Slot) -> _Slot:
    return _Slot(taken.number, (taken.ifindex, os.fsdecode(taken.name)), taken.base)


def _watched(taken: handover.Watched) -> _Watched:
    return _Watched(taken.attachment, None if taken.slot is None else _slot(taken.slot), taken.link_fds)


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as err:
        raise BpfError(f"cannot read BPF object {path}: {err}", err.errno or 0) from err


def _default_object() -> str:
    for path in (_PACKAGED, _IN_CHECKOUT):
        if path.is_file():
            return str(path)
    raise BpfError(f"no BPF object at {_PACKAGED} or {_IN_CHECKOUT}; reinstall kon-agent, or run `make -C ebpf`")


def _load_fds(library: libbpf.Library, path: str) -> dict[str, int]:
    """Load an object through pylibbpf; return fds of our own: its maps', and each program's."""
    module = libbpf.pylibbpf_module()
    sizes = {
        "counters": (layout.ROW_BYTES, layout.ROWS),
        "interfaces": (layout.BUCKET_BYTES, layout.BUCKETS),
        "xdp_programs": (4, 1),
        "tc_programs": (4, 1),
    }
    fds: dict[str, int] = {}
    with library.captured_log() as log:
        try:
            loaded = module.BpfObject(path)
            loaded.load()
            for name, size in sizes.items():
                bpf_map = loaded.get_map(name)
                if size != (found := (bpf_map.get_value_size(), bpf_map.get_max_entries())):
                    raise BpfError(
                        f"map {name} of {path} has value size and entries {found}, this version of kon-agent "
                        f"expects {size}; rebuild the object with `make -C ebpf`"
                    )
                if name.endswith("_programs"):
                    fds[name] = library.program_fd(bpf_map.get_fd(), name)
                else:
                    fds[name] = fcntl.fcntl(bpf_map.get_fd(), fcntl.F_DUPFD_CLOEXEC, 3)
        except BpfError:
            _close(fds.values())
            raise
        except module.BpfException as err:
            _close(fds.values())
            raise _load_error(path, str(err), log) from err
    return fds


def _load_error(path: str, message: str, log: libbpf.Log) -> BpfError:
    # pylibbpf ends its message with strerror(3)'s text and keeps no number.
    text = message.rpartition(": ")[2]
    number = next((number for number in errno.errorcode if os.strerror(number) == text), 0)
    advice = "; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON" if number == errno.EPERM else ""
    said = log.useful_lines() or text  # the text alone is "Unknown error 4001" for libbpf's own numbers
    return BpfError(f"cannot load BPF object {path}: {said}{advice}", number)


def _map_counters(fd: int) -> memoryview:
    """Map the frozen counters for reading, by this process alone.

    Never unmapped: readers may outlive the object they came from.
    """
    try:
        return map_memory(fd, layout.COUNTERS_BYTES, writable=False, inherit=False)
    except OSError as err:
        raise BpfError(f"cannot map the counters: {err}", err.errno or 0) from err


def _printable(name: str) -> str:
    # The kernel allows any byte but NUL, slash, colon and space (dev_valid_name); a label must be UTF-8.
    return name.encode(errors="backslashreplace").decode()


def _reason(err: BpfError) -> str:
    text = libbpf.errno_text(err.errno)
    busy = "busy: another program is attached, " if err.errno in _OCCUPIED else ""
    return (busy + text)[: layout.MAX_REASON_CHARS]


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
