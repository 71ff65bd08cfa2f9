"""The top talkers: which flows have carried most since the last cycle, and how much all others together.

The kernel counts packets to flows (ebpf/kon_flows.bpf.c) in a table of bounded size, and to interfaces, as ever. This
worker maps both and reads them without a system call:

    flow_bytes, flow_packets    {interface, direction, protocol, src, src_port, dst, dst_port}    of one interval
    flow_bytes, flow_packets    {interface, direction, flow="other"}                              the rest of it
    flow_interface_bytes_total, flow_interface_packets_total    {interface, direction}            all there ever was
    flow_interval_seconds
    flow_table_entries, flow_table_bytes, flow_inserts_total, flow_evictions_total, flow_suppressed_total

Invariants:
* For each interface and direction, what a cycle reports of flows and of `other` adds up to exactly what
  flow_interface_…_total has grown by since the cycle before, and nothing is negative.
* That can be so although packets come while this reads: the totals are read before the flows and once more after
  them, and a cycle's total is one between the two: the first, or more if the flows come to more. So what a flow carries
  is not reported as `other` for having come at the wrong moment. But the kernel counts a packet to the total first:
  what a total held in the last cycle already and its flow did not was `other` then. Where the flows do not fit the
  growth for that, one of them waits for it until the next cycle.
* No more than `top` flows in a cycle, and no more than `max_series` in an hour that were not there in the hour before:
  others stay in `other`, and are counted in flow_suppressed_total.

Where there is no table, all is `other`; a direction without BPF is read from procfs, and has the label source="procfs".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from kon_agent.bpf import layout
from kon_agent.bpf.flows import Amount, Flow, FlowTable, Reading, decode_key
from kon_agent.bpf.origin import origin_of
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import EbpfConfig, FlowsConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageReader
from kon_agent.plugins.context import Context
from kon_agent.plugins.netproc import SOURCE, NetProc
from kon_agent.plugins.probed import origin_metrics

NONE = Amount(0, 0)
HOUR_NS = 3600 * NS_PER_S
KNOWN_PER_SERIES = 10  # so many flows are remembered for each that may be new in an hour: a flow is some 200 bytes

_PROCFS_TOTALS = {"network_bytes_total": 0, "network_packets_total": 1}  # place in an Amount


@dataclass(frozen=True, slots=True)
class Line:
    """One interface's one direction at one reading.

    Attributes:
        interface, direction: whose.
        owner: the same as long as the total goes on.
        total: what was counted in all, at least.
        ceiling: what it cannot have been more than.
        place: first row and direction as the keys of flows have them; None: no flow is counted here.
        source: a label, where it is not BPF.
    """

    interface: str
    direction: str
    owner: tuple[object, ...]
    total: Amount
    ceiling: Amount
    place: tuple[int, int] | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """How a line's growth is divided.

    Attributes:
        flows: key to what is reported of a flow.
        other: the rest.
        owed: key to what a flow must wait for.
    """

    flows: dict[bytes, Amount]
    other: Amount
    owed: dict[bytes, Amount]

    @property
    def growth(self) -> Amount:
        """All that is reported: what the line has grown by."""
        return _sum([*self.flows.values(), self.other])


class Admission:
    """Decides which flows may be reported: those known for the last hour, and so many new ones per hour.

    Args:
        max_series: how many.
    """

    def __init__(self, max_series: int) -> None:
        self._max_series = max_series
        self._admitted: deque[int] = deque()
        self._known: dict[object, int] = {}  # least recently reported first

    def admits(self, series: object, now_ns: int) -> bool:
        """Return whether a flow may be reported now; if so, it has been."""
        self._forget(now_ns)
        if self._known.pop(series, None) is None:
            if len(self._admitted) >= self._max_series:
                return False
            self._admitted.append(now_ns)
        self._known[series] = now_ns
        return True

    def _forget(self, now_ns: int) -> None:
        while self._admitted and self._admitted[0] <= now_ns - HOUR_NS:
            self._admitted.popleft()
        while self._known:
            oldest = next(iter(self._known))
            if self._known[oldest] > now_ns - HOUR_NS and len(self._known) < KNOWN_PER_SERIES * self._max_series:
                break
            del self._known[oldest]


class Flows:
    """The collector.

    Args:
        config: the plugin's section.
        context: with the grants `flows`, `counters` and `interfaces` where BPF can be had; else with `patterns`: which
            interfaces to look for, as the keys of `plugins.ebpf` say it.
    """

    def __init__(self, config: FlowsConfig, context: Context) -> None:
        self._top = config.top
        self._context = context
        self._origin = origin_of(context.grants)
        self._counters = context.grants.get("counters")
        self._entries = context.grants.get("flows")
        page = context.grants.get("interfaces")
        self._page = PageReader(page) if page is not None and self._counters is not None else None
        patterns = context.grants.get("patterns", b"{}")
        self._procfs = NetProc(msgspec.json.decode(patterns, type=EbpfConfig), context)
        self._table: FlowTable | None = None
        self._admission = Admission(config.max_series)
        self._last: dict[tuple[str, str], Line] = {}
        self._last_ns = 0
        self._owed: dict[bytes, Amount] = {}
        self._suppressed = 0

    def collect(self) -> Iterable[Metric]:
        """Return the last interval's flows, from the second cycle on, and the totals.

        Raises:
            BpfError: what was granted is not what a supervisor grants.
        """
        now_ns = self._context.now_ns()
        interfaces = self._read_interfaces()
        lines = list(self._read_lines(interfaces))
        reading = self._read_flows(interfaces)
        again = self._read_lines(interfaces) if reading else ()
        after = {(line.interface, line.direction): line.total for line in again}
        lines = [replace(line, ceiling=after.get((line.interface, line.direction), line.total)) for line in lines]
        shares = self._divide(lines, reading.grown if reading else {}, now_ns)
        lines = [replace(line, total=self._total(line, share)) for line, share in zip(lines, shares, strict=True)]
        metrics = [*origin_metrics("flows", self._origin), *_totals(lines)]
        if self._last_ns:
            seconds = (now_ns - self._last_ns) / NS_PER_S
            metrics.append(Metric("flow_interval_seconds", seconds, {}, MetricType.NETWORK_PACKETS))
        for line, share in zip(lines, shares, strict=True):
            metrics += _share_metrics(line, share)
        if reading and self._table:
            metrics += _table_metrics(reading, self._table.size_bytes, self._suppressed)
        self._last |= {(line.interface, line.direction): line for line in lines}
        self._forget({interface.name for interface in interfaces.interfaces})
        self._last_ns = now_ns
        return metrics

    def _read_interfaces(self) -> layout.Table:
        payload = self._page.read() if self._page else None
        return layout.decode(payload) if payload else self._procfs.table(self._origin.reason)

    def _read_flows(self, interfaces: layout.Table) -> Reading | None:
        if self._entries is None or self._page is None or interfaces.cpus < 1:
            return None
        if self._table is None:
            self._table = FlowTable(self._entries, interfaces.cpus)
        return self._table.read(self._top)

    def _read_lines(self, table: layout.Table) -> Iterator[Line]:
        for interface in table.interfaces:
            if interface.slot >= 0 and self._counters is not None:
                counts = layout.read_slot(self._counters, interface.slot, table.cpus, interface.base)
                yield from _counted(interface, counts, table.cpus)
        yield from _from_procfs(self._procfs.interfaces(table))

    def _divide(self, lines: Sequence[Line], grown: Mapping[bytes, Amount], now_ns: int) -> list[Share | None]:
        """Return every line's flows and the rest; None for a line that is new."""
        growths = [self._growth(line) for line in lines]
        grew = [line for line, growth in zip(lines, growths, strict=True) if growth is not None]
        chosen = self._choose({line.place: line for line in grew}, grown, now_ns)
        shares: list[Share | None] = []
        self._owed = {}
        for line, growth in zip(lines, growths, strict=True):
            share = divide(*growth, chosen.get(line.place, {}) if line.place else {}) if growth else None
            self._owed |= share.owed if share else {}
            shares.append(share)
        return shares

    def _total(self, line: Line, share: Share | None) -> Amount:
        return line.total if share is None else _sum((self._last[line.interface, line.direction].total, share.growth))

    def _growth(self, line: Line) -> tuple[Amount, Amount] | None:
        """Return what a line has counted since the last cycle, at least and at most; None where it is new."""
        last = self._last.get((line.interface, line.direction))
        if last is None or last.owner != line.owner or min(growth := _less(line.total, last.total)) < 0:
            return None
        return growth, _less(line.ceiling, last.total)

    def _choose(
        self, lines: Mapping[tuple[int, int] | None, Line], grown: Mapping[bytes, Amount], now_ns: int
    ) -> dict[tuple[int, int] | None, dict[bytes, Amount]]:
        """Return the flows to be reported, by line."""
        amounts = {**grown}
        for key, owed in self._owed.items():
            amounts[key] = _sum((owed, amounts.get(key, NONE)))
        chosen: dict[tuple[int, int] | None, dict[bytes, Amount]] = {}
        for key in sorted(amounts, key=amounts.__getitem__, reverse=True)[: self._top]:
            flow = decode_key(key)
            place = flow.first_row, flow.direction
            line = lines.get(place)
            if line is None:
                continue
            if self._admission.admits((line.interface, key), now_ns):
                chosen.setdefault(place, {})[key] = amounts[key]
            else:
                self._suppressed += 1
        return chosen

    def _forget(self, present: set[str]) -> None:
        """Forget lines of interfaces that are gone, once there are as many as interfaces can be."""
        if len(self._last) > 2 * layout.MAX_LISTED * len(layout.DIRECTIONS):
            self._last = {key: line for key, line in self._last.items() if line.interface in present}


def divide(growth: Amount, most: Amount, flows: Mapping[bytes, Amount]) -> Share:
    """Divide what a line has counted in an interval among its flows and the rest.

    Args:
        growth: of the line, at least.
        most: what it cannot have grown by more than.
        flows: key to what each flow has counted.
    """
    owed_bytes = _deficit(most.bytes, {key: amount.bytes for key, amount in flows.items()})
    owed_packets = _deficit(most.packets, {key: amount.packets for key, amount in flows.items()})
    owed = {key: Amount(owed_bytes.get(key, 0), owed_packets.get(key, 0)) for key in {**owed_bytes, **owed_packets}}
    given = {key: _less(amount, owed.get(key, NONE)) for key, amount in flows.items()}
    rest = _less(growth, _sum(given.values()))
    other = Amount(max(0, rest.bytes), max(0, rest.packets))
    return Share({key: amount for key, amount in given.items() if any(amount)}, other, owed)


def _deficit(most: int, counted: Mapping[bytes, int]) -> dict[bytes, int]:
    """Return how much must wait, by flow, the largest first, for the rest not to exceed `most`."""
    missing = sum(counted.values()) - most
    owed: dict[bytes, int] = {}
    for key in sorted(counted, key=lambda key: counted[key], reverse=True):
        if missing <= 0:
            break
        owed[key] = min(missing, counted[key])
        missing -= owed[key]
    return owed


def _less(amount: Amount, other: Amount) -> Amount:
    return Amount(amount.bytes - other.bytes, amount.packets - other.packets)


def _sum(amounts: Iterable[Amount]) -> Amount:
    size = packets = 0
    for amount in amounts:
        size, packets = size + amount.bytes, packets + amount.packets
    return Amount(size, packets)


def _counted(interface: layout.Interface, counts: layout.Counts, cpus: int) -> Iterator[Line]:
    modes = (interface.ingress_mode, interface.egress_mode)
    for number, (direction, mode) in enumerate(zip(layout.DIRECTIONS, modes, strict=True)):
        if mode != "none":
            total = _sum(Amount(size, packets) for (d, _), (packets, size) in counts.items() if d == direction)
            owner = (interface.slot, interface.ifindex, tuple(interface.base))
            yield Line(interface.name, direction, owner, total, total, (interface.slot * cpus, number))


def _from_procfs(metrics: Iterable[Metric]) -> Iterator[Line]:
    totals: dict[tuple[str, str], list[int]] = {}
    for metric in metrics:
        if metric.name in _PROCFS_TOTALS:
            total = totals.setdefault((metric.labels["interface"], metric.labels["direction"]), [0, 0])
            total[_PROCFS_TOTALS[metric.name]] += int(metric.value)
    for (interface, direction), total in totals.items():
        amount = Amount(*total)
        yield Line(interface, direction, ("procfs",), amount, amount, source=SOURCE["source"])


def _line_labels(line: Line) -> dict[str, str]:
    labels = {"interface": line.interface, "direction": line.direction}
    return {**labels, "source": line.source} if line.source else labels


def _flow_labels(line: Line, flow: Flow) -> dict[str, str]:
    labels = {**_line_labels(line), "protocol": flow.protocol, "src": flow.source}
    if not flow.has_ports:
        return {**labels, "dst": flow.destination}
    ports = {"src_port": str(flow.source_port), "dst": flow.destination, "dst_port": str(flow.destination_port)}
    return {**labels, **ports}


def _amounts(labels: Mapping[str, str], amount: Amount) -> Iterator[Metric]:
    yield Metric("flow_bytes", float(amount.bytes), labels, MetricType.NETWORK_PACKETS)
    yield Metric("flow_packets", float(amount.packets), labels, MetricType.NETWORK_PACKETS)


def _share_metrics(line: Line, share: Share | None) -> Iterator[Metric]:
    if share is None:
        return
    for key, amount in share.flows.items():
        yield from _amounts(_flow_labels(line, decode_key(key)), amount)
    yield from _amounts({**_line_labels(line), "flow": "other"}, share.other)


def _totals(lines: Iterable[Line]) -> Iterator[Metric]:
    for line in lines:
        labels = _line_labels(line)
        yield Metric("flow_interface_bytes_total", float(line.total.bytes), labels, MetricType.NETWORK_PACKETS)
        yield Metric("flow_interface_packets_total", float(line.total.packets), labels, MetricType.NETWORK_PACKETS)


def _table_metrics(reading: Reading, table_bytes: int, suppressed: int) -> Iterator[Metric]:
    figures = {
        "flow_table_entries": reading.entries,
        "flow_table_bytes": table_bytes,
        "flow_inserts_total": reading.inserts,
        "flow_evictions_total": reading.evictions,
        "flow_suppressed_total": suppressed,
    }
    for name, figure in figures.items():
        yield Metric(name, float(figure), {}, MetricType.AGENT_TELEMETRY)
