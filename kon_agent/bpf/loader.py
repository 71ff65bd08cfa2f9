"""Loading a compiled BPF object: maps sized and shared, programs that this kernel has no place for left out.

Invariant: all descriptors are close-on-exec, plain numbers, and ours: nothing closes one from a finalizer, which in a
forked child could hit a stranger's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from kon_agent.bpf import libbpf
from kon_agent.bpf.btf import VMLINUX
from kon_agent.errors import BpfError

_PACKAGED = Path(__file__).parent / "objects"  # in a wheel
_IN_CHECKOUT = Path(__file__).parents[2] / "ebpf"
_TRACING = "tp_btf/"  # the section of a program that is attached to the tracepoint named after it


@dataclass(frozen=True, slots=True)
class MapShape:
    """What a map must be.

    Attributes:
        value_bytes: of one value.
        entries: how many there are.
        is_sized: whether it is given so many at load, whatever the file says.
    """

    value_bytes: int
    entries: int
    is_sized: bool = False


@dataclass(slots=True)
class Loaded:
    """A loaded object.

    Attributes:
        maps: descriptor of each map that was asked for, by name.
        programs: descriptor of each program, by the name of its function.
        left_out: programs whose tracepoint this kernel lacks.
    """

    maps: dict[str, int] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Let go of it; what is attached holds on by its link."""
        for fd in (*self.maps.values(), *self.programs.values()):
            os.close(fd)
        self.maps.clear()
        self.programs.clear()


def object_path(name: str) -> str:
    """Return where the compiled object of a name, for instance `kon_net`, is.

    Raises:
        BpfError: nowhere.
    """
    places = [folder / f"{name}.bpf.o" for folder in (_PACKAGED, _IN_CHECKOUT)]
    for path in places:
        if path.is_file():
            return str(path)
    raise BpfError(f"no BPF object at {places[0]} or {places[1]}; reinstall kon-agent, or run `make -C ebpf`")


def digest_of(path: str) -> str:
    """Return what tells one object file from another.

    Raises:
        BpfError: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as err:
        raise BpfError(f"cannot read BPF object {path}: {err}", err.errno or 0) from err


def load(
    path: str,
    *,
    shapes: Mapping[str, MapShape],
    reuse: Mapping[str, int] | None = None,
    optional: Collection[str] = (),
) -> Loaded:
    """Load an object file into the kernel; nothing is attached yet.

    Args:
        path: the compiled object.
        shapes: the maps whose descriptors are wanted, and what they must be.
        reuse: descriptors of maps that are there already and shall be used, by name.
        optional: programs that are left out where this kernel lacks their tracepoint; those of another kind, where
            the object cannot be loaded with them.

    Raises:
        BpfError: no libbpf, no such object, or the kernel refused it: in libbpf's and the verifier's words.
    """
    library = libbpf.library()
    reuse = reuse or {}
    with library.captured_log() as log:
        try:
            with closing(library.open(path)) as found:
                newer = {name for name, section, _ in found.programs() if _is_newer(name, section, optional)}
            try:
                return _load(library, path, shapes, reuse, optional, leave=set())
            except BpfError:
                if not newer:
                    raise
                return _load(library, path, shapes, reuse, optional, leave=newer)
        except BpfError as err:
            if not err.errno:
                raise
            raise _with_reason(path, err, log) from err


def _is_newer(name: str, section: str, optional: Collection[str]) -> bool:
    return name in optional and not section.startswith(_TRACING)


def _load(
    library: libbpf.Library,
    path: str,
    shapes: Mapping[str, MapShape],
    reuse: Mapping[str, int],
    optional: Collection[str],
    leave: Collection[str],
) -> Loaded:
    loaded = Loaded()
    try:
        with closing(library.open(path)) as found:
            _shape(found, path, shapes, reuse)
            for name, section, program in found.programs():
                is_tracing = name in optional and section.startswith(_TRACING)
                if name in leave or (is_tracing and not library.has_tracepoint(section.removeprefix(_TRACING))):
                    found.leave_out(program)
                    loaded.left_out.append(name)
            found.load()
            _take(found, shapes, loaded)
    except BpfError:
        loaded.close()
        raise
    return loaded


def _shape(found: libbpf.LibraryObject, path: str, shapes: Mapping[str, MapShape], reuse: Mapping[str, int]) -> None:
    for name, shape in shapes.items():
        there = found.map_shape(name)
        wanted = (shape.value_bytes, there[1] if there and shape.is_sized else shape.entries)
        if there != wanted:
            raise BpfError(
                f"map {name} of {path} has value size and entries {there}, this version of kon-agent "
                f"expects {wanted}; rebuild the object with `make -C ebpf`"
            )
        if shape.is_sized and name not in reuse:
            found.resize_map(name, shape.entries)
    for name, fd in reuse.items():
        found.share_map(name, fd)


def _take(found: libbpf.LibraryObject, shapes: Mapping[str, MapShape], loaded: Loaded) -> None:
    """Duplicate the descriptors that are to outlive libbpf's object."""
    for name in shapes:
        loaded.maps[name] = _duplicate(found.map_fd(name))
    for name, _, program in found.programs():
        if name not in loaded.left_out:
            loaded.programs[name] = _duplicate(found.program_fd(program))


def _duplicate(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as err:
        raise BpfError(f"cannot keep a BPF descriptor: {err}", err.errno or 0) from err


def _with_reason(path: str, refused: BpfError, log: libbpf.Log) -> BpfError:
    name = Path(path).name.removesuffix(".bpf.o")
    said = log.useful_lines()
    words = f"; libbpf says: {said}" if said else ""
    why = libbpf.errno_text(refused.errno) if os.path.exists(VMLINUX) else f"this kernel shows no BTF ({VMLINUX})"
    return BpfError(f"cannot load BPF object {name}: {why}{words}", refused.errno)
