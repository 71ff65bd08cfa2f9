"""The watch over the network interfaces: BPF counters attached to those the configuration names, as they come and go.

Owns the loaded object, the link monitor and the published table of interfaces, for as long as one of its two plugins is
wanted: `ebpf`, which reads the counters, and `flows`, which has the same programs count flows as well.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from kon_agent import clock
from kon_agent.bpf import interfaces, layout
from kon_agent.bpf.flowcount import FlowCount
from kon_agent.bpf.handover import Counters
from kon_agent.bpf.hooks import ASKED
from kon_agent.bpf.layout import Interface
from kon_agent.bpf.net import NetCounters
from kon_agent.bpf.origin import Origin
from kon_agent.bpf.selfcost import Statistics, map_costs, program_costs
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import EbpfConfig, FlowsConfig, PluginConfig
from kon_agent.errors import BpfError
from kon_agent.linux import netlink
from kon_agent.supervisor.instruments import Complaint, Herald, Instrument, story_of
from kon_agent.supervisor.sharedpage import SharedPage

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 30  # a program of somebody else's may leave its interface without a word to us
FIRST_RETRY_S = 1  # what was in the way may be gone in a moment: the children of an agent that was killed
ATTACH_BUDGET_NS = NS_PER_S // 10  # per pass of the supervisor's loop, which has others to look after
NEVER_NS = 1 << 62


class NetworkWatch:
    """What the plugins `ebpf` and `flows` are granted.

    Args:
        config: which interfaces to watch.
        herald: who says what does not work.
        selector: of the supervisor's loop: it wakes the watch when a link changes.
        instruments: all there are: what their programs and maps cost is published with the interfaces.
    """

    def __init__(
        self,
        config: EbpfConfig,
        herald: Herald,
        selector: selectors.BaseSelector,
        instruments: Callable[[], Iterable[Instrument]],
    ) -> None:
        self.config = config
        self.inheritance: Literal["none", "kept", "anew"] = "none"  # what became of another supervisor's programs
        self._complaint = Complaint("ebpf reads procfs instead of BPF", herald)
        self._statistics_complaint = Complaint("plugins.ebpf.stats has no effect", herald)
        self._selector = selector
        self._instruments = instruments
        self._statistics: Statistics | None = None
        self._publish_at_ns = 0
        self._users: set[str] = set()
        self._monitor: socket.socket | None = None
        self._counters: NetCounters | None = None
        self._page: SharedPage | None = None
        self._look_at_ns = 0  # the next look at all; due at once while interfaces wait to be attached
        self._thorough_at_ns = 0  # the next one that tries what failed
        self._retry_s = FIRST_RETRY_S

    def use(self, plugin: str) -> None:
        """Watch, for a plugin; where BPF cannot be had, `obstacle` says why."""
        self._users.add(plugin)
        if self._counters is None:
            self._open(None)

    def leave(self, plugin: str) -> None:
        """End the watch if this plugin was the last that needed it."""
        if plugin in self._users:
            self._users.remove(plugin)
            if not self._users:
                self.close()

    def take_over(self, taken: Counters, plugins: Iterable[str]) -> None:
        """Go on with what another supervisor has loaded for these plugins, or replace it."""
        self._users.update(plugins)
        self._open(taken)

    @property
    def obstacle(self) -> str:
        """Why there is no BPF; empty: there is."""
        return self._complaint.reason

    def _open(self, taken: Counters | None) -> None:
        try:
            kept = None if taken is None else NetCounters.adopt(taken)
            self._counters = kept or NetCounters.load()
        except BpfError as err:
            self._complaint.make(story_of(err))
            return
        self._complaint.withdraw()
        if taken is not None:
            self.inheritance = "kept" if kept else "anew"
        try:
            self._page = SharedPage("kon-interfaces", layout.TABLE_BYTES)
            self._monitor = netlink.open_link_monitor()
        except OSError as err:  # no netlink in this sandbox, or no descriptor left; half a watch would be due for ever
            self.close()
            self._complaint.make(f"interfaces cannot be watched: {err}")
            return
        self._selector.register(self._monitor, selectors.EVENT_READ, self._on_change)
        self.refresh()

    @property
    def due_ns(self) -> int:
        """When `tick` has something to do."""
        return min(self._look_at_ns, self._publish_at_ns) if self._counters is not None else NEVER_NS

    def tick(self, now_ns: int) -> None:
        """Look again, or publish what moves, if it is time to."""
        if self._counters is None:
            return
        if now_ns >= self._look_at_ns:
            self._look(now_ns)
        elif now_ns >= self._publish_at_ns:
            self._publish(now_ns)

    def refresh(self) -> None:
        """Look again, as after a change of `config`."""
        self._look(clock.now_ns())

    def _on_change(self) -> None:
        """Look again if a link has changed; where a look is due, `tick` takes it, and the loop pays for one only."""
        now_ns = clock.now_ns()
        if self._monitor is not None and netlink.drain(self._monitor) and now_ns < self._look_at_ns:
            self._look(now_ns)

    def _look(self, now_ns: int) -> None:
        """Bring what is attached up to date; plan the next look."""
        if self._counters is None or self._page is None:
            return
        is_thorough = now_ns >= self._thorough_at_ns
        try:
            is_done = self._bring_up_to_date(self._counters, is_thorough=is_thorough)
        except (BpfError, OSError) as err:
            log.error("the watched interfaces could not be brought up to date: %s", err)
            is_done = True
        self._publish(now_ns)
        self._plan(now_ns, is_thorough=is_thorough and is_done)
        self._look_at_ns = self._thorough_at_ns if is_done else now_ns

    def _publish(self, now_ns: int) -> None:
        """Publish the table of interfaces, and what all programs and maps cost."""
        if self._counters is None or self._page is None:
            return
        # What moves is the programs' time, if it is measured; all else is published when it changes.
        self._publish_at_ns = now_ns + int(self.config.period * NS_PER_S) if self.config.stats else NEVER_NS
        self._switch_statistics()
        programs = list(self._counters.program_fds().items()) if self._statistics else []
        maps = [(f"kon_net.{name}", fd) for name, fd in self._counters.shared_maps.items()]
        for instrument in self._instruments():
            programs += instrument.programs().items() if self._statistics else ()
            maps += instrument.maps().items()
        try:
            self._page.writer.publish(self._counters.table(program_costs(programs), map_costs(maps)))
        except BpfError as err:
            log.error("what BPF costs cannot be told: %s", err)
            self._page.writer.publish(self._counters.table())

    def _switch_statistics(self) -> None:
        """Have the kernel measure our programs, or not, as the configuration says."""
        if self.config.stats and self._statistics is None:
            try:
                self._statistics = Statistics()
            except BpfError as err:
                self._statistics_complaint.make(story_of(err))
        elif not self.config.stats:
            self._end_statistics()

    def _end_statistics(self) -> None:
        self._statistics_complaint.withdraw()
        if self._statistics is not None:
            self._statistics.close()
            self._statistics = None

    def _plan(self, now_ns: int, *, is_thorough: bool) -> None:
        """Set the next thorough look: what failed is tried again soon at first, and then less and less often."""
        lacks = any("none" in (each.ingress_mode, each.egress_mode) for each in self.attachments())
        next_ns = now_ns + (self._retry_s if lacks else LOOK_INTERVAL_S) * NS_PER_S
        self._thorough_at_ns = next_ns if is_thorough else min(self._thorough_at_ns, next_ns)
        if is_thorough:
            self._retry_s = min(2 * self._retry_s, LOOK_INTERVAL_S)

    def _bring_up_to_date(self, counters: NetCounters, *, is_thorough: bool) -> bool:
        """Attach to interfaces that should be watched, detach from those that should not; return whether that is all.

        A driver takes its time (veth: 16 ms) to take a program or let it go: of a burst of interfaces some come first.
        """
        wanted = {
            interface.ifindex: interface.name
            for interface in interfaces.choose(interfaces.scan(), self.config.interfaces, self.config.exclude)
        }
        counters.restrict(self.config.generic)
        watched = counters.watched()
        until_ns = clock.now_ns() + ATTACH_BUDGET_NS
        for ifindex, name in watched.items():
            if wanted.get(ifindex) == name:
                continue
            if clock.now_ns() > until_ns:
                return False
            counters.detach(ifindex)
            log.info("%s is no longer watched", name)
        for ifindex, name in wanted.items():
            if watched.get(ifindex) == name:
                continue
            if clock.now_ns() > until_ns:
                return False
            _tell(counters.attach(ifindex, name))
            self._retry_s = FIRST_RETRY_S
        for attachment in counters.attachments():
            if counters.mend(attachment.ifindex, is_thorough=is_thorough):
                _tell(counters.attachment(attachment.ifindex))
                if clock.now_ns() > until_ns:  # only after what need not be done again: so all have their turn
                    return False
        return True

    def count_flows(self, memory_bytes: int) -> FlowCount:
        """Let programs that count flows as well take the place of the plain ones, on every interface; if there is BPF.

        Raises:
            BpfError: the kernel refuses these programs.
        """
        assert self._counters is not None
        count = FlowCount.load(self._counters.shared_maps, memory_bytes)
        try:
            self._counters.run(count.substitutes)
        except BpfError:
            self._counters.run(None)
            count.close()
            raise
        return count

    def count_no_flows(self) -> None:
        """Put the plain programs back."""
        if self._counters is not None:
            self._counters.run(None)

    def capture(self) -> Counters | None:
        """Return what the code that takes our place needs to go on with; None: nothing is loaded."""
        return None if self._counters is None else self._counters.capture()

    def patterns(self) -> memoryview:
        """Return which interfaces are to be watched, for who has to look for them: the two keys of `ebpf`, as JSON."""
        keys = {"interfaces": self.config.interfaces, "exclude": self.config.exclude}
        return memoryview(msgspec.json.encode(keys))

    def attachments(self) -> list[Interface]:
        """Return every watched interface, and how."""
        return self._counters.attachments() if self._counters else []

    def grants(self) -> dict[str, memoryview]:
        """Map the counters and the table of interfaces. Called in a worker before the drop."""
        if self._counters is None or self._page is None:
            return Origin.without_bpf(self.obstacle).grant()
        return {
            "counters": self._counters.map_counters(),
            "interfaces": self._page.map_readonly(),
            **Origin("bpf").grant(),
        }

    def close(self) -> None:
        """Detach everything."""
        self._complaint.withdraw()
        self._end_statistics()
        with contextlib.ExitStack() as stack:
            if self._page is not None:
                stack.callback(self._page.release)
            if self._monitor is not None:
                stack.callback(self._monitor.close)
                self._selector.unregister(self._monitor)
            if self._counters is not None:
                stack.callback(self._counters.close)
        self._counters = self._page = self._monitor = None


class Counting(Instrument):
    """The counters of the plugin `ebpf`.

    Args:
        network: the watch.
    """

    def __init__(self, network: NetworkWatch) -> None:
        self._network = network

    def open(self, config: PluginConfig) -> None:
        """Have the interfaces watched."""
        self._network.use("ebpf")

    def grants(self) -> Mapping[str, memoryview]:
        """Map the counters."""
        return self._network.grants()

    def close(self) -> None:
        """Let the watch go."""
        self._network.leave("ebpf")


class Flowing(Instrument):
    """The programs and the table of the plugin `flows`.

    Args:
        network: the watch, whose programs they replace.
        herald: who says what does not work.
    """

    def __init__(self, network: NetworkWatch, herald: Herald) -> None:
        self._network = network
        self._complaint = Complaint("flows reads procfs instead of BPF", herald)
        self._count: FlowCount | None = None
        self._memory = 0

    def open(self, config: PluginConfig) -> None:
        """Have the interfaces watched by programs that count flows as well, in a table of the size asked for."""
        assert isinstance(config, FlowsConfig)
        self._network.use("flows")
        if self._count is not None and self._memory == config.memory:
            return
        self._unload()
        if self._network.obstacle:
            self._complaint.make(self._network.obstacle)
            return
        try:
            self._count, self._memory = self._network.count_flows(int(config.memory)), int(config.memory)
            self._complaint.withdraw()
        except BpfError as err:
            self._complaint.make(story_of(err))

    def grants(self) -> Mapping[str, memoryview]:
        """Map the counters and the table of flows."""
        if self._count is None:
            # The totals may be there all the same.
            return {
                **self._network.grants(),
                **Origin.without_bpf(self._complaint.reason).grant(),
                "patterns": self._network.patterns(),
            }
        return {**self._network.grants(), "flows": self._count.map_table(), **self._count.origin.grant()}

    def close(self) -> None:
        """Put the plain programs back, and let the watch go."""
        self._unload()
        self._complaint.withdraw()
        self._network.leave("flows")

    def programs(self) -> Mapping[str, int]:
        """Return those that count flows."""
        return self._count.programs if self._count is not None else {}

    def maps(self) -> Mapping[str, int]:
        """Return the table's."""
        return self._count.maps if self._count is not None else {}

    def _unload(self) -> None:
        if self._count is not None:
            self._network.count_no_flows()
            self._count.close()
            self._count = None


def _tell(attached: Interface) -> None:
    how = f"ingress {attached.ingress_mode}, egress {attached.egress_mode}"
    reasons = "; ".join(reason for reason in (attached.ingress_reason, attached.egress_reason) if reason)
    log.log(
        logging.WARNING if reasons not in ("", ASKED) else logging.INFO,
        "watching %s: %s%s",
        attached.name,
        how,
        reasons and f" ({reasons})",
    )
