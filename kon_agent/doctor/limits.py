"""What the machine lets the agent have: its control groups' limits, against what it may use and what its maps take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kon_agent.bpf import layout, libbpf
from kon_agent.bpf.probes import PROBES
from kon_agent.config.schema import LimitsConfig
from kon_agent.doctor.finding import Finding, ok, size, warn
from kon_agent.doctor.patient import BPF_PLUGINS, Patient
from kon_agent.errors import BpfError
from kon_agent.linux.cgroup import MOUNT

_UNLIMITED_V1 = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """The narrowest limits of a control group and those above it; None: none.

    Attributes:
        memory_bytes: memory.max.
        cores: cpu.max, as cores.
        tasks: pids.max.
    """

    memory_bytes: int | None = None
    cores: float | None = None
    tasks: int | None = None


def judge_group(found: GroupLimits, limits: LimitsConfig, whose: str) -> Finding:
    """Return whether the kernel would stop the agent before the agent stops itself."""
    narrow = []
    if found.memory_bytes is not None and found.memory_bytes < limits.memory:
        narrow.append(f"memory.max {size(found.memory_bytes)} < limits.memory {size(limits.memory)}")
    if found.cores is not None and found.cores < limits.cpu:
        narrow.append(f"cpu.max {found.cores:.2g} cores < limits.cpu {limits.cpu:.2g}")
    if narrow:
        advice = (
            "raise MemoryMax= or CPUQuota= (a container's limits), or lower `limits` so that the governor acts first"
        )
        return warn("cgroup", f"the control group of {whose} is narrower than `limits`: {'; '.join(narrow)}", advice)
    named = {
        "memory": found.memory_bytes and size(found.memory_bytes),
        "cpu": found.cores and f"{found.cores:.2g} cores",
        "tasks": found.tasks,
    }
    bounds = ", ".join(f"{name} {bound}" for name, bound in named.items() if bound) or "no limit"
    return ok("cgroup", f"the control group of {whose} leaves `limits` their room: {bounds}")


def judge_maps(sizes: Mapping[str, int], memory_bytes: int | None, limits: LimitsConfig, is_loaded: bool) -> Finding:
    """Return what BPF maps take, which is kernel memory beyond `limits.memory`.

    Args:
        sizes: bytes by plugin.
        memory_bytes: the control group's memory.max; None: none.
        limits: of the agent.
        is_loaded: whether an agent runs, and has them.
    """
    total = sum(sizes.values())
    each = ", ".join(f"{plugin} {size(count)}" for plugin, count in sizes.items())
    verb = "take" if is_loaded else "would take"
    found = f"BPF maps {verb} {size(total)} of kernel memory ({each or 'none'})"
    if memory_bytes is not None and memory_bytes - limits.memory < total:
        found += f"; memory.max {size(memory_bytes)} leaves them no room beside limits.memory"
        return warn("map_memory", found, "raise MemoryMax=, or lower limits.memory or plugins.flows.memory")
    return ok("map_memory", found)


def check_group(patient: Patient) -> Iterable[Finding]:
    """Look at the control group of the agent, or of this process."""
    pid, whose = patient.agent_pid or "self", "the agent" if patient.agent_pid else "this process"
    yield judge_group(read_group(pid), patient.config.limits, whose)


def check_maps(patient: Patient) -> Iterable[Finding]:
    """Reckon what the enabled plugins' maps take."""
    try:
        cpus = libbpf.library().possible_cpus()
    except BpfError:  # `libbpf` says it; then nothing is loaded either
        return
    sizes = {}
    for plugin in patient.wants(*BPF_PLUGINS):
        if plugin == "ebpf":
            sizes[plugin] = layout.counters_bytes(cpus)
        elif plugin == "flows":
            sizes[plugin] = int(patient.config.plugins.flows.memory)
        elif plugin in PROBES:
            sizes[plugin] = PROBES[plugin].memory_bytes(cpus)
    group = read_group(patient.agent_pid or "self")
    yield judge_maps(sizes, group.memory_bytes, patient.config.limits, patient.status is not None)


def read_group(pid: int | str, root: str = "/") -> GroupLimits:
    """Return the limits of a process's control group, version 2 or, for memory, 1."""
    root = root.rstrip("/")
    memory: list[int | None] = []
    tasks: list[int | None] = []
    cores: list[float] = []
    for line in _read(f"{root}/proc/{pid}/cgroup").splitlines():
        number, controllers, place = [*line.split(":", 2), "", "", ""][:3]
        if number == "0":
            for folder in _upwards(f"{root}{MOUNT}", place):
                memory.append(_number(_read(f"{folder}/memory.max")))
                tasks.append(_number(_read(f"{folder}/pids.max")))
                quota, _, period = _read(f"{folder}/cpu.max").strip().partition(" ")
                if quota.isdigit() and period.isdigit():
                    cores.append(int(quota) / int(period))
        elif "memory" in controllers.split(","):
            for folder in _upwards(f"{root}{MOUNT}/memory", place):
                limit = _number(_read(f"{folder}/memory.limit_in_bytes"))
                memory.append(limit if limit is not None and limit < _UNLIMITED_V1 else None)
    return GroupLimits(_least(memory), min(cores, default=None), _least(tasks))


def _upwards(mount: str, place: str) -> Iterable[str]:
    parts = [part for part in place.removesuffix(" (deleted)").split("/") if part]
    for count in range(len(parts), -1, -1):
        yield "/".join([mount, *parts[:count]])


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
