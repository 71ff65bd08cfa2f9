"""kon_agent.bpf.btf: enumerations found by name, in a blob made here and in the running kernel's."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import btf
from kon_agent.errors import BpfError

INT, STRUCT, ENUM, ENUM64 = 1, 4, 6, 19


class Blob:
    """BTF in the making."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"

    def name(self, text: str) -> int:
        """Return the place of a string, which is kept once."""
        whole = text.encode() + b"\0"
        at = self.strings.find(b"\0" + whole)
        if at < 0:
            at = len(self.strings) - 1
            self.strings += whole
        return at + 1

    def add(self, kind: int, name: str, size: int, vlen: int, *words: int) -> Blob:
        """Add a type."""
        self.types += struct.pack(f"=III{len(words)}I", self.name(name), kind << 24 | vlen, size, *words)
        return self

    def enum(self, name: str, **values: int) -> Blob:
        """Add an enumeration."""
        words = [word for key, value in values.items() for word in (self.name(key), value)]
        return self.add(ENUM, name, 4, len(values), *words)

    def data(self) -> bytes:
        """Return the whole of it."""
        size = len(self.types)
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, size, size, len(self.strings)) + self.types + self.strings


def test_an_enumeration_is_found_by_its_name() -> None:
    """Values and names of the one asked for, whatever stands around it."""
    blob = Blob().add(INT, "int", 4, 0, 32).enum("other", A=1).enum("reason", NONE=0, LOST=7).enum("more", B=2)
    assert {0: "NONE", 7: "LOST"} == btf.Btf(blob.data()).enumerators("reason")


def test_a_name_that_is_not_there_has_nothing() -> None:
    """No enumeration, and a name that is only the end of another's, are empty."""
    found = btf.Btf(Blob().enum("my_reason", LOST=7).data())
    assert {} == found.enumerators("reason")
    assert {} == found.enumerators("LOST")
    assert {} == found.enumerators("")


def test_a_member_or_a_declaration_of_that_name_is_no_enumeration() -> None:
    """A struct's member with the enumeration's name, and its forward declaration, are passed over."""
    blob = Blob()
    reason = blob.name("reason")
    blob.add(STRUCT, "holder", 8, 1, reason, 1, 0).add(ENUM, "reason", 4, 0).enum("reason", LOST=7)
    assert {7: "LOST"} == btf.Btf(blob.data()).enumerators("reason")


def test_values_of_64_bits() -> None:
    """An enum64's values come in two halves."""
    blob = Blob()
    blob.add(ENUM64, "wide", 8, 2, blob.name("SMALL"), 3, 0, blob.name("GREAT"), 1, 2)
    assert {3: "SMALL", 2 << 32 | 1: "GREAT"} == btf.Btf(blob.data()).enumerators("wide")


GOOD = Blob().enum("reason", LOST=7).data()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "too short"),
        (GOOD[:23], "too short"),
        (b"\x7fELF" + GOOD[4:], "no BTF"),
        (struct.pack(">H", 0xEB9F) + GOOD[2:] if struct.pack("=H", 1) == b"\1\0" else b"\0" * 24, "no BTF"),
        (GOOD[:2] + b"\2" + GOOD[3:], "no BTF"),
        (GOOD[:-1], "cut short"),
        (GOOD[:4] + struct.pack("=I", 2**32 - 1) + GOOD[8:], "cut short"),
    ],
)
def test_what_is_no_btf_is_refused(data: bytes, complaint: str) -> None:
    """Short, foreign or cut blobs are refused with the reason."""
    with pytest.raises(BpfError, match=complaint):
        btf.Btf(data)


def test_damage_within_is_refused() -> None:
    """An enumeration that reaches beyond the types, or a name beyond the strings, is an error and no nonsense."""
    longer = Blob().add(ENUM, "reason", 4, 500)
    with pytest.raises(BpfError, match="beyond the types"):
        btf.Btf(longer.data()).enumerators("reason")
    astray = Blob().add(ENUM, "reason", 4, 1, 100_000, 7)
    with pytest.raises(BpfError, match="outside of the strings"):
        btf.Btf(astray.data()).enumerators("reason")


def test_what_cannot_be_mapped_is_read(tmp_path: Path) -> None:
    """From a kernel that does not map its BTF, as from a pipe here, the answer is the same."""
    path = tmp_path / "vmlinux"
    path.write_bytes(GOOD)
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, GOOD)
        os.close(write_end)
        for each in (str(path), f"/dev/fd/{read_end}"):
            assert {"reason": {7: "LOST"}, "nothing": {}} == btf.read_enumerators(["reason", "nothing"], each)
    finally:
        os.close(read_end)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    """The message names the file, the error its errno."""
    with pytest.raises(BpfError, match=r"vmlinux: No such file") as raised:
        btf.read_enumerators(["reason"], str(tmp_path / "vmlinux"))
    assert 2 == raised.value.errno


@pytest.mark.skipif(not os.access(btf.VMLINUX, os.R_OK), reason="needs a kernel with BTF")
def test_the_kernel_names_its_states() -> None:
    """An enumeration as old as BTF is in this kernel's, and no privilege is needed."""
    found = btf.read_enumerators(["hrtimer_restart"])["hrtimer_restart"]
    assert {0: "HRTIMER_NORESTART", 1: "HRTIMER_RESTART"} == found
