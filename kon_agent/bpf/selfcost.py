"""What our own BPF programs and maps cost: time on the processors while statistics are on, and the kernel's memory.

Statistics are the machine's: while somebody holds them on, the kernel reads a clock around every run of every BPF
program (some 20 to 60 ns each). They are off unless they are asked for, and end with the descriptor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from kon_agent.bpf import objects
from kon_agent.bpf.layout import MapCost, ProgramCost
from kon_agent.errors import BpfError

_MEMORY = "memlock:"  # of a map's fdinfo: what the kernel has allocated for it (proc_pid_fdinfo(5))


class Statistics:
    """The kernel's run-time statistics: on from now until `close`.

    Raises:
        BpfError: a kernel before 5.8, or EPERM without CAP_SYS_ADMIN.
    """

    def __init__(self) -> None:
        self._fd = objects.enable_statistics()

    def close(self) -> None:
        """Let them go; somebody else may keep them on. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def program_costs(programs: Iterable[tuple[str, int]]) -> list[ProgramCost]:
    """Return what programs, by name and descriptor, have cost since they were loaded, as far as that was measured.

    Raises:
        BpfError: a descriptor is no program's.
    """
    found = [(name, objects.program_of(fd)) for name, fd in programs]
    return [ProgramCost(name, program.run_time_ns, program.run_cnt) for name, program in found]


def map_costs(maps: Iterable[tuple[str, int]]) -> list[MapCost]:
    """Return the kernel memory of maps, by name and descriptor.

    Raises:
        BpfError: a descriptor is no map's, or /proc is not mounted.
    """
    return [MapCost(name, _memory_bytes(fd, name)) for name, fd in maps]


def _memory_bytes(fd: int, name: str) -> int:
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(_MEMORY))
    except (OSError, StopIteration) as err:
        raise BpfError(f"cannot tell the memory of BPF map {name}: {err or 'its fdinfo does not say'}") from err
