"""The kernel's names for its numbers: enumerations read from BTF (Documentation/bpf/btf.rst), without privilege.

    header   magic 0xeb9f u16, version u8, flags u8, length u32, then u32 each: offset and length of types, of strings;
             offsets count from the header's end
    types    one after the other: {name u32, info u32, size u32}, then what its kind asks for; a name is its place among
             the strings, info is vlen in its lower 16 bits and the kind in bits 24 to 28
    enum     vlen times {name u32, value u32}; enum64: {name u32, lower half u32, upper half u32}
    strings  ended by NUL

vmlinux has some 130,000 types of different lengths. Walking them takes Python a second; an enumeration is found instead
by its name: its place among the strings, then that number among the types, where an enumeration's head is.

Everything is in the byte order of the machine; BTF of another is refused.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

from kon_agent.errors import BpfError

VMLINUX = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_VERSION = 1
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_WORD = struct.Struct("=I")
_KIND_ENUM, _KIND_ENUM64 = 6, 19
_ENUMERATORS = {_KIND_ENUM: struct.Struct("=II"), _KIND_ENUM64: struct.Struct("=III")}
_VLEN_MASK, _KIND_SHIFT, _KIND_MASK = 0xFFFF, 24, 0x1F
_WORD_BYTES = 4
MAX_BTF_BYTES = 64 * 1024 * 1024  # ten times what a distribution's kernel has

Data = bytes | mmap.mmap
Enumerators = dict[int, str]
"""Value, as an unsigned number, to the name the kernel's source gives it."""


class Btf:
    """One BTF blob.

    Args:
        data: all of it.

    Raises:
        BpfError: it is no BTF of this machine.
    """

    def __init__(self, data: Data) -> None:
        if len(data) < _HEADER.size:
            raise BpfError(f"{len(data)} bytes are too short for BTF")
        magic, version, _, length, types, types_len, strings, strings_len = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise BpfError(f"no BTF of this machine: magic {magic:#x} and version {version}")
        self._data = data
        self._types, self._types_end = length + types, length + types + types_len
        self._strings, self._strings_end = length + strings, length + strings + strings_len
        if length < _HEADER.size or max(self._types_end, self._strings_end) > len(data):
            raise BpfError(f"BTF of {len(data)} bytes is cut short: its header speaks of more")

    def enumerators(self, name: str) -> Enumerators:
        """Return the values and names of `enum name`; empty where there is no such enumeration.

        Raises:
            BpfError: it reaches beyond the types or the strings.
        """
        wanted = self._string_offset(name)
        for at in self._words(wanted) if wanted else ():
            if at + _TYPE.size > self._types_end:
                break
            _, info, _ = _TYPE.unpack_from(self._data, at)
            kind, count = info >> _KIND_SHIFT & _KIND_MASK, info & _VLEN_MASK
            # Elsewhere the number is another's name or value; a declaration without enumerators is none to read.
            if kind in _ENUMERATORS and count:
                return self._read(name, at + _TYPE.size, _ENUMERATORS[kind], count)
        return {}

    def _read(self, name: str, at: int, layout: struct.Struct, count: int) -> Enumerators:
        end = at + layout.size * count
        if end > self._types_end:
            raise BpfError(f"BTF is damaged: enum {name} reaches beyond the types")
        found: Enumerators = {}
        for name_offset, *value in layout.iter_unpack(self._data[at:end]):
            found[sum(word << 32 * half for half, word in enumerate(value))] = self._string(name, name_offset)
        return found

    def _string_offset(self, text: str) -> int:
        """Return where a whole string begins among the strings; 0, the empty string's place, where it is not."""
        at = self._data.find(b"\0" + text.encode() + b"\0", self._strings, self._strings_end)
        return at + 1 - self._strings if at >= 0 else 0

    def _string(self, enum: str, offset: int) -> str:
        start = self._strings + offset
        end = self._data.find(b"\0", start, self._strings_end)
        if end < 0:
            raise BpfError(f"BTF is damaged: a name in enum {enum} lies outside of the strings")
        return self._data[start:end].decode("ascii", "replace")

    def _words(self, number: int) -> Iterator[int]:
        """Yield where among the types a word has this value."""
        word, at = _WORD.pack(number), self._types
        while (at := self._data.find(word, at, self._types_end)) >= 0:
            if (at - self._types) % _WORD_BYTES == 0:
                yield at
            at += 1


def read_enumerators(names: list[str], path: str = VMLINUX) -> dict[str, Enumerators]:
    """Return enumerations of the kernel's BTF by their names; empty ones where it has them not.

    Raises:
        BpfError: no BTF there, or not what BTF is.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = _whole(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise BpfError(f"cannot read the kernel's BTF at {path}: {err.strerror}", err.errno or 0) from err
    try:
        btf = Btf(data)
        return {name: btf.enumerators(name) for name in names}
    finally:
        if isinstance(data, mmap.mmap):
            data.close()


def _whole(fd: int) -> Data:
    size = os.fstat(fd).st_size
    if size > MAX_BTF_BYTES:
        raise BpfError(f"the kernel's BTF has {size} bytes; more than {MAX_BTF_BYTES} are not read")
    try:
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except (OSError, ValueError):  # before 6.16 the kernel does not map it; an empty file cannot be
        chunks = []
        while chunk := os.read(fd, size or mmap.PAGESIZE):
            chunks.append(chunk)
        return b"".join(chunks)
