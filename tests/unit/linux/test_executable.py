"""What the kernel opens to run a program."""

from __future__ import annotations

import io
import os
import struct
import sys
from pathlib import Path

import pytest

from kon_agent.linux.executable import MAX_DEPTH, needed_to_run, parse_interpreters

LOADER = b"/lib/ld-test.so.1\0"


def elf(*, is_64_bit: bool = True, order: str = "<", loader_at: int = 500) -> bytes:
    """Return an ELF file with a PT_LOAD and a PT_INTERP header (elf(5))."""
    ident = b"\x7fELF" + bytes([2 if is_64_bit else 1, 1 if order == "<" else 2]) + bytes(10)
    if is_64_bit:
        header = struct.pack(order + "HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        load = struct.pack(order + "IIQQQQQQ", 1, 5, 0, 0, 0, 9, 9, 4096)
        interp = struct.pack(order + "IIQQQQQQ", 3, 4, loader_at, 0, 0, len(LOADER), len(LOADER), 1)
    else:
        header = struct.pack(order + "HHIIIIIHHHHHH", 2, 3, 1, 0, 52, 0, 0, 52, 32, 2, 0, 0, 0)
        load = struct.pack(order + "IIIIIIII", 1, 0, 0, 0, 9, 9, 5, 4096)
        interp = struct.pack(order + "IIIIIIII", 3, loader_at, 0, 0, len(LOADER), len(LOADER), 4, 1)
    return (ident + header + load + interp).ljust(loader_at, b"\0") + LOADER


@pytest.mark.parametrize("is_64_bit", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_executable_names_its_loader(is_64_bit: bool, order: str) -> None:
    """PT_INTERP is found in either width and byte order, wherever in the file it points."""
    assert ("/lib/ld-test.so.1",) == parse_interpreters(io.BytesIO(elf(is_64_bit=is_64_bit, order=order)))
    assert ("/lib/ld-test.so.1",) == parse_interpreters(io.BytesIO(elf(loader_at=100_000)))


@pytest.mark.parametrize("size", range(0, 250, 7))
def test_a_file_cut_short_names_nothing(size: int) -> None:
    """No prefix of a file is an error."""
    parse_interpreters(io.BytesIO(elf()[:size]))


def test_offsets_beyond_any_file_are_no_error() -> None:
    """A hostile header points nowhere."""
    data = bytearray(elf())
    data[32:40] = b"\xff" * 8
    assert () == parse_interpreters(io.BytesIO(bytes(data)))


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        (("/bin/sh",), b"#!/bin/sh\necho\n"),
        (("/bin/sh",), b"#! \t/bin/sh -e\n"),
        (("/opt/x",), b"#!/opt/x"),
        ((), b"#!\n"),
        ((), b"echo no first line of that kind\n"),
        ((), b""),
    ],
)
def test_a_script_names_its_interpreter(expected: tuple[str, ...], line: bytes) -> None:
    """The first word after `#!`; its argument does not count."""
    assert expected == parse_interpreters(io.BytesIO(line))


@pytest.mark.parametrize("words", ["sh", "-S sh -e", "LANG=C sh", "-i LANG=C sh"])
def test_env_is_followed(words: str) -> None:
    """`env NAME` needs env and the program it looks up."""
    first, second = parse_interpreters(io.BytesIO(f"#!/usr/bin/env {words}\n".encode()))
    assert ("/usr/bin/env", "sh") == (first, os.path.basename(second))


def test_env_of_nothing_known() -> None:
    """What cannot be looked up is left for env to complain about."""
    assert ("/usr/bin/env",) == parse_interpreters(io.BytesIO(b"#!/usr/bin/env no-such-program\n"))
    assert ("/usr/bin/env",) == parse_interpreters(io.BytesIO(b"#!/usr/bin/env\n"))


def test_a_script_needs_its_interpreter_s_loader_too(tmp_path: Path) -> None:
    """Script, interpreter, loader: all that will be opened, in that order."""
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\n")
    found = needed_to_run(str(script))
    assert (str(script), sys.executable) == found[:2]
    assert found[1:] == needed_to_run(sys.executable)
    assert 1 < len(found[1:])


def test_a_ring_of_scripts_ends(tmp_path: Path) -> None:
    """Scripts that interpret each other are followed no further than the kernel does."""
    ring = [tmp_path / str(number) for number in range(MAX_DEPTH + 3)]
    for this, following in zip(ring, [*ring[1:], ring[0]], strict=True):
        this.write_text(f"#!{following}\n")
    assert MAX_DEPTH + 1 == len(needed_to_run(str(ring[0])))


def test_what_cannot_be_read_needs_itself(tmp_path: Path) -> None:
    """A missing file, or a folder of programs."""
    for place in (str(tmp_path / "missing"), str(tmp_path)):
        assert (place,) == needed_to_run(place)
