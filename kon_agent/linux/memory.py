"""Shared memory: sealed memfds and mappings of them that hold no file descriptor.

Invariants:
* A memfd made here can neither shrink nor grow and every byte of it is allocated, so that no process mapping
  it can be killed with SIGBUS by another, or by a full tmpfs.
* A read-only mapping comes from a read-only descriptor (`reopen_readonly`), so that mprotect(2) cannot make
  it writable: the kernel remembers how the file was opened.
* Python's `mmap` keeps a dup() of the descriptor for the mapping's life; these mappings do not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from kon_agent.linux.libc import MADV_DONTFORK, MAP_SHARED, PROT_READ, PROT_WRITE, check, libc

MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3: never executable; with vm.memfd_noexec=2 the only kind allowed
_PYBUF_READ = 0x100  # CPython's PyBUF_READ and PyBUF_WRITE, for PyMemoryView_FromMemory
_PYBUF_WRITE = 0x200

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value

_view_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_memory.restype = ctypes.py_object
_view_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)

_addresses: dict[int, tuple[int, memoryview]] = {}
"""Address of each live view by its `id`; it is held so that its id is not given away."""


def create_memfd(name: str, size: int) -> int:
    """Create `size` bytes of zeroed, sealed shared memory and return its read-write descriptor.

    Args:
        name: what /proc/PID/maps shows after `memfd:`.
        size: bytes; a mapping of it should be a multiple of the page size.

    Raises:
        OSError: no memory or no descriptor left.
    """
    fd = _open_memfd(name)
    try:
        os.fchmod(fd, 0o600)  # memfds are born 0777: /proc/PID/fd/N would let any user reopen them read-write
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def _open_memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as err:
        if err.errno != errno.EINVAL:  # EINVAL: older than Linux 6.3
            raise
        return os.memfd_create(name, flags)


def reopen_readonly(fd: int) -> int:
    """Open the file behind `fd` once more, read-only; no mapping of the result can ever be made writable.

    Raises:
        OSError: /proc is missing or no descriptor is left.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def map_memory(fd: int, size: int, writable: bool, *, inherit: bool = True) -> memoryview:
    """Map the first `size` bytes of `fd`, shared, and return them; `fd` may be closed afterwards.

    Args:
        fd: a memfd, or anything else mmap(2) takes.
        size: bytes.
        writable: whether the mapping and the view accept stores.
        inherit: whether a forked child has the mapping too. Give False for what only this process may see,
            such as a supervisor's view of one worker's ring: in a child the address is then unmapped
            (MADV_DONTFORK).

    Raises:
        OSError: the descriptor does not allow it, or no memory is left.
    """
    protection = PROT_READ | PROT_WRITE if writable else PROT_READ
    address = libc.mmap(None, size, protection, MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        check(-1, f"cannot map {size} bytes of descriptor {fd} {'writable' if writable else 'read-only'}")
    if not inherit:
        check(libc.madvise(address, size, MADV_DONTFORK), f"cannot keep {size} bytes from children")
    view: memoryview = _view_memory(address, size, _PYBUF_WRITE if writable else _PYBUF_READ)
    _addresses[id(view)] = (address, view)
    return view


def unmap_memory(view: memoryview) -> None:
    """Unmap what `map_memory` returned. Slices and casts of it must be gone: using one faults.

    Raises:
        ValueError: `view` is not a live mapping of this module.
    """
    address, known = _addresses.get(id(view), (0, None))
    if known is not view:
        raise ValueError("not a mapping of map_memory, or unmapped already")
    size = view.nbytes
    view.release()
    del _addresses[id(view)]
    check(libc.munmap(address, size), f"cannot unmap {size} bytes")
