"""What eBPF needs: the kernel and its settings, libbpf, our objects, capabilities, memory for maps."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Sequence

from kon_agent.bpf import libbpf
from kon_agent.bpf.flowcount import FlowCount
from kon_agent.bpf.net import NetCounters
from kon_agent.bpf.probe import load_object
from kon_agent.bpf.probes import PROBES
from kon_agent.config.schema import PluginsConfig
from kon_agent.doctor.finding import Finding, fail, ok, split, warn
from kon_agent.doctor.patient import BPF_PLUGINS, BTF_PLUGINS, Patient, privileges_of
from kon_agent.errors import BpfError
from kon_agent.linux.privileges import Privileges

Version = tuple[int, int]

NEEDS: tuple[tuple[Version, str], ...] = (
    ((5, 3), "the agent itself (pidfd_open)"),
    ((5, 5), "BPF counters that workers read by mapping them"),
    ((5, 9), "`ebpf` and `flows`: XDP programs that detach with the agent (links)"),
    ((5, 11), "`tcp`, `drops`, `runqlat` and `biolat`: programs that trace the kernel by its BTF"),
    ((5, 13), "Landlock, one of the walls around a worker"),
    ((5, 17), "the reasons of `drops`"),
    ((6, 6), "egress without a filter in the interface's queues (TCX)"),
)
"""From which kernel on there is what. Below the first the agent does not run."""

MEMCG_FROM: Version = (5, 11)  # BPF memory is charged to the control group, no longer to RLIMIT_MEMLOCK
MEMLOCK_BYTES = 64 * 1024 * 1024  # what all objects take together, and as much again on a machine of many CPUs

_BTF = "/sys/kernel/btf/vmlinux"
_BTF_HEADER = struct.Struct("=HBBIIIII")  # struct btf_header, linux/btf.h
_BTF_MAGIC = 0xEB9F
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_MAX_FOUND_CHARS = 1000  # of a verifier's story, of which libbpf.py keeps the lines that matter

CAPABILITY_NEEDS: tuple[tuple[str, str, bool], ...] = (
    ("CAP_SETUID", "workers and sender become `user:`", True),
    ("CAP_SETGID", "workers and sender become `user:`", True),
    ("CAP_KILL", "ending workers, which belong to another user", True),
    ("CAP_BPF", "loading BPF programs", False),
    ("CAP_PERFMON", "loading BPF programs that compare packet pointers or trace the kernel", False),
    ("CAP_NET_ADMIN", "attaching programs to interfaces", False),
)
"""What the supervisor needs as root, for what, and whether it is needed where no plugin is enabled that uses BPF."""


def version_of(release: str) -> Version:
    """Return the version in a kernel's release, `6.12.5-amd64`; (0, 0) where there is none."""
    match = _RELEASE.match(release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def judge_kernel(release: str) -> Finding:
    """Return what a kernel lacks."""
    version = version_of(release)
    missing = [f"{what}, from {major}.{minor} on" for (major, minor), what in NEEDS if version < (major, minor)]
    if not missing:
        return ok("kernel", f"Linux {release} has all that is used")
    found = f"Linux {release} lacks {'; '.join(missing)}"
    if version < NEEDS[0][0]:
        return fail("kernel", found, "use a newer kernel")
    return warn("kernel", found, "a newer kernel has it; the agent runs without, and says so where it counts less")


def judge_btf(head: bytes, problem: str, wanting: Sequence[str]) -> Finding:
    """Return whether the kernel's BTF can be used.

    Args:
        head: the beginning of its file.
        problem: why there is none; empty: there is.
        wanting: the enabled plugins that need it.
    """
    if not problem and not _is_btf(head):
        problem = f"{_BTF} holds no BTF"
    if not problem:
        return ok("btf", f"{_BTF}, {_BTF_HEADER.unpack_from(head)[5] >> 10} KiB of types")
    advice = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y; in a container, let it see /sys/kernel/btf"
    if wanting:
        return fail("btf", f"{problem}: {', '.join(wanting)} can only tell what procfs has", advice)
    return warn("btf", f"{problem}: nothing that is enabled needs it", advice)


def _is_btf(head: bytes) -> bool:
    if len(head) < _BTF_HEADER.size:
        return False
    magic, version, _, length, *_ = _BTF_HEADER.unpack_from(head)
    return bool(magic == _BTF_MAGIC and version == 1 and length >= _BTF_HEADER.size)


def judge_libbpf(version: str, path: str, problem: str, wanting: Sequence[str]) -> Finding:
    """Return which libbpf there is."""
    if problem:
        found, advice = split(problem)
        return (fail if wanting else warn)("libbpf", found, advice)
    return ok("libbpf", f"{'pylibbpf' if 'pylibbpf' in path else 'the system'}'s libbpf {version}: {path}")


def judge_object(plugin: str, problem: str, left_out: Sequence[str], is_telling: bool) -> Finding:
    """Return whether a plugin's BPF object can be loaded.

    Args:
        plugin: whose.
        problem: why not, in libbpf's and the verifier's words; empty: it can.
        left_out: its programs that this kernel has no place for.
        is_telling: whether this process may what the agent may.
    """
    check = f"object:{plugin}"
    if problem:
        words = " | ".join(line.strip() for line in problem.splitlines() if line.strip())
        found = words if len(words) <= _MAX_FOUND_CHARS else words[:_MAX_FOUND_CHARS] + "…"
        if not is_telling:
            return warn(check, f"cannot be tried without rights: {found}", "run `kon-agent doctor` as root")
        advice = "see `btf`, `libbpf` and `capabilities` above, and docs/troubleshooting.md, `eBPF`"
        if "libbpf says" not in found:  # else its words come last
            found, own = split(found)
            advice = own or advice
        return fail(check, f"{plugin} can only tell what procfs has: {found}", advice)
    if left_out:
        lacking = ", ".join(left_out)
        return warn(check, f"loads, without {lacking}: this kernel lacks their tracepoints", "use a newer kernel")
    return ok(check, "the kernel accepts it (loaded, and let go again)")


def judge_capabilities(found: Privileges, whose: str, has_bpf_plugins: bool) -> Finding:
    """Return which capabilities are missing, and what for.

    Args:
        found: the effective ones, and whether they are root's: root is meant to have them all.
        whose: of which process, in words.
        has_bpf_plugins: whether a plugin needs BPF.
    """
    # Whoever has CAP_SYS_ADMIN needs neither of the two that were split off it (capabilities(7)).
    held = found.effective | ({"CAP_BPF", "CAP_PERFMON"} if "CAP_SYS_ADMIN" in found.effective else set())
    needed = [need for need in CAPABILITY_NEEDS if need[2] or has_bpf_plugins]
    missing = [(name, what) for name, what, _ in needed if name not in held]
    if not missing:
        return ok("capabilities", f"{whose} has {', '.join(name for name, _, _ in needed)}")
    lacks = f"{whose} lacks " + ", ".join(f"{name} ({what})" for name, what in missing)
    if found.uid != 0:
        advice = (
            "as an ordinary user the agent runs, without BPF and all as one user: start it, and the doctor, as root"
        )
        return warn("capabilities", lacks, advice)
    names = " ".join(name for name, _ in missing)
    return fail("capabilities", lacks, f"grant {names}: CapabilityBoundingSet= in the unit, cap_add in a container")


def judge_lockdown(text: str | None) -> Finding:
    """Return whether the kernel's lockdown is in the way; `text` is its file's, None: there is none."""
    chosen = re.search(r"\[(\w+)\]", text or "")
    mode = chosen[1] if chosen else "none"
    if mode == "confidentiality":
        advice = "boot with lockdown=integrity, or switch Secure Boot's lockdown off"
        return fail("lockdown", "confidentiality: BPF programs may not read the kernel's memory", advice)
    return ok("lockdown", mode if text is not None else "this kernel has none, or does not tell")


def judge_unprivileged_bpf(text: str | None) -> Finding:
    """Return who may load BPF programs at all: the sysctl kernel.unprivileged_bpf_disabled."""
    meanings = {
        "0": "0: any user may load some BPF programs",
        "1": "1: only the privileged may load BPF programs, until the next boot",
        "2": "2: only the privileged may load BPF programs",
    }
    return ok("unprivileged_bpf", meanings.get((text or "").strip(), "this kernel does not tell"))


def judge_memlock(release: str, limit_bytes: int | None, whose: str) -> Finding:
    """Return whether RLIMIT_MEMLOCK is in the way; `limit_bytes` None: no limit."""
    if version_of(release) >= MEMCG_FROM:
        return ok("memlock", "does not count: from Linux 5.11 on BPF memory belongs to the control group")
    if limit_bytes is None or limit_bytes >= MEMLOCK_BYTES:
        return ok("memlock", f"{whose} may lock {'any amount' if limit_bytes is None else f'{limit_bytes >> 10} KiB'}")
    found = f"{whose} may lock {limit_bytes >> 10} KiB: too little for BPF maps before Linux 5.11"
    return fail("memlock", found, "LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited`")


def judge_jit(text: str | None) -> Finding:
    """Return whether BPF programs run as machine code: the sysctl net.core.bpf_jit_enable."""
    value = (text or "").strip()
    if value == "0":
        advice = "sysctl -w net.core.bpf_jit_enable=1, and in /etc/sysctl.d"
        return warn("jit", "off: every packet costs several times as much", advice)
    if value in ("1", "2"):
        return ok("jit", "on")
    return ok("jit", "cannot be told from here: root can, in the machine's own network namespace")


# The checks.


def check_kernel(patient: Patient) -> Iterable[Finding]:
    """Look at the kernel's version."""
    yield judge_kernel(os.uname().release)


def check_btf(patient: Patient) -> Iterable[Finding]:
    """Look at the kernel's BTF."""
    yield judge_btf(*_read_btf(), patient.wants(*BTF_PLUGINS))


def check_libbpf(patient: Patient) -> Iterable[Finding]:
    """Look for a libbpf."""
    wanting = patient.wants(*BPF_PLUGINS)
    try:
        library = libbpf.library()
        yield judge_libbpf(library.version, library.path, "", wanting)
    except BpfError as err:
        yield judge_libbpf("", "", str(err), wanting)


def check_object(patient: Patient, plugin: str) -> Iterable[Finding]:
    """Load the object of a plugin, if it is enabled, and let it go."""
    if not patient.wants(plugin):
        return
    try:
        left_out, problem = _try(plugin, patient.config.plugins), ""
    except BpfError as err:
        left_out, problem = [], str(err)
    yield judge_object(plugin, problem, left_out, patient.stands_for_agent or patient.has_bpf)


def check_capabilities(patient: Patient) -> Iterable[Finding]:
    """Look at what the agent may do, or this process where none runs."""
    has_bpf_plugins = bool(patient.wants(*BPF_PLUGINS))
    pid = patient.agent_pid
    if pid is not None:
        yield judge_capabilities(privileges_of(pid), f"the agent (pid {pid})", has_bpf_plugins)
    else:
        yield judge_capabilities(patient.privileges, "this process", has_bpf_plugins)


def check_lockdown(patient: Patient) -> Iterable[Finding]:
    """Look at the kernel's lockdown."""
    yield judge_lockdown(_read_text("/sys/kernel/security/lockdown"))


def check_unprivileged_bpf(patient: Patient) -> Iterable[Finding]:
    """Look at who may load BPF programs."""
    yield judge_unprivileged_bpf(_read_text("/proc/sys/kernel/unprivileged_bpf_disabled"))


def check_memlock(patient: Patient) -> Iterable[Finding]:
    """Look at RLIMIT_MEMLOCK of the agent, or of this process."""
    pid, whose = patient.agent_pid or "self", "the agent" if patient.agent_pid else "this process"
    yield judge_memlock(os.uname().release, parse_memlock(_read_text(f"/proc/{pid}/limits") or ""), whose)


def check_jit(patient: Patient) -> Iterable[Finding]:
    """Look at the BPF compiler."""
    yield judge_jit(_read_text("/proc/sys/net/core/bpf_jit_enable"))


def parse_memlock(text: str) -> int | None:
    """Return the soft limit of locked memory in /proc/PID/limits, bytes; None: there is none."""
    match = re.search(r"^Max locked memory\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def _try(plugin: str, config: PluginsConfig) -> list[str]:
    """Load a plugin's object as the agent would, attach nothing, and let it go; return programs that had no place."""
    probe = PROBES.get(plugin)
    if probe is None:
        counters = NetCounters.load()
        try:
            if plugin == "flows":
                FlowCount.load(counters.shared_maps, config.flows.memory).close()
        finally:
            counters.close()
        return []
    loaded = load_object(probe, libbpf.library().possible_cpus())
    loaded.close()
    return loaded.left_out


def _read_btf(root: str = "/") -> tuple[bytes, str]:
    """Return the head of the kernel's BTF, or why there is none."""
    try:
        with open(f"{root.rstrip('/')}{_BTF}", "rb") as file:
            return file.read(_BTF_HEADER.size), ""
    except FileNotFoundError:
        return b"", f"{_BTF} does not exist"
    except OSError as err:
        return b"", f"{_BTF} cannot be read ({err.strerror})"


def _read_text(path: str, root: str = "/") -> str | None:
    """Return a kernel file's text; None where there is none, or none for us."""
    try:
        with open(root.rstrip("/") + path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
