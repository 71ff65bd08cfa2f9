"""The watch over the network interfaces: BPF counters attached to those the configuration names, as they come and go.

Owns the loaded object, the link monitor and the published table of interfaces. Without BPF it says why and is empty.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Mapping
from typing import Literal

from kon_agent.bpf import interfaces, layout
from kon_agent.bpf.handover import Counters
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.config.schema import EbpfConfig
from kon_agent.errors import BpfError
from kon_agent.linux import netlink, privileges
from kon_agent.supervisor.sharedpage import SharedPage

log = logging.getLogger(__name__)

MAX_OBSTACLE_CHARS = 300  # a line in a log and a status: the verifier's whole story would fill both


class NetworkWatch:
    """What the `ebpf` plugin is granted.

    Args:
        config: which interfaces to watch.
    """

    def __init__(self, config: EbpfConfig) -> None:
        self.config = config
        self.obstacle = ""
        self.origin: Literal["none", "kept", "anew"] = "none"  # where the loaded object comes from
        self.monitor: socket.socket | None = None
        self._counters: NetCounters | None = None
        self._page: SharedPage | None = None

    def open(self, taken: Counters | None = None) -> None:
        """Load the object and attach it, or go on with one `taken` over; where that cannot be, `obstacle` says why."""
        try:
            kept = None if taken is None else NetCounters.adopt(taken)
            self._counters = kept or NetCounters.load()
            self.origin = "anew" if kept is None else "kept"
        except BpfError as err:
            lacking = privileges.current_privileges().missing("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")
            needs = f"{', '.join(lacking)} is missing; " if lacking else ""
            self.obstacle = (needs + " | ".join(str(err).splitlines()))[:MAX_OBSTACLE_CHARS]
            return
        self._page = SharedPage("kon-interfaces", layout.TABLE_BYTES)
        self.monitor = netlink.open_link_monitor()
        self.refresh()

    def on_change(self) -> None:
        """The link monitor is readable: look again if a link changed."""
        if self.monitor is not None and netlink.drain(self.monitor):
            try:
                self.refresh()
            except BpfError as err:
                log.error("the watched interfaces could not be brought up to date: %s", err)

    def refresh(self) -> None:
        """Attach to interfaces that should be watched, detach from those that should not, publish the result."""
        if self._counters is None or self._page is None:
            return
        wanted = {
            interface.ifindex: interface.name
            for interface in interfaces.choose(interfaces.scan(), self.config.interfaces, self.config.exclude)
        }
        watched = {attachment.ifindex: attachment.name for attachment in self._counters.attachments()}
        for ifindex, name in watched.items():
            if wanted.get(ifindex) != name:
                self._counters.detach(ifindex)
                log.info("%s is no longer watched", name)
        for ifindex, name in wanted.items():
            if watched.get(ifindex) != name:
                _tell(self._counters.attach(ifindex, name))
        self._page.writer.publish(self._counters.table())

    def capture(self) -> Counters | None:
        """Return what the code that takes our place needs to go on with; None: nothing is loaded."""
        return None if self._counters is None else self._counters.capture()

    def attachments(self) -> list[Interface]:
        """Return every watched interface, and how."""
        return self._counters.attachments() if self._counters else []

    def grants(self) -> Mapping[str, memoryview]:
        """Return the shared memory of the `ebpf` plugin. Called in its worker before the drop."""
        if self._counters is None or self._page is None:
            return {}
        return {"counters": self._counters.map_counters(), "interfaces": self._page.map_readonly()}

    def close(self) -> None:
        """Detach everything."""
        with contextlib.ExitStack() as stack:
            if self._page is not None:
                stack.callback(self._page.release)
            if self.monitor is not None:
                stack.callback(self.monitor.close)
            if self._counters is not None:
                stack.callback(self._counters.close)
        self._counters = self._page = self.monitor = None


def _tell(attached: Interface) -> None:
    how = f"ingress {attached.ingress_mode}, egress {attached.egress_mode}"
    reasons = "; ".join(reason for reason in (attached.ingress_reason, attached.egress_reason) if reason)
    log.log(
        logging.WARNING if reasons else logging.INFO,
        "watching %s: %s%s",
        attached.name,
        how,
        reasons and f" ({reasons})",
    )
