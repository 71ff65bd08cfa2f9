"""Shared memory: what is sealed stays sealed, what is read-only stays read-only."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

import pytest

from kon_agent.linux import libc, memory

SIZE = 8192


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory.create_memfd("test", SIZE)
    yield fd
    os.close(fd)


def test_memfd_is_private_and_fully_allocated(fd: int) -> None:
    """A memfd is readable and writable by its owner only, and none of its pages is missing."""
    info = os.fstat(fd)
    assert 0o600 == stat.S_IMODE(info.st_mode)
    assert SIZE == info.st_size
    assert SIZE == info.st_blocks * 512


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_memfd_cannot_change_its_size(fd: int, size: int) -> None:
    """No holder of the descriptor can shrink it (SIGBUS for the others) or grow it."""
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)


def test_memfd_takes_no_further_seal(fd: int) -> None:
    """A child cannot seal the memory against its other users."""
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_store_shows_in_the_other_mapping(fd: int) -> None:
    """A writable and a read-only mapping are the same memory, and outlive the descriptors."""
    read_fd = memory.reopen_readonly(fd)
    writer = memory.map_memory(fd, SIZE, writable=True)
    reader = memory.map_memory(read_fd, SIZE, writable=False)
    os.close(read_fd)
    writer[64:72].cast("Q")[0] = 2**64 - 1
    assert 2**64 - 1 == reader[64:72].cast("Q")[0]
    memory.unmap_memory(writer)
    memory.unmap_memory(reader)


def test_the_view_is_plain_bytes(fd: int) -> None:
    """A view is one dimension of unsigned bytes, contiguous, so that it casts to any word."""
    view = memory.map_memory(fd, SIZE, writable=True)
    assert ("B", 1, SIZE, True, False) == (view.format, view.ndim, view.nbytes, view.c_contiguous, view.readonly)
    memory.unmap_memory(view)


def test_a_read_only_view_refuses_stores(fd: int) -> None:
    """A store into a read-only view is an exception, not a fault."""
    view = memory.map_memory(fd, SIZE, writable=False)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    memory.unmap_memory(view)


def test_a_mapping_of_a_read_only_descriptor_cannot_become_writable(fd: int) -> None:
    """mprotect is refused, as is a writable mapping: the file itself is open read-only."""
    read_fd = memory.reopen_readonly(fd)
    view = memory.map_memory(read_fd, SIZE, writable=False)
    address = ctypes.c_void_p(memory._addresses[id(view)][0])
    with pytest.raises(PermissionError):
        libc.check(libc.libc.mprotect(address, ctypes.c_size_t(SIZE), libc.PROT_READ | libc.PROT_WRITE), "mprotect")
    with pytest.raises(PermissionError, match="writable"):
        memory.map_memory(read_fd, SIZE, writable=True)
    memory.unmap_memory(view)
    os.close(read_fd)


def test_unmap_twice_is_an_error(fd: int) -> None:
    """Only a live mapping can be unmapped."""
    view = memory.map_memory(fd, SIZE, writable=True)
    memory.unmap_memory(view)
    with pytest.raises(ValueError, match="unmapped already"):
        memory.unmap_memory(view)


def test_a_bad_descriptor_is_an_os_error() -> None:
    """mmap's failure carries its errno and names the descriptor."""
    with pytest.raises(OSError, match="descriptor 9999") as caught:
        memory.map_memory(9999, SIZE, writable=False)
    assert errno.EBADF == caught.value.errno


def test_a_private_mapping_is_absent_in_a_child(fd: int) -> None:
    """`inherit=False` keeps a mapping out of forked children; the default does not."""
    shared = memory.map_memory(fd, SIZE, writable=False)
    private = memory.map_memory(fd, SIZE, writable=False, inherit=False)
    addresses = [f"{memory._addresses[id(view)][0]:x}-" for view in (shared, private)]
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/maps") as file:
            maps = file.read().splitlines()
        found = [any(line.startswith(address) for line in maps) for address in addresses]
        os._exit(0 if found == [True, False] else 1)
    assert 0 == os.waitpid(pid, 0)[1]
    memory.unmap_memory(shared)
    memory.unmap_memory(private)
