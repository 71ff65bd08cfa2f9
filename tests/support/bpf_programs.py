"""The BPF programs this process has loaded, as the kernel sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kon_agent.bpf import objects
from kon_agent.errors import BpfError


def own_programs() -> Iterator[objects.Program]:
    """Yield every BPF program of which this process has a descriptor."""
    for fd in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{fd}"
        if os.path.lexists(path) and os.readlink(path) == "anon_inode:bpf-prog":  # the listing's own is gone
            yield objects.program_of(int(fd))


def is_loaded(program_id: int) -> bool:
    """Whether the kernel has a program of that number."""
    try:
        objects.program(program_id)
    except BpfError:
        return False
    return True
