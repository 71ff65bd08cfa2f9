"""libbpf's C functions, as far as this project needs them, from the library that pylibbpf brings along.

pylibbpf loads an object; what it does not offer (links of XDP and TCX, freezing a map, the log) is called
here, in the same copy of libbpf, through ctypes. Its extension module is opened without the package around
it: `import pylibbpf` also imports llvmlite, 3.6 MB of private memory that nothing here uses and every child
would inherit.

libbpf 1.x functions return a negative errno; here each raises BpfError with what was tried, on what, and
the errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from kon_agent.errors import BpfError

BPF_XDP = 37  # enum bpf_attach_type, linux/bpf.h
BPF_TCX_EGRESS = 47
XDP_FLAGS_SKB_MODE = 1 << 1  # linux/if_link.h: generic
XDP_FLAGS_DRV_MODE = 1 << 2  # native
MAX_LOG_BYTES = 256 * 1024  # a verifier log's end tells; one of a large program may have megabytes before it

_LIBBPF_DEBUG = 2  # enum libbpf_print_level: 0 warnings (the verifier's log among them), 1 information
_LINE_BYTES = 1024 * 1024  # libbpf hands a whole verifier log over as one line; beyond this its end is cut
_LOG_LINES_SHOWN = 12

_int, _u32, _void, _text = ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p
# va_list as a pointer: so x86_64's System V ABI passes it, and AAPCS64 (a structure of more than 16 bytes).
_PrintFunction = ctypes.CFUNCTYPE(_int, _int, _text, _void)
_SIGNATURES: dict[str, tuple[type, list[type]]] = {
    "bpf_link_create": (_int, [_int, _int, _int, _void]),
    "bpf_map_freeze": (_int, [_int]),
    "bpf_map_lookup_elem": (_int, [_int, _void, _void]),
    "bpf_map_update_elem": (_int, [_int, _void, _void, ctypes.c_uint64]),
    "libbpf_num_possible_cpus": (_int, []),
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
        """Return the lines a reader wants: the last ones, without the verifier's statistics and registers."""
        lines = [line.rstrip() for line in self.text.splitlines() if line.strip()]
        kept = [line for line in lines if "; R" not in line and not line.startswith(("processed ", "-- "))]
        return "\n".join(kept[-_LOG_LINES_SHOWN:])


def _duplicate_own(program_id: int) -> int:
    for name in os.listdir("/proc/self/fd"):
        try:
            with open(f"/proc/self/fdinfo/{name}", encoding="ascii") as file:
                is_it = f"prog_id:\t{program_id}\n" in file.read()
        except OSError:  # the listing's own descriptor, closed by now
            continue
        if is_it:
            return fcntl.fcntl(int(name), fcntl.F_DUPFD_CLOEXEC, 3)
    raise BpfError(f"BPF program {program_id} is loaded but not open in this process; /proc must be mounted")


class Library:
    """The C functions of one copy of libbpf.

    Args:
        path: the shared object that exports them.

    Raises:
        BpfError: it cannot be opened, or a function is missing.
    """

    def __init__(self, path: str) -> None:
        try:
            self._c = ctypes.CDLL(path)
        except OSError as err:
            raise BpfError(f"libbpf cannot be opened from {path}: {err}; reinstall pylibbpf") from err
        missing = [name for name in _SIGNATURES if not hasattr(self._c, name)]
        if missing:
            raise BpfError(f"{path} lacks libbpf's {', '.join(missing)}; install pylibbpf 0.0.6 or newer")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments

    @property
    def version(self) -> str:
        """libbpf's version, for instance `v1.6`."""
        return bytes(self._c.libbpf_version_string()).decode()

    def possible_cpus(self) -> int:
        """Return how many CPUs this kernel may ever number: every CPU number is below it."""
        return _checked(self._c.libbpf_num_possible_cpus(), "count the possible CPUs")

    def link(self, program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        """Attach a program to an interface; return the link's fd, with which the attachment ends.

        Raises:
            BpfError: refused, with its errno.
        """
        options = LinkOptions(ctypes.sizeof(LinkOptions), flags, 0)
        fd = self._c.bpf_link_create(program_fd, ifindex, attach_type, ctypes.byref(options))
        return _checked(fd, f"attach a BPF program to interface {ifindex}")

    def freeze(self, map_fd: int, name: str) -> None:
        """Take the right to change a map from user space, for good."""
        _checked(self._c.bpf_map_freeze(map_fd), f"freeze BPF map {name}")

    def update(self, map_fd: int, name: str, index: int, value: bytes) -> None:
        """Set one entry of an array map."""
        key = _u32(index)
        result = self._c.bpf_map_update_elem(map_fd, ctypes.byref(key), value, 0)
        _checked(result, f"set entry {index} of BPF map {name}")

    def program_fd(self, array_fd: int, name: str) -> int:
        """Return a new fd of the program in slot 0 of a program array; this process must have it open already.

        Looking a program array up gives the program's id (kernel/bpf/arraymap.c, fd_array lookup). Opening a program
        by id would take CAP_SYS_ADMIN; duplicating the descriptor the loader holds takes nothing.
        """
        key, program_id = _u32(0), _u32(0)
        result = self._c.bpf_map_lookup_elem(array_fd, ctypes.byref(key), ctypes.byref(program_id))
        _checked(result, f"look the program of BPF map {name} up")
        return _duplicate_own(program_id.value)

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


@cache
def pylibbpf_module() -> ModuleType:
    """Return pylibbpf's extension module.

    Raises:
        BpfError: pylibbpf is not installed, or cannot be loaded.
    """
    package = importlib.util.find_spec("pylibbpf")
    places = list(package.submodule_search_locations or []) if package else []
    spec = importlib.machinery.PathFinder.find_spec("pylibbpf.pylibbpf", places)
    if spec is None or spec.loader is None:
        raise BpfError(
            "no BPF object can be loaded: pylibbpf is not installed; "
            "it has wheels for x86_64 and Python below 3.13 only"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as err:
        raise BpfError(f"pylibbpf cannot be loaded from {spec.origin}: {err}; reinstall it") from err
    return module


@cache
def library() -> Library:
    """Return the libbpf within pylibbpf.

    Raises:
        BpfError: there is none, or it lacks a function.
    """
    return Library(str(pylibbpf_module().__file__))


def errno_text(number: int) -> str:
    """Return an errno's name and text, for instance `EBUSY: Device or resource busy`."""
    name = "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, f"errno {number}")
    return f"{name}: {os.strerror(number)}"  # errorcode calls 95 ENOTSUP, the kernel's word is the other one


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise BpfError(f"cannot {what}: {errno_text(-result)}", -result)
    return result
