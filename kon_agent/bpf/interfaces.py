"""The network interfaces of this machine, and which of them the configuration asks for.

Read from /sys/class/net, whose entries belong to the network namespace sysfs was mounted in. Nothing is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

IFF_UP = 0x1  # linux/if.h
IFF_LOOPBACK = 0x8
# linux/if_arp.h, links without a header of their own: PPP, RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE, IP6GRE, NONE.
_RAW_IP_TYPES = frozenset({512, 519, 768, 769, 776, 778, 823, 0xFFFE})


@dataclass(frozen=True, slots=True)
class NetInterface:
    """One interface.

    Attributes:
        ifindex: the kernel's number of it.
        name: its name.
        is_up: whether it is administratively up.
        is_loopback: whether it is the loopback interface.
        is_raw_ip: whether its frames begin with the IP header (tun, wireguard, ipip) instead of Ethernet's.
    """

    ifindex: int
    name: str
    is_up: bool
    is_loopback: bool
    is_raw_ip: bool = False


def scan(root: str = "/") -> list[NetInterface]:
    """Return the interfaces below `root`, by ifindex; one that vanishes meanwhile is left out."""
    folder = root.rstrip("/") + "/sys/class/net"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []  # a container without sysfs
    found = (read(name, root) for name in names)
    return sorted((interface for interface in found if interface), key=lambda interface: interface.ifindex)


def read(name: str, root: str = "/") -> NetInterface | None:
    """Return one interface, or None where there is none of that name."""
    folder = f"{root.rstrip('/')}/sys/class/net/{name}"
    try:
        ifindex, flags, link_type = (_read_int(f"{folder}/{file}") for file in ("ifindex", "flags", "type"))
    except (OSError, ValueError):
        return None  # gone meanwhile, or no interface at all, like the file bonding_masters
    return NetInterface(ifindex, name, bool(flags & IFF_UP), bool(flags & IFF_LOOPBACK), link_type in _RAW_IP_TYPES)


def above(name: str, root: str = "/") -> list[int]:
    """Return the devices directly above an interface (its bridge, bond, VLANs, macvlans), as far as they are in sight.

    Args:
        name: the interface.
        root: where /sys is.
    """
    folder = f"{root.rstrip('/')}/sys/class/net/{name}"
    try:
        names = [entry.removeprefix("upper_") for entry in os.listdir(folder) if entry.startswith("upper_")]
    except OSError:
        return []
    found = (read(each, root) for each in names)
    return sorted(interface.ifindex for interface in found if interface)


def is_bond(name: str, root: str = "/") -> bool:
    """Return whether an interface is a bond of others (Documentation/networking/bonding.rst)."""
    return os.path.isdir(f"{root.rstrip('/')}/sys/class/net/{name}/bonding")


def choose(interfaces: Iterable[NetInterface], include: Sequence[str], exclude: Sequence[str]) -> list[NetInterface]:
    """Return the interfaces to watch: up, matching a pattern of `include` and none of `exclude`.

    Loopback is watched only where a pattern other than a bare `*` names it.
    """

    def is_wanted(interface: NetInterface) -> bool:
        patterns = [p for p in include if p != "*"] if interface.is_loopback else include
        return interface.is_up and matches(interface.name, patterns) and not matches(interface.name, exclude)

    return [interface for interface in interfaces if is_wanted(interface)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _read_int(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read(), 0)
