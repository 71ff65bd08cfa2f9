"""The `netdev` collector: what each network interface has carried, lost and refused, and the state of its link.

Sources: /proc/net/dev (proc(5)), the counters of every kind of interface in one read, and /sys/class/net
(Documentation/ABI/testing/sysfs-class-net). Both show the network namespace of this process.

* Counters are the kernel's, since the interface was made, and named as the columns of /proc/net/dev. `drop` includes
  the frames the device missed, `frame` every kind of malformed one (dev_seq_printf_stats), unlike `ip -s`, which has
  columns for them.
* An interface is up where it can carry packets: its operstate is `up`, or `unknown`, which is what drivers that cannot
  tell leave it at (lo, tun, wireguard), as the kernel's own netif_oper_up has it.
* What the kernel does not know is left out: the carrier of an interface that is down, the speed of a virtual one.
* One that is gone when its link is looked at is left out; without a sysfs there are counters only.
* Loopback is reported only where a pattern other than a bare `*` names it, as the `ebpf` plugin does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from kon_agent.config.schema import NetdevConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

LOOPBACK = "lo"  # the kernel names it so in every namespace

COUNTERS = (
    *("receive_bytes", "receive_packets", "receive_errs", "receive_drop"),
    *("receive_fifo", "receive_frame", "receive_compressed", "receive_multicast"),
    *("transmit_bytes", "transmit_packets", "transmit_errs", "transmit_drop"),
    *("transmit_fifo", "transmit_colls", "transmit_carrier", "transmit_compressed"),
)
"""The columns of a line, in the kernel's order."""

_NAMES = tuple(f"netdev_{counter}_total" for counter in COUNTERS)
_SYSFS = "/sys/class/net"
_LINK_FILES = ("operstate", "carrier", "carrier_changes", "speed", "mtu")
"""Of which the last can always be read: an interface without it is gone."""

_OPER_UP = (b"up", b"unknown")
_BYTES_PER_MBIT = 1_000_000 // 8
_SPEED_UNKNOWN = 2**32 - 1  # SPEED_UNKNOWN is -1, and was printed unsigned once

Counts = tuple[float, ...]
"""One interface's counters, in the order of COUNTERS."""


class Netdev:
    """Report the counters and the link of every interface the configuration asks for."""

    def __init__(self, config: NetdevConfig, context: Context) -> None:
        self._config = config
        self._context = context
        self._has_sysfs = os.path.isdir(context.path(_SYSFS))

    def collect(self) -> Iterable[Metric]:
        """Return the values of this moment.

        Raises:
            NoData: the kernel has no network, or no interface matches the configuration.
        """
        metrics: list[Metric] = []
        for name, counts in _parse_net_dev(self._read_net_dev()):
            if self._is_wanted(name):
                metrics += self._interface(name, counts)
        if not metrics:
            raise NoData("no network interface matches interfaces and not exclude of the plugin's section")
        return metrics

    def _is_wanted(self, name: str) -> bool:
        patterns = self._config.interfaces
        if name == LOOPBACK:
            patterns = [pattern for pattern in patterns if pattern != "*"]
        return _matches(name, patterns) and not _matches(name, self._config.exclude)

    def _interface(self, name: str, counts: Counts) -> Iterator[Metric]:
        link = self._read_link(name)
        if _LINK_FILES[-1] not in link and self._has_sysfs:
            return
        labels = {"interface": name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")}
        for metric, count in zip(_NAMES, counts, strict=False):
            yield Metric(metric, count, labels, MetricType.NETWORK_PACKETS)
        for metric, value in _link_values(link).items():
            yield Metric(metric, value, labels)

    def _read_net_dev(self) -> bytes:
        return procfs.read(self._context, "/proc/net/dev")

    def _read_link(self, name: str) -> dict[str, bytes]:
        """Return the content of each file about the link that can be read now."""
        found = {}
        for file in _LINK_FILES:
            try:
                found[file] = procfs.read(self._context, f"{_SYSFS}/{name}/{file}").strip()
            except (NoData, OSError):  # EINVAL: not known now; ENOENT, ENODEV: the interface is gone
                continue
        return found


def _parse_net_dev(text: bytes) -> Iterator[tuple[str, Counts]]:
    """Yield each interface's name, undecodable bytes as surrogates so that it still is a path, and its counters."""
    for line in text.decode("utf-8", "surrogateescape").split("\n")[2:]:
        # No name has a colon or a blank (dev_valid_name), and old kernels print no blank after the colon.
        name, colon, counts = line.partition(":")
        if colon:
            yield name.strip(), tuple(map(float, counts.split()))


def _link_values(files: Mapping[str, bytes]) -> dict[str, float]:
    """Return each link metric's value, in base units, from the content of the files there are."""
    values: dict[str, float] = {}
    if "operstate" in files:
        values["netdev_up"] = float(files["operstate"] in _OPER_UP)
    if "carrier" in files:
        values["netdev_carrier"] = float(files["carrier"])
    if "carrier_changes" in files:
        values["netdev_carrier_changes_total"] = float(files["carrier_changes"])
    if "mtu" in files:
        values["netdev_mtu_bytes"] = float(files["mtu"])
    speed_mbit = int(files.get("speed", b"-1"))
    if 0 < speed_mbit < _SPEED_UNKNOWN:
        values["netdev_speed_bytes"] = float(speed_mbit * _BYTES_PER_MBIT)
    return values


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
