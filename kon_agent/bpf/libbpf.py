"""libbpf's C functions, as far as this project needs them: from pylibbpf where it is installed, else the system's.

pylibbpf's extension module exports the whole C interface of the libbpf within it. Objects are loaded through that
interface in both cases, in one way (docs/adr/0016): what pylibbpf adds in Python can neither leave a program out, nor
size a map, nor give a program's descriptor. The extension is opened as a shared library: `import pylibbpf` also
imports llvmlite, 3.6 MB of private memory that nothing here uses and every child would inherit.

libbpf 1.x functions return a negative errno, or no pointer and errno set; here each raises BpfError with what was
tried, on what, and the errno.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.machinery
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from kon_agent.errors import BpfError

BPF_TRACE_RAW_TP = 23  # enum bpf_attach_type, linux/bpf.h
BPF_XDP = 37
BPF_TCX_EGRESS = 47
XDP_FLAGS_SKB_MODE = 1 << 1  # linux/if_link.h: generic
XDP_FLAGS_DRV_MODE = 1 << 2  # native
MAX_LOG_BYTES = 256 * 1024  # a verifier log's end tells; one of a large program may have megabytes before it
CHOICE_VARIABLE = "KON_AGENT_LIBBPF"  # "pylibbpf" or "system": use that one or none

POSSIBLE_CPUS = "/sys/devices/system/cpu/possible"

_SYSTEM = "libbpf.so.1"  # Debian's libbpf1, and the same name elsewhere
_LIBBPF_DEBUG = 2  # enum libbpf_print_level: 0 warnings (the verifier's log among them), 1 information
_LINE_BYTES = 1024 * 1024  # libbpf hands a whole verifier log over as one line; beyond this its end is cut
_LOG_LINES_SHOWN = 12

_int, _u32, _void, _text = ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p
# va_list as a pointer: so x86_64's System V ABI passes it, and AAPCS64 (a structure of more than 16 bytes).
_PrintFunction = ctypes.CFUNCTYPE(_int, _int, _text, _void)
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "bpf_link_create": (_int, [_int, _int, _int, _void]),
    "bpf_link_update": (_int, [_int, _int, _void]),
    "bpf_map_freeze": (_int, [_int]),
    "bpf_map_update_elem": (_int, [_int, _void, _void, ctypes.c_uint64]),
    "bpf_map__fd": (_int, [_void]),
    "bpf_map__max_entries": (_u32, [_void]),
    "bpf_map__reuse_fd": (_int, [_void, _int]),
    "bpf_map__set_max_entries": (_int, [_void, _u32]),
    "bpf_map__value_size": (_u32, [_void]),
    "bpf_object__close": (None, [_void]),
    "bpf_object__find_map_by_name": (_void, [_void, _text]),
    "bpf_object__load": (_int, [_void]),
    "bpf_object__next_program": (_void, [_void, _void]),
    "bpf_object__open_file": (_void, [_text, _void]),
    "bpf_program__fd": (_int, [_void]),
    "bpf_program__name": (_text, [_void]),
    "bpf_program__section_name": (_text, [_void]),
    "bpf_program__set_autoload": (_int, [_void, ctypes.c_bool]),
    "bpf_raw_tracepoint_open": (_int, [_text, _int]),
    "libbpf_find_vmlinux_btf_id": (_int, [_text, _int]),
    "libbpf_set_print": (_void, [_void]),
    "libbpf_version_string": (_text, []),
}


class LinkOptions(ctypes.Structure):
    """The head of `struct bpf_link_create_opts`: libbpf takes every shorter one, by its `sz`."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", _u32), ("pad", _u32))


class Log:
    """What libbpf said while captured; the latest MAX_LOG_BYTES of it."""

    def __init__(self) -> None:
        self.text = ""

    def append(self, text: str) -> None:
        """Add what libbpf printed; the oldest goes where there is too much."""
        self.text = (self.text + text)[-MAX_LOG_BYTES:]

    def useful_lines(self) -> str:
        """Return the lines a reader wants: the last ones, each once, without the verifier's statistics and states."""
        lines = [line.rstrip() for line in self.text.splitlines() if line.strip()]
        kept = [line for line in lines if "; R" not in line and not line.startswith(("processed ", "-- "))]
        return "\n".join(list(dict.fromkeys(kept))[-_LOG_LINES_SHOWN:])


class Library:
    """The C functions of one copy of libbpf.

    Args:
        path: the shared object that exports them.

    Raises:
        BpfError: it cannot be opened, or a function is missing.
    """

    def __init__(self, path: str) -> None:
        try:
            self._c = ctypes.CDLL(path, use_errno=True)
        except OSError as err:
            raise BpfError(f"libbpf cannot be opened from {path}: {err}") from err
        missing = [name for name in _SIGNATURES if not hasattr(self._c, name)]
        if missing:
            raise BpfError(f"{path} lacks libbpf's {', '.join(missing)}; libbpf 1.0 or newer is needed")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self.path = path

    @property
    def version(self) -> str:
        """libbpf's version, for instance `v1.6`."""
        return bytes(self._c.libbpf_version_string()).decode()

    def possible_cpus(self) -> int:
        """Return how many CPUs this kernel may ever number: every CPU number is below it, also where some are missing.

        Raises:
            BpfError: /sys is not mounted.
        """
        try:
            with open(POSSIBLE_CPUS, encoding="ascii") as file:
                return int(re.split("[-,]", file.read())[-1]) + 1  # "0-3,8-11"
        except (OSError, ValueError) as err:
            raise BpfError(f"cannot count the possible CPUs: {err}") from err

    def link(self, program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        """Attach a program to an interface; return the link's fd, with which the attachment ends.

        Raises:
            BpfError: refused, with its errno.
        """
        options = LinkOptions(ctypes.sizeof(LinkOptions), flags, 0)
        fd = self._c.bpf_link_create(program_fd, ifindex, attach_type, ctypes.byref(options))
        return _checked(fd, f"attach a BPF program to interface {ifindex}")

    def exchange(self, link_fd: int, program_fd: int) -> None:
        """Put another program in the place of the one a link attaches; no packet passes neither."""
        _checked(self._c.bpf_link_update(link_fd, program_fd, None), "exchange an attached BPF program")

    def trace(self, program_fd: int, name: str) -> int:
        """Attach a `tp_btf` program to its tracepoint; return the link's fd, with which the attachment ends."""
        return _checked(self._c.bpf_raw_tracepoint_open(None, program_fd), f"attach BPF program {name}")

    def has_tracepoint(self, name: str) -> bool:
        """Whether this kernel's BTF knows a tracepoint."""
        return bool(self._c.libbpf_find_vmlinux_btf_id(name.encode(), BPF_TRACE_RAW_TP) > 0)

    def freeze(self, map_fd: int, name: str) -> None:
        """Take the right to change a map from user space, for good."""
        _checked(self._c.bpf_map_freeze(map_fd), f"freeze BPF map {name}")

    def update(self, map_fd: int, name: str, index: int, value: bytes) -> None:
        """Set one entry of an array map."""
        key = _u32(index)
        result = self._c.bpf_map_update_elem(map_fd, ctypes.byref(key), value, 0)
        _checked(result, f"set entry {index} of BPF map {name}")

    def open(self, path: str) -> LibraryObject:
        """Read an object file.

        Raises:
            BpfError: it cannot be read, or is none.
        """
        pointer = self._c.bpf_object__open_file(os.fsencode(path), None)
        if not pointer:
            number = ctypes.get_errno()
            raise BpfError(f"cannot open BPF object {path}: {errno_text(number)}", number)
        return LibraryObject(self, self._c, pointer)

    @contextmanager
    def captured_log(self) -> Iterator[Log]:
        """Collect what libbpf would print on stderr: its warnings and the verifier's log."""
        log = Log()
        line = ctypes.create_string_buffer(_LINE_BYTES)
        vsnprintf = ctypes.CDLL(None).vsnprintf
        vsnprintf.argtypes = [_void, ctypes.c_size_t, _text, _void]

        def collect(level: int, template: bytes, arguments: int) -> int:
            if level < _LIBBPF_DEBUG:
                vsnprintf(line, _LINE_BYTES, template, arguments)
                log.append(line.value.decode(errors="replace"))
            return 0

        callback = _PrintFunction(collect)
        before = self._c.libbpf_set_print(ctypes.cast(callback, _void))
        try:
            yield log
        finally:
            self._c.libbpf_set_print(before)
            _give_memory_back()


class LibraryObject:
    """An object file opened by libbpf: `struct bpf_object`. Descriptors are libbpf's until `close` closes them.

    Args:
        library: whose.
        functions: the C functions.
        pointer: to the structure.
    """

    def __init__(self, library: Library, functions: ctypes.CDLL, pointer: int) -> None:
        self._library = library
        self._c = functions
        self._pointer = pointer

    def close(self) -> None:
        """Free it."""
        self._c.bpf_object__close(self._pointer)

    def programs(self) -> Iterator[tuple[str, str, int]]:
        """Yield every program: its name, its section, and the handle the other calls take."""
        handle = self._c.bpf_object__next_program(self._pointer, None)
        while handle:
            yield (
                bytes(self._c.bpf_program__name(handle)).decode(),
                bytes(self._c.bpf_program__section_name(handle)).decode(),
                handle,
            )
            handle = self._c.bpf_object__next_program(self._pointer, handle)

    def leave_out(self, program: int) -> None:
        """Do not load a program."""
        _checked(self._c.bpf_program__set_autoload(program, False), "leave a BPF program out")

    def program_fd(self, program: int) -> int:
        """Return a loaded program's descriptor."""
        return _checked(self._c.bpf_program__fd(program), "find a loaded BPF program")

    def map_shape(self, name: str) -> tuple[int, int] | None:
        """Return a map's bytes per value and its number of entries; None where there is no such map."""
        handle = self._c.bpf_object__find_map_by_name(self._pointer, name.encode())
        if not handle:
            return None
        return self._c.bpf_map__value_size(handle), self._c.bpf_map__max_entries(handle)

    def map_fd(self, name: str) -> int:
        """Return a loaded map's descriptor."""
        return _checked(self._c.bpf_map__fd(self._map(name)), f"find BPF map {name}")

    def resize_map(self, name: str, entries: int) -> None:
        """Give a map another number of entries than the file says; before `load`."""
        _checked(self._c.bpf_map__set_max_entries(self._map(name), entries), f"size BPF map {name}")

    def share_map(self, name: str, fd: int) -> None:
        """Let the programs use a map that is there already; before `load`."""
        _checked(self._c.bpf_map__reuse_fd(self._map(name), fd), f"share BPF map {name}")

    def load(self) -> None:
        """Have the kernel verify and load it.

        Raises:
            BpfError: refused, with its errno; libbpf's log says why.
        """
        _checked(self._c.bpf_object__load(self._pointer), "load a BPF object")

    def _map(self, name: str) -> int:
        handle: int = self._c.bpf_object__find_map_by_name(self._pointer, name.encode())
        assert handle, name
        return handle


@cache
def library() -> Library:
    """Return the libbpf of this machine: pylibbpf's where it is installed, else the system's.

    Raises:
        BpfError: there is none, or it lacks a function; with what to install.
    """
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice not in ("", "pylibbpf", "system"):
        raise BpfError(f"{CHOICE_VARIABLE} is {choice!r}; it may be 'pylibbpf' or 'system', or not be set")
    complaints = []
    for name, path in (("pylibbpf", _pylibbpf_path()), ("system", _SYSTEM)):
        if choice not in ("", name):
            continue
        if path is None:
            complaints.append("pylibbpf is not installed (it has wheels for x86_64 and Python below 3.13 only)")
            continue
        try:
            return Library(path)
        except BpfError as err:
            complaints.append(str(err))
    advice = "install the system's libbpf (Debian: apt install libbpf1)"
    raise BpfError(f"there is no libbpf to load BPF objects with: {'; '.join(complaints)}; {advice}")


def _pylibbpf_path() -> str | None:
    package = importlib.util.find_spec("pylibbpf")
    places = list(package.submodule_search_locations or []) if package else []
    spec = importlib.machinery.PathFinder.find_spec("pylibbpf.pylibbpf", places)
    return spec.origin if spec else None


def _give_memory_back() -> None:
    """Have malloc return what is free to the kernel.

    libbpf copies the kernel's BTF, some megabytes, for every load; glibc keeps the holes, 30 MB of them after a hundred
    loads. A C library without this call keeps none.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def errno_text(number: int) -> str:
    """Return an errno's name and text, for instance `EBUSY: Device or resource busy`."""
    name = "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, f"errno {number}")
    return f"{name}: {os.strerror(number)}"  # errorcode calls 95 ENOTSUP, the kernel's word is the other one


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise BpfError(f"cannot {what}: {errno_text(-result)}", -result)
    return result
