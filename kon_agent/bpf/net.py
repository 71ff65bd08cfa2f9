"""The packet counters of the network interfaces: their BPF object, and where its programs are attached.

Owned by the supervisor, before and while it has children:

    load     the loader loads the object; freeze the counters, map them
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

import os
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kon_agent.bpf import handover, interfaces, layout, libbpf, loader, surroundings
from kon_agent.bpf.hooks import ASKED, BOND, FRAGS_PROGRAM, Egress, Hooks, Ingress
from kon_agent.bpf.layout import Interface, MapCost, ProgramCost
from kon_agent.bpf.loader import MapShape
from kon_agent.clock import wall_ns
from kon_agent.errors import BpfError
from kon_agent.linux.memory import map_memory

_OBJECT = "kon_net"
_MAPS = ("counters", "interfaces")
_ENTRY = struct.Struct("=IHH")  # struct kon_interface
Attachment = Interface


@dataclass(slots=True)
class _Slot:
    """One interface's rows: whose (ifindex, name) they are or last were, what they had counted before, and since when
    (wall clock) they count for it."""

    number: int
    owner: tuple[int, str] = (0, "")
    base: list[int] = field(default_factory=list)
    created_ns: int = 0


@dataclass(frozen=True, slots=True)
class _Watched:
    """One interface: its name as the kernel has it, its rows if it has any, and its hooks."""

    ifindex: int
    name: str
    slot: _Slot | None
    ingress: Ingress
    egress: Egress

    @property
    def attachment(self) -> Attachment:
        """What is told of it."""
        ways = (self.ingress.mode, self.ingress.reason, self.egress.mode, self.egress.reason)
        name = _printable(self.name)
        if self.slot is None:
            return Attachment(-1, self.ifindex, name, *ways)
        return Attachment(self.slot.number, self.ifindex, name, *ways, self.slot.base, self.slot.created_ns)

    @property
    def is_counted(self) -> bool:
        """Whether at least one direction is."""
        return self.ingress.mode != "none" or self.egress.mode != "none"


class NetCounters:
    """The loaded object. Make one with `load`; end it with `close`."""

    def __init__(
        self,
        library: libbpf.Library,
        fds: dict[str, int],
        counters: memoryview,
        cpus: int,
        digest: str = "",
        *,
        looks_around: bool = False,
    ) -> None:
        self._library = library
        self._digest = digest
        self._fds = fds
        self._hooks = Hooks(library, fds, looks_around=looks_around)
        self._counters = counters
        self._cpus = cpus
        self._watched: dict[int, _Watched] = {}
        self._generic: tuple[str, ...] = ()
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
        path = object_path or loader.object_path(_OBJECT)
        cpus = library.possible_cpus()
        if layout.slots_for(cpus) == 0:
            raise BpfError(f"{cpus} possible CPUs are more than the counters' {layout.ROWS} rows; no interface fits")
        loaded = loader.load(path, shapes=_shapes(cpus), optional={FRAGS_PROGRAM})
        try:
            library.freeze(loaded.maps["counters"], "counters")
            counters = _map_counters(loaded.maps["counters"], cpus)
            digest = loader.digest_of(path)
        except BpfError:
            loaded.close()
            raise
        return cls(library, {**loaded.maps, **loaded.programs}, counters, cpus, digest, looks_around=True)

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
            if taken.digest != loader.digest_of(object_path or loader.object_path(_OBJECT)):
                taken.discard()
                return None
            counters = _map_counters(taken.fds["counters"], library.possible_cpus())
        except BpfError:
            taken.discard()
            raise
        adopted = cls(library, dict(taken.fds), counters, library.possible_cpus(), taken.digest, looks_around=True)
        adopted._watched = {each.attachment.ifindex: _watched(each) for each in taken.watched}
        adopted._free = deque(_slot(each) for each in taken.free)
        for number, bucket in taken.buckets.items():
            adopted._buckets[number] = list(bucket)
        adopted.run(None)
        return adopted

    def capture(self) -> handover.Counters:
        """Return what `adopt` takes; it remains ours until we are no more."""
        return handover.Counters(
            digest=self._digest,
            fds=self._fds,
            watched=[_handed(watched) for watched in self._watched.values()],
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
        return _map_counters(self._fds["counters"], self._cpus)

    def attachments(self) -> list[Attachment]:
        """Return every watched interface, in the order they were attached, with how and why."""
        return [watched.attachment for watched in self._watched.values()]

    def attachment(self, ifindex: int) -> Attachment:
        """Return a watched interface, with how and why."""
        return self._watched[ifindex].attachment

    def table(self, programs: Sequence[ProgramCost] = (), maps: Sequence[MapCost] = ()) -> bytes:
        """Return the table of interfaces as `layout.encode` writes it, to be published to the worker.

        Args:
            programs: what they have cost, see `selfcost`.
            maps: what they take.
        """
        return layout.encode(layout.make_table(self._cpus, self.attachments(), programs, maps))

    def program_fds(self) -> dict[str, int]:
        """Return our own programs' descriptors, by name."""
        return {name: fd for name, fd in self._fds.items() if name not in _MAPS}

    @property
    def shared_maps(self) -> dict[str, int]:
        """The maps that other programs of the same source may share, by name."""
        return {name: self._fds[name] for name in _MAPS}

    def run(self, programs: Mapping[str, int] | None) -> None:
        """Use these programs on every interface, now and from now on; they have our own ones' names.

        Args:
            programs: their descriptors by name; None: our own again.
        """
        self._hooks.run(self._fds if programs is None else programs)
        for watched in list(self._watched.values()):
            if not self._hooks.renew(watched.ifindex, watched.ingress, watched.egress):
                self.attach(watched.ifindex, watched.name)

    def watched(self) -> dict[int, str]:
        """Return every watched interface: number to name, byte for byte as the kernel has it."""
        return {ifindex: watched.name for ifindex, watched in self._watched.items()}

    def attach(self, ifindex: int, name: str) -> Attachment:
        """Count an interface's packets: ingress native, else generic; egress by TCX, else by a clsact filter.

        A refusal is no error: that direction has mode "none" and a reason, which begins with "busy" where
        another program is in the way. An interface already watched is attached anew.

        Raises:
            BpfError, OSError: the kernel, or /proc, does not say what is in the way; it is not watched then.
        """
        self.detach(ifindex)
        slot = self._take_slot(ifindex, name)
        if slot is None:
            limit = layout.slots_for(self._cpus)
            reason = f"no free slot: {len(self._watched)} interfaces are watched, {limit} at most can be counted"
            return self._keep(_Watched(ifindex, name, None, Ingress("none", reason), Egress("none", reason)))
        ingress = Ingress("none")
        try:
            ingress = self._attach_ingress(ifindex, name)
            egress = self._hooks.attach_egress(ifindex, ingress)
        except (BpfError, OSError):  # a link nobody knows of would be in its own way, a slot be lost
            ingress.release()
            self._release_slot(ifindex, slot)
            raise
        return self._keep(_Watched(ifindex, name, slot, ingress, egress))

    def restrict(self, patterns: Sequence[str]) -> None:
        """Attach to the way in of interfaces whose name matches generically only; `mend` has those in use follow."""
        self._generic = tuple(patterns)

    def mend(self, ifindex: int, *, is_thorough: bool) -> bool:
        """Attach what is not attached, no longer, or not in the way asked for; return whether anything has changed.

        Args:
            ifindex: a watched interface.
            is_thorough: try whatever is missing, not only what has a better chance than the last time.

        Raises:
            BpfError: the kernel does not say what is attached.
        """
        watched = self._watched[ifindex]
        if self._is_otherwise(watched) or not self._hooks.is_attached(ifindex, watched.ingress, watched.egress):
            self.attach(ifindex, watched.name)
            return True
        lacks_ingress = watched.ingress.mode == "none"
        if not (is_thorough and "none" in (watched.ingress.mode, watched.egress.mode)) and not (
            lacks_ingress and self._hooks.has_way_cleared(ifindex, watched.ingress)
        ):
            return False
        before = watched.attachment
        if watched.slot is None:
            return before != self.attach(ifindex, watched.name)
        if lacks_ingress:
            watched = replace(watched, ingress=self._attach_ingress(ifindex, watched.name))
        if watched.egress.mode == "none":
            watched = replace(watched, egress=self._hooks.attach_egress(ifindex, watched.ingress))
        return before != self._keep(watched)

    def detach(self, ifindex: int) -> None:
        """Stop counting an interface; nothing happens where it is not watched."""
        watched = self._watched.pop(ifindex, None)
        if watched is None:
            return
        watched.ingress.release()
        watched.egress.release(ifindex)
        if watched.slot is not None:
            self._release_slot(ifindex, watched.slot)

    def close(self) -> None:
        """Detach everything and let the object go; the mapping of the counters stays readable."""
        for ifindex in list(self._watched):
            self.detach(ifindex)
        _close(self._fds.values())
        self._fds.clear()

    def _keep(self, watched: _Watched) -> Attachment:
        """Know an interface from now on; where nothing of it is counted, somebody else may have its slot."""
        if watched.slot is not None and not watched.is_counted:
            self._release_slot(watched.ifindex, watched.slot)
            watched = replace(watched, slot=None)
        self._watched[watched.ifindex] = watched
        return watched.attachment

    def _attach_ingress(self, ifindex: int, name: str) -> Ingress:
        """Attach to the way in. Programs go on from below upwards only: ours on the devices above make room for it."""
        why_generic = self._why_generic(name)
        found = self._hooks.attach_ingress(ifindex, why_generic)
        yielding = self._attached_above(name) if found.is_blocked_above else []
        if not yielding:
            return found
        for above in yielding:
            above.ingress.release()
        found = self._hooks.attach_ingress(ifindex, why_generic)
        for above in yielding:
            self._keep(replace(above, ingress=self._attach_ingress(above.ifindex, above.name)))
        # Still blocked, by what is out of sight: do not have them yield again at every change of a link.
        return replace(found, is_blocked_above=False)

    def _is_otherwise(self, watched: _Watched) -> bool:
        """Whether the way in is attached in another way than `restrict` asks for."""
        reason = watched.ingress.reason
        is_asked = interfaces.matches(watched.name, self._generic)
        return watched.ingress.mode != "none" and reason != BOND and is_asked != (reason == ASKED)

    def _why_generic(self, name: str) -> str:
        return BOND if interfaces.is_bond(name) else ASKED if interfaces.matches(name, self._generic) else ""

    def _attached_above(self, name: str) -> list[_Watched]:
        """Return what of ours is attached right above an interface; nothing where not all of it is ours."""
        found = [self._watched.get(above) or above for above in interfaces.above(name)]
        ours = [each for each in found if isinstance(each, _Watched) and each.ingress.fd >= 0]
        others = [each if isinstance(each, int) else each.ifindex for each in found if each not in ours]
        return [] if any(map(surroundings.xdp_occupant, others)) else ours

    def _take_slot(self, ifindex: int, name: str) -> _Slot | None:
        """Give the interface a slot, and an entry in the kernel's table before its first packet."""
        slot = next((slot for slot in self._free if slot.owner == (ifindex, name)), None)
        if slot:
            self._free.remove(slot)
        elif self._free:
            slot = self._free.popleft()
            if slot.owner != (0, ""):
                slot.base = layout.read_sums(self._counters, slot.number, self._cpus)
            slot.owner, slot.created_ns = (ifindex, name), wall_ns()
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
    return handover.Slot(
        number=slot.number, ifindex=ifindex, name=os.fsencode(name), base=slot.base, created_ns=slot.created_ns
    )


def _slot(taken: handover.Slot) -> _Slot:
    return _Slot(taken.number, (taken.ifindex, os.fsdecode(taken.name)), taken.base, taken.created_ns)


def _handed(watched: _Watched) -> handover.Watched:
    return handover.Watched(
        attachment=watched.attachment,
        name=os.fsencode(watched.name),
        slot=None if watched.slot is None else _captured(watched.slot),
        link_fds=[fd for fd in (watched.ingress.fd, watched.egress.fd) if fd >= 0],
        has_added_qdisc=watched.egress.has_added_qdisc,
    )


def _watched(taken: handover.Watched) -> _Watched:
    told = taken.attachment
    fds = iter(taken.link_fds)
    ingress = Ingress(told.ingress_mode, told.ingress_reason, -1 if told.ingress_mode == "none" else next(fds))
    egress_fd = next(fds) if told.egress_mode == "tcx" else -1
    egress = Egress(told.egress_mode, told.egress_reason, egress_fd, taken.has_added_qdisc)
    slot = None if taken.slot is None else _slot(taken.slot)
    return _Watched(told.ifindex, os.fsdecode(taken.name), slot, ingress, egress)


def _shapes(cpus: int) -> dict[str, MapShape]:
    return {
        "counters": MapShape(layout.ROW_BYTES, layout.slots_for(cpus) * cpus, is_sized=True),
        "interfaces": MapShape(layout.BUCKET_BYTES, layout.BUCKETS),
    }


def _map_counters(fd: int, cpus: int) -> memoryview:
    """Map the frozen counters for reading, by this process alone.

    Never unmapped: readers may outlive the object they came from.
    """
    try:
        return map_memory(fd, layout.counters_bytes(cpus), writable=False, inherit=False)
    except OSError as err:
        raise BpfError(f"cannot map the counters: {err}", err.errno or 0) from err


def _printable(name: str) -> str:
    # The kernel allows any byte but NUL, slash, colon and space (dev_valid_name); a label must be UTF-8.
    return name.encode(errors="backslashreplace").decode()


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
