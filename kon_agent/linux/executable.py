"""What the kernel opens to run a program: the file, and the interpreters that load it.

    #! /usr/bin/env python3     a script names its interpreter in its first line (execve(2))
    ELF … PT_INTERP             a dynamic executable its loader, /lib64/ld-linux-x86-64.so.2 or the like (elf(5))

Landlock asks for the right to execute at each of these files, so a process confined to one program needs it for all of
them. Shared libraries are only read. An interpreter may be a script in its turn. `env` in a script's first line is
followed to the program that it looks up in SEARCH_PATH. What cannot be read counts as having no interpreter.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import BinaryIO

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_DEPTH = 5  # of scripts that interpret scripts (fs/exec.c); then the kernel answers ELOOP
_LINE_BYTES = 256  # BINPRM_BUF_SIZE: no more of the first line is looked at
_MAX_HEADERS = 64  # program headers; real files have a dozen
_MAX_PATH_BYTES = 4096
_PT_INTERP = 3


def needed_to_run(path: str) -> tuple[str, ...]:
    """Return `path` and the files of all its interpreters, as they are now."""
    found = [path]
    waiting = [path]
    for _ in range(MAX_DEPTH):
        waiting = [name for place in waiting for name in _interpreters_of(place) if name not in found]
        found += waiting
    return tuple(found)


def parse_interpreters(file: BinaryIO) -> tuple[str, ...]:
    """Return the paths of the programs that an executable names to be loaded by; none for anything else."""
    head = file.read(_LINE_BYTES)
    if head.startswith(b"#!"):
        return _parse_first_line(os.fsdecode(head[2:].partition(b"\n")[0]))
    # Cut short, or offsets beyond any file: the kernel refuses it.
    with contextlib.suppress(struct.error, IndexError, OverflowError):
        return _parse_elf(head, file)
    return ()


def _interpreters_of(path: str) -> tuple[str, ...]:
    try:
        with open(path, "rb") as file:
            return parse_interpreters(file)
    except OSError:
        return ()


def _parse_first_line(line: str) -> tuple[str, ...]:
    words = line.split()
    if not words:
        return ()
    if os.path.basename(words[0]) != "env":
        return (words[0],)
    names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return (words[0], *(_look_up(names[0]) if names else ()))


def _look_up(name: str) -> tuple[str, ...]:
    places = (f"{folder}/{name}" for folder in SEARCH_PATH.split(":"))
    return next(((place,) for place in places if os.access(place, os.X_OK)), ())


def _parse_elf(head: bytes, file: BinaryIO) -> tuple[str, ...]:
    if not head.startswith(b"\x7fELF"):
        return ()
    is_64_bit, order = head[4] == 2, "<" if head[5] == 1 else ">"
    # Elf64_Ehdr and Elf32_Ehdr: e_phoff, then e_phentsize and e_phnum
    table = struct.unpack_from(order + ("Q" if is_64_bit else "I"), head, 32 if is_64_bit else 28)[0]
    entry_bytes, entries = struct.unpack_from(order + "HH", head, 54 if is_64_bit else 42)
    for number in range(min(entries, _MAX_HEADERS)):
        file.seek(table + number * entry_bytes)
        entry = file.read(entry_bytes)
        if struct.unpack_from(order + "I", entry)[0] == _PT_INTERP:
            # Elf64_Phdr and Elf32_Phdr: p_offset and p_filesz
            offset = struct.unpack_from(order + ("Q" if is_64_bit else "I"), entry, 8 if is_64_bit else 4)[0]
            size = struct.unpack_from(order + ("Q" if is_64_bit else "I"), entry, 32 if is_64_bit else 16)[0]
            file.seek(offset)
            return (os.fsdecode(file.read(min(size, _MAX_PATH_BYTES)).partition(b"\0")[0]),)
    return ()
