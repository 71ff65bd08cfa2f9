"""kon_agent.plugins.flows: flows and the rest are the total, exactly, whatever the kernel does meanwhile."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kon_agent.bpf import flows as table
from kon_agent.bpf import layout
from kon_agent.bpf.flows import Amount
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import FlowsConfig
from kon_agent.metric import Metric, MetricType
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins import flows
from kon_agent.plugins.context import Context
from kon_agent.plugins.flows import HOUR_NS, Admission, Flows, divide
from tests.support.flow_kernel import FlowKernel, key

ETH0 = layout.Interface(0, 2, "eth0", "native", "", "tcx", "")
ETH1 = layout.Interface(1, 3, "eth1", "generic", "EOPNOTSUPP", "none", "EINVAL: old")

NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier ...
  eth0: {} 10 0 0 0 0 0 0 {} 5 0 0 0 0 0 0
"""


class Host:
    """A supervisor's grants over a model kernel; the clock moves 5 s between cycles.

    Attributes:
        kernel: what counts.
    """

    def __init__(
        self, *interfaces: layout.Interface, cpus: int = 2, buckets: int = 64, root: str = "/nowhere", **config: int
    ) -> None:
        self.kernel = FlowKernel(cpus, buckets)
        self._cpus = cpus
        self._page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
        self.publish(*interfaces)
        grants = {
            "flows": memoryview(self.kernel.memory).toreadonly(),
            "counters": memoryview(bytes(64)),
            "interfaces": self._page.toreadonly(),
            **Origin("bpf", created_ns=1).grant(),
        }
        self._now_ns = 0
        context = Context(root=root, now_ns=lambda: self._now_ns, grants=grants)
        self.collector = Flows(FlowsConfig(**config), context)  # type: ignore[arg-type]

    def publish(self, *interfaces: layout.Interface) -> None:
        PageWriter(self._page).publish(layout.encode(layout.Table(self._cpus, list(interfaces))))

    def read_slot(self, counters: memoryview, slot: int, cpus: int, base: Any = ()) -> layout.Counts:
        """Stand in for layout.read_slot, whose layout is its own tests' affair."""
        counts = {}
        for number, direction in enumerate(layout.DIRECTIONS):
            size, packets = self.kernel.totals[slot * cpus, number]
            counts[direction, "udp"] = (packets // 2, size // 2)
            counts[direction, "tcp"] = (packets - packets // 2, size - size // 2)
        return counts

    def collect(self, after_s: float = 5.0) -> list[Metric]:
        self._now_ns += int(after_s * 1e9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "read_slot", self.read_slot)
            return list(self.collector.collect())


def values(metrics: list[Metric], name: str) -> dict[tuple[str, ...], float]:
    return {tuple(metric.labels.values()): metric.value for metric in metrics if metric.name == name}


def one(metrics: list[Metric], name: str) -> float:
    (value,) = (metric.value for metric in metrics if metric.name == name)
    return value


def by_line(metrics: list[Metric], name: str) -> dict[tuple[str, str], float]:
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for metric in metrics:
        if metric.name == name:
            sums[metric.labels["interface"], metric.labels["direction"]] += metric.value
    return dict(sums)


def test_a_flow_and_the_rest_are_the_interval() -> None:
    """The largest by name, the others together, by interface and direction."""
    host = Host(ETH0, top=1)
    host.collect()
    host.kernel.count(0, key(1), 1500, packets=2)
    host.kernel.count(1, key(2), 60)
    host.kernel.count(1, key(3, direction=1), 40)
    metrics = host.collect()
    assert {
        ("eth0", "ingress", "udp", "10.0.0.1", "1000", "192.0.2.1", "53"): 1500.0,
        ("eth0", "ingress", "other"): 60.0,
        ("eth0", "egress", "other"): 40.0,
    } == values(metrics, "flow_bytes")
    assert 2.0 == values(metrics, "flow_packets")["eth0", "ingress", "udp", "10.0.0.1", "1000", "192.0.2.1", "53"]
    (labels,) = (dict(each.labels) for each in metrics if each.name == "flow_bytes" and "src" in each.labels)
    assert ["interface", "direction", "protocol", "src", "src_port", "dst", "dst_port"] == list(labels)
    assert {("eth0", "ingress"): 1560.0, ("eth0", "egress"): 40.0} == values(metrics, "flow_interface_bytes_total")
    assert 5.0 == one(metrics, "flow_interval_seconds")
    assert {MetricType.NETWORK_PACKETS} == {each.type for each in metrics if each.name == "flow_bytes"}


def test_the_first_cycle_has_totals_but_no_interval() -> None:
    """Nothing is reported of what was before; it is not empty all the same."""
    host = Host(ETH0)
    host.kernel.count(0, key(1), 1500)
    metrics = host.collect()
    assert {} == values(metrics, "flow_bytes")
    assert {("eth0", "ingress"): 1500.0, ("eth0", "egress"): 0.0} == values(metrics, "flow_interface_bytes_total")
    assert {("flows", "bpf", ""): 1.0} == values(metrics, "ebpf_source")


def test_a_protocol_without_ports_has_none() -> None:
    """Two labels fewer."""
    host = Host(ETH0)
    host.collect()
    host.kernel.count(0, key(1, protocol=1), 98)
    assert ("eth0", "ingress", "icmp", "10.0.0.1", "192.0.2.1") in values(host.collect(), "flow_bytes")


def test_the_table_reports_on_itself() -> None:
    """Entries, inserts, evictions, and its memory with both maps."""
    host = Host(ETH0, cpus=1, buckets=1)
    for flow in range(10):
        host.kernel.count(0, key(flow), 60)
    metrics = host.collect()
    names = ("flow_table_entries", "flow_inserts_total", "flow_evictions_total", "flow_suppressed_total")
    assert [8.0, 10.0, 2.0, 0.0] == [one(metrics, name) for name in names]
    assert 9 * 64.0 == one(metrics, "flow_table_bytes")


def test_an_interface_in_a_slot_of_another_begins_anew() -> None:
    """What the slot counted for its former owner is nobody's, and the sum is right from the next cycle on."""
    host = Host(ETH0)
    host.collect()
    host.kernel.count(0, key(1), 1500)
    host.publish(layout.Interface(0, 9, "veth9", "native", "", "none", "", [1] * layout.BASE_WORDS))
    assert {} == values(host.collect(), "flow_bytes")
    host.kernel.count(0, key(1), 700)
    assert {("veth9", "ingress"): 700.0} == by_line(host.collect(), "flow_bytes")


def test_whoever_has_the_slot_now_owes_nothing_to_whom_it_was_taken_from() -> None:
    """An interface made anew under its name has a slot with a higher total: none of the difference is an interval's."""
    host = Host(ETH0)
    host.collect()
    host.kernel.count(0, key(1, first_row=2), 1000)
    host.publish(layout.Interface(1, 9, "eth0", "native", "", "tcx", ""))
    assert {} == values(host.collect(), "flow_bytes")
    host.kernel.count(0, key(1, first_row=2), 30)
    assert {("eth0", "ingress"): 30.0, ("eth0", "egress"): 0.0} == by_line(host.collect(), "flow_bytes")


def test_procfs_that_begins_anew_is_no_negative_interval(tmp_path: Path) -> None:
    """An interface made anew begins at zero: that cycle has its totals only, the next one is as ever."""
    (tmp_path / "proc/net").mkdir(parents=True)
    dev = tmp_path / "proc/net/dev"
    collector = Flows(FlowsConfig(), Context(root=str(tmp_path)))
    counted = []
    for received in (1000, 10, 15):
        dev.write_text(NET_DEV.format(received, received), encoding="ascii")
        counted.append(by_line(list(collector.collect()), "flow_bytes"))
    assert [{}, {}, {("eth0", "ingress"): 5.0, ("eth0", "egress"): 5.0}] == counted


def test_an_interface_that_was_away_has_counted_on() -> None:
    """The growth is that since its last reading; the flows in between are in other."""
    host = Host(ETH0)
    host.collect()
    host.publish()
    host.kernel.count(0, key(1), 1500)
    host.collect()
    host.publish(ETH0)
    metrics = host.collect()
    assert {("eth0", "ingress", "other"): 1500.0, ("eth0", "egress", "other"): 0.0} == values(metrics, "flow_bytes")


def test_new_flows_are_limited_by_the_hour() -> None:
    """The second flow of an hour with one series stays in other and is counted, until the hour is over."""
    host = Host(ETH0, max_series=1)
    host.collect()
    host.kernel.count(0, key(1), 60)
    assert 2 == len([each for each in values(host.collect(), "flow_bytes") if "ingress" in each])
    host.kernel.count(0, key(2), 50)
    metrics = host.collect()
    assert 50.0 == values(metrics, "flow_bytes")["eth0", "ingress", "other"]
    assert 1.0 == one(metrics, "flow_suppressed_total")
    host.kernel.count(0, key(2), 40)
    metrics = host.collect(after_s=3600)
    assert 0.0 == values(metrics, "flow_bytes")["eth0", "ingress", "other"]
    assert 1.0 == one(metrics, "flow_suppressed_total")


def test_a_known_flow_needs_no_admission() -> None:
    """As long as it was reported in the last hour; then it is new again."""
    admission = Admission(1)
    assert admission.admits("a", 0)
    assert admission.admits("a", HOUR_NS - 1)
    assert not admission.admits("b", HOUR_NS - 1)
    assert admission.admits("a", 2 * HOUR_NS - 2)
    assert admission.admits("b", 2 * HOUR_NS - 2)
    assert not admission.admits("c", 3 * HOUR_NS - 3)
    assert admission.admits("a", 3 * HOUR_NS - 3)


def test_admission_remembers_a_bounded_number() -> None:
    """However many flows there are in years."""
    admission = Admission(2)
    for hour in range(100):
        for each in range(2):
            assert admission.admits((hour, each), (hour + 1) * HOUR_NS)
    assert len(admission._known) <= 2 * flows.KNOWN_PER_SERIES


def test_without_a_table_all_is_other() -> None:
    """The programs that count flows could not be loaded; the totals are BPF's."""
    host = Host(ETH0)
    host.collector._entries = None
    host.collect()
    host.kernel.count(0, key(1), 60)
    metrics = host.collect()
    assert {("eth0", "ingress", "other"): 60.0, ("eth0", "egress", "other"): 0.0} == values(metrics, "flow_bytes")
    assert not [each for each in metrics if each.name.startswith("flow_table")]


def test_without_bpf_procfs_is_other(tmp_path: Path) -> None:
    """/proc/net/dev, with source="procfs", and why."""
    (tmp_path / "proc/net").mkdir(parents=True)
    dev = tmp_path / "proc/net/dev"
    dev.write_text(NET_DEV.format(1000, 500), encoding="ascii")
    collector = Flows(FlowsConfig(), Context(root=str(tmp_path)))
    first = list(collector.collect())
    dev.write_text(NET_DEV.format(1300, 510), encoding="ascii")
    metrics = list(collector.collect())
    assert {("eth0", "ingress", "procfs"): 1000.0, ("eth0", "egress", "procfs"): 500.0} == values(
        first, "flow_interface_bytes_total"
    )
    assert {("eth0", "ingress", "procfs", "other"): 300.0, ("eth0", "egress", "procfs", "other"): 10.0} == values(
        metrics, "flow_bytes"
    )
    assert {("flows", "procfs", "no BPF is granted here"): 1.0} == values(metrics, "ebpf_source")


def test_without_bpf_the_patterns_choose(tmp_path: Path) -> None:
    """Those of plugins.ebpf, as the supervisor grants them."""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/dev").write_text(NET_DEV.format(1000, 500), encoding="ascii")
    grants = {"patterns": memoryview(b'{"interfaces":["*"],"exclude":["eth*"]}')}
    metrics = list(Flows(FlowsConfig(), Context(root=str(tmp_path), grants=grants)).collect())
    assert {} == values(metrics, "flow_interface_bytes_total")
    assert {("flows", "procfs", "no BPF is granted here"): 1.0} == values(metrics, "ebpf_source")


def test_a_direction_without_a_program_is_procfs(tmp_path: Path) -> None:
    """The other direction goes on with BPF."""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/dev").write_text(NET_DEV.format(1000, 500).replace("eth0", "eth1"), encoding="ascii")
    host = Host(ETH1, root=str(tmp_path))
    totals = values(host.collect(), "flow_interface_bytes_total")
    assert {("eth1", "ingress"): 0.0, ("eth1", "egress", "procfs"): 500.0} == totals


AMOUNTS = st.builds(Amount, st.integers(0, 1000), st.integers(0, 10))


@given(AMOUNTS, AMOUNTS, st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), AMOUNTS))
def test_a_line_is_divided_within_its_bounds(growth: Amount, more: Amount, counted: dict[bytes, Amount]) -> None:
    """Given and owed are the flow's; given and other are within the bounds; only what exceeds the upper one waits."""
    most = Amount(growth.bytes + more.bytes, growth.packets + more.packets)
    share = divide(growth, most, counted)
    for place in range(2):
        given_to = {name: amount[place] for name, amount in share.flows.items()}
        owed = {name: amount[place] for name, amount in share.owed.items()}
        assert growth[place] <= share.growth[place] <= most[place]
        assert share.other[place] == max(0, growth[place] - sum(given_to.values()))
        assert all(counted[name][place] == given_to.get(name, 0) + owed.get(name, 0) for name in counted)
        assert min([*given_to.values(), *owed.values(), share.other[place]]) >= 0
        assert max(0, sum(amount[place] for amount in counted.values()) - most[place]) == sum(owed.values())


def test_a_burst_that_comes_while_it_reads_is_its_flow_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the totals and the flows two flows send: it is theirs, nothing of it is `other`, and the sum is exact."""
    host = Host(ETH0)
    before = by_line(host.collect(), "flow_interface_bytes_total")
    read = table.FlowTable.read

    def late(self: table.FlowTable, top: int) -> table.Reading:
        host.kernel.count(0, key(1), 1_000_000, 1000)
        host.kernel.count(1, key(2), 2_000_000, 2000)
        return read(self, top)

    monkeypatch.setattr(table.FlowTable, "read", late)
    metrics = host.collect()
    named = [each.value for each in metrics if each.name == "flow_bytes" and "src" in each.labels]
    others = [each.value for each in metrics if each.name == "flow_bytes" and "flow" in each.labels]
    assert ([1e6, 2e6], {0.0}) == (sorted(named), set(others))
    after = by_line(metrics, "flow_interface_bytes_total")
    assert {line: after[line] - before[line] for line in after} == by_line(metrics, "flow_bytes")


class Race:
    """Packets on two CPUs whose stores fall anywhere between the reader's own steps."""

    def __init__(self, seed: int, buckets: int, top: int) -> None:
        self.random = random.Random(seed)
        self.host = Host(ETH0, ETH1, cpus=2, buckets=buckets, top=top)
        self._running: list[Iterator[None]] = [iter(()), iter(())]

    def advance(self, stores: int) -> None:
        """Let the CPUs do so many stores; each ends a packet before it begins the next."""
        for _ in range(stores):
            cpu = self.random.randrange(2)
            if next(self._running[cpu], self) is self:
                self._running[cpu] = self.host.kernel.stores(cpu, self._flow(), self.random.randrange(60, 1500))

    def settle(self) -> None:
        """Let every packet end."""
        for stores in self._running:
            for _ in stores:
                continue

    def _flow(self) -> bytes:
        number = int(self.random.paretovariate(0.7)) % 60
        return key(number, first_row=2 * (number % 2), direction=0 if number % 2 else number % 3 % 2)

    def cycle(self, patch: pytest.MonkeyPatch) -> list[Metric]:
        """Collect while the CPUs go on."""

        def disturbed(function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                self.advance(self.random.choice((0, 0, 1, 3, 40)))
                return function(*arguments)

            return call

        for owner, name in ((table.FlowTable, "_part"), (table.FlowTable, "_places"), (self.host, "read_slot")):
            patch.setattr(owner, name, disturbed(getattr(owner, name)))
        read_columns = table.FlowTable._read_columns

        def torn(reader: table.FlowTable, cpu: int) -> table._Columns:
            """Each column at a moment of its own."""
            generations = read_columns(reader, cpu).generations
            self.advance(self.random.choice((0, 2, 9)))
            sizes = read_columns(reader, cpu).sizes
            self.advance(self.random.choice((0, 2, 9)))
            return table._Columns(generations, sizes, read_columns(reader, cpu).packets)

        patch.setattr(table.FlowTable, "_read_columns", torn)
        return self.host.collect()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_the_sum_is_exact_whatever_the_kernel_does_meanwhile(seed: int) -> None:
    """Every interval: flows and other are the growth of the totals, nothing negative, and no flow more than it had."""
    race = Race(seed, buckets=2, top=6)
    reported: Counter[str] = Counter()
    before: dict[tuple[str, str], float] | None = None
    before_packets: dict[tuple[str, str], float] = {}
    for _ in range(12):
        with pytest.MonkeyPatch.context() as patch:
            metrics = race.cycle(patch)
        total = by_line(metrics, "flow_interface_bytes_total")
        packets = by_line(metrics, "flow_interface_packets_total")
        if before is not None:
            assert {line: total[line] - before[line] for line in total} == by_line(metrics, "flow_bytes")
            assert {line: packets[line] - before_packets[line] for line in packets} == by_line(metrics, "flow_packets")
        before, before_packets = total, packets
        for metric in metrics:
            if metric.name in ("flow_bytes", "flow_packets"):
                assert metric.value >= 0
            if metric.name == "flow_bytes" and "src" in metric.labels:
                reported[metric.labels["src"]] += int(metric.value)
        race.advance(race.random.choice((10, 200, 500)))
    counted = {table.decode_key(flow).source: size for flow, size in race.host.kernel.counted.items()}
    assert reported
    assert all(size <= counted[source] for source, size in reported.items())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_where_all_flows_have_a_place_none_loses_a_byte(seed: int) -> None:
    """What comes while the reader reads is reported of its flow all the same, or still owed to it."""
    race = Race(seed, buckets=64, top=100)
    race.host.collect()
    reported = 0.0
    for cycle in range(8):
        with pytest.MonkeyPatch.context() as patch:
            metrics = race.cycle(patch) if cycle < 7 else race.host.collect()
        reported += sum(each.value for each in metrics if each.name == "flow_bytes" and "src" in each.labels)
        race.advance(200)
        if cycle >= 5:
            race.settle()
    metrics = race.host.collect()
    reported += sum(each.value for each in metrics if each.name == "flow_bytes" and "src" in each.labels)
    owed = sum(amount.bytes for amount in race.host.collector._owed.values())
    assert race.host.kernel.counted.total() == reported + owed
