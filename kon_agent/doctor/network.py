"""The interfaces that the configuration watches: how they are counted, or would be, and what is in the way.

Where an agent runs, it has tried: its word counts. Else the kernel is asked what the driver can do and whether another
program has the interface; nothing is attached to find out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kon_agent.bpf import interfaces, surroundings
from kon_agent.bpf.hooks import ASKED
from kon_agent.bpf.interfaces import NetInterface
from kon_agent.control_protocol import InterfaceStatus
from kon_agent.doctor.finding import Finding, fail, ok, warn
from kon_agent.doctor.kernel import Version, version_of
from kon_agent.doctor.patient import Patient
from kon_agent.linux import xdp
from kon_agent.linux.xdpfeatures import XDP_BASIC, XDP_RX_SG, read_xdp_features

OUR_PROGRAMS = "kon_"  # how the names of ours begin
MAX_LISTED = 64  # a host of a thousand containers has as many interfaces: the report stays readable
NATIVE_MAX_MTU = 3498  # a page less its head room, the Ethernet header and skb_shared_info: one buffer holds a frame
TCX_FROM: Version = (6, 6)

_DETACH = "`ip link show dev {0}` names it; detach that, or put {0} into plugins.ebpf.exclude"


@dataclass(frozen=True, slots=True)
class Device:
    """An interface as the kernel shows it to everybody.

    Attributes:
        name: of it.
        mtu: bytes; 0: not known.
        programs: XDP programs it has: mode to number.
        names: their names by number, as far as we may know them.
        features: `enum netdev_xdp_act` of its driver; None: the kernel does not tell.
    """

    name: str
    mtu: int = 0
    programs: Mapping[str, int] | None = None
    names: Mapping[int, str] | None = None
    features: int | None = None


def judge_attached(told: InterfaceStatus) -> Finding:
    """Return how the running agent counts an interface."""
    check = f"interface:{told.name}"
    ways = (("ingress", told.ingress_mode, told.ingress_reason), ("egress", told.egress_mode, told.egress_reason))
    found = ", ".join(f"{way} {mode}" + (f" ({reason})" if reason else "") for way, mode, reason in ways)
    modes = {told.ingress_mode, told.egress_mode}
    if any(reason.startswith("busy") for _, _, reason in ways):
        return fail(check, found, _DETACH.format(told.name))
    if modes == {"none"}:
        return fail(check, found, "the reason is the kernel's; see the checks `kernel`, `object` and `capabilities`")
    if "none" in modes:
        return warn(check, found, "what is not attached is not counted; for the reason see docs/troubleshooting.md")
    if "generic" in modes and told.ingress_reason != ASKED:
        return warn(check, found, "slower: a driver with native XDP, or a smaller MTU, makes it faster")
    return ok(check, found)


def judge_device(device: Device, release: str, generic: Sequence[str] = ()) -> Finding:
    """Return how an interface would be counted.

    Args:
        device: the interface.
        release: the kernel's.
        generic: patterns of those that are to be attached generically.
    """
    check = f"interface:{device.name}"
    if device.programs:
        return _judge_occupied(check, device, device.programs, device.names or {})
    egress = "TCX" if version_of(release) >= TCX_FROM else "clsact"
    if interfaces.matches(device.name, generic):
        return ok(check, f"free; ingress generic, as plugins.ebpf.generic says, egress by {egress}")
    if device.features is None:
        unknown = "whether ingress by native XDP can be told only by trying (before Linux 6.3)"
        return ok(check, f"free; egress by {egress}, {unknown}")
    if not device.features & XDP_BASIC:
        found = f"free; its driver has no native XDP: ingress would be generic, egress by {egress}"
        return ok(check, found)
    if device.mtu > NATIVE_MAX_MTU and not device.features & XDP_RX_SG:
        found = f"free; MTU {device.mtu} is likely too large for native XDP: ingress would be generic"
        return warn(check, found, f"generic XDP is slower; up to MTU {NATIVE_MAX_MTU} suits most drivers")
    return ok(check, f"free; ingress by native XDP, egress by {egress}")


def _judge_occupied(check: str, device: Device, programs: Mapping[str, int], names: Mapping[int, str]) -> Finding:
    known = [names.get(number, "") for number in programs.values()]
    listed = ", ".join(
        f"{mode} {name or 'unknown'} (id {number})"
        for (mode, number), name in zip(programs.items(), known, strict=True)
    )
    if all(name.startswith(OUR_PROGRAMS) for name in known):
        found = f"has an XDP program of a kon-agent that does not answer here: {listed}"
        return warn(check, found, "see `agent`; what a dead agent has left is replaced at the next start")
    if any(name and not name.startswith(OUR_PROGRAMS) for name in known):
        found = f"has an XDP program of somebody else: {listed}; ours leaves it alone"
        return fail(check, found, _DETACH.format(device.name))
    found = f"has an XDP program; whose, cannot be told without CAP_SYS_ADMIN: {listed}"
    return warn(check, found, "run `kon-agent doctor` as root")


def judge_untold(found: Finding) -> Finding:
    """Return what is to be said of an interface of which the running agent says nothing; `found`: what the kernel does.

    It has no BPF then, or a configuration of its own.
    """
    said = f"not counted by the agent's BPF programs; the kernel: {found.found}"
    advice = found.advice if found.verdict == "fail" else "see `agent`, and `kon-agent plugins info ebpf`"
    return Finding(found.check, "fail" if found.verdict == "fail" else "warn", said, advice)


def judge_choice(all_names: Iterable[str]) -> Finding:
    """Return that the patterns choose nothing of all there is."""
    names = ", ".join(sorted(all_names)) or "none"
    advice = "correct interfaces and exclude of plugins.ebpf, or `ip link set NAME up`"
    return warn("interface", f"none that is up matches plugins.ebpf.interfaces; there are: {names}", advice)


def check_interfaces(patient: Patient) -> Iterable[Finding]:
    """Look at every interface that is watched, or should be."""
    if not patient.wants("ebpf"):
        return
    section, present = patient.config.plugins.ebpf, interfaces.scan()
    chosen = interfaces.choose(present, section.interfaces, section.exclude)
    told = {each.name: each for each in patient.status.interfaces} if patient.status else {}
    if not chosen and not told:
        yield judge_choice(interface.name for interface in present)
        return
    untold = [interface for interface in chosen if interface.name not in told]
    yield from map(judge_attached, list(told.values())[:MAX_LISTED])
    features = _read_features()
    for interface in untold[: max(0, MAX_LISTED - len(told))]:
        found = judge_device(_read_device(interface, features), os.uname().release, section.generic)
        yield found if patient.status is None else judge_untold(found)
    omitted = len(untold) + len(told) - MAX_LISTED
    if omitted > 0:
        yield ok("interface", f"{omitted} more are not listed here; `kon-agent status` has them")


def _read_features() -> dict[int, int]:
    try:
        return read_xdp_features()
    except OSError:  # a kernel before 6.3
        return {}


def _read_device(interface: NetInterface, features: Mapping[int, int], root: str = "/") -> Device:
    programs = xdp.programs(interface.ifindex)
    try:
        with open(f"{root.rstrip('/')}/sys/class/net/{interface.name}/mtu", encoding="ascii") as file:
            mtu = int(file.read())
    except (OSError, ValueError):  # gone meanwhile
        mtu = 0
    return Device(
        name=interface.name,
        mtu=mtu,
        programs=programs,
        names={number: surroundings.name_of(number) for number in programs.values()},
        features=features.get(interface.ifindex),
    )
