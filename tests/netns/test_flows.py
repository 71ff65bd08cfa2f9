"""The flow table against the real kernel: Zipf traffic over a hundred thousand flows, read while it goes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kon_agent.bpf import layout
from kon_agent.bpf.flowcount import FlowCount
from kon_agent.bpf.net import NetCounters
from kon_agent.bpf.origin import Origin
from kon_agent.config.rules import MIN_FLOW_MEMORY_BYTES
from kon_agent.config.schema import FlowsConfig
from kon_agent.errors import BpfError
from kon_agent.metric import Metric
from kon_agent.page import PageWriter, page_size
from kon_agent.plugins.context import Context
from kon_agent.plugins.flows import Flows
from tests.support.forking import forked
from tests.support.program import environment_of
from tests.support.receiver import Receiver
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

FLOWS = 100_000
PACKETS = 400_000  # some four seconds
EXPONENT = 1.05
MEMORY_BYTES = FlowsConfig().memory
TO_HERE = bytes.fromhex("020000000001" + "020000000002")
TO_THERE = bytes.fromhex("020000000002" + "020000000001")
Line = tuple[str, str]
Eventually = Callable[[Callable[[], bool]], bool]


class Watch:
    """An interface whose packets and flows are counted, and collectors that read them."""

    def __init__(self, counters: NetCounters, flows: FlowCount) -> None:
        self.counters = counters
        self.flows = flows
        self._page = memoryview(bytearray(page_size(layout.TABLE_BYTES)))
        PageWriter(self._page).publish(counters.table())

    def packets(self, direction: str) -> int:
        """Return how many packets were counted."""
        (at,) = self.counters.attachments()
        counts = layout.read_slot(self.counters.counters(), at.slot, self.counters.cpus, at.base)
        return sum(packets for (each, _), (packets, _) in counts.items() if each == direction)

    def has_counted(self, direction: str, packets: int) -> bool:
        return self.packets(direction) >= packets

    def collector(self, top: int) -> Flows:
        """Return a plugin as its worker would have it."""
        grants = {
            "flows": self.flows.map_table(),
            "counters": self.counters.map_counters(),
            "interfaces": self._page.toreadonly(),
            **Origin("bpf").grant(),
        }
        return Flows(FlowsConfig(top=top, max_series=100_000), Context(grants=grants))


@pytest.fixture
def watch(link: Any) -> Iterator[Watch]:
    try:
        counters = NetCounters.load()
    except BpfError as err:
        if err.errno in (errno.EPERM, errno.ENOSYS) or "libbpf" in str(err):
            pytest.skip(f"needs BPF and libbpf: {err}")
        raise
    with closing(counters):
        counters.attach(link.here.ifindex(), "kon0")
        with closing(FlowCount.load(counters.shared_maps, MEMORY_BYTES)) as flows:
            counters.run(flows.substitutes)
            yield Watch(counters, flows)


def udp(flow: int, size: int) -> bytes:
    """Return what follows the MAC addresses: UDP from 10.x.y.z:1000 to 192.0.2.1:53, flow number in the address."""
    address = b"\x0a" + flow.to_bytes(3, "big")
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + size, 0, 0, 64, 17, 0, address, b"\xc0\0\x02\x01")
    return b"\x08\x00" + header + struct.pack("!HHHH", 1000, 53, 8 + size, 0) + bytes(size)


def address_of(flow: int) -> str:
    return socket.inet_ntop(socket.AF_INET, b"\x0a" + flow.to_bytes(3, "big"))


def payload_bytes(flow: int) -> int:
    return 18 + flow * 37 % 300


def zipf(packets: int) -> list[int]:
    """Return flow numbers, rank 0 the most frequent; the same ones every time."""
    weights = itertools.accumulate((rank + 1) ** -EXPONENT for rank in range(FLOWS))
    return random.Random(7).choices(range(FLOWS), cum_weights=list(weights), k=packets)


def send(interface: str, start: bytes, drawn: list[int], batch: int = 5000) -> None:
    """Send a frame of each flow, a batch from one of two CPUs, the next from the other."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    frames: dict[int, bytes] = {}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        for number, flow in enumerate(drawn):
            if number % batch == 0:
                os.sched_setaffinity(0, {cpus[number // batch % len(cpus)]})
            frame = frames.get(flow)
            if frame is None:
                frame = frames[flow] = start + udp(flow, payload_bytes(flow))
            raw.send(frame)


def by_line(metrics: list[Metric], name: str) -> dict[Line, float]:
    sums: defaultdict[Line, float] = defaultdict(float)
    for metric in metrics:
        if metric.name == name:
            sums[metric.labels["interface"], metric.labels["direction"]] += metric.value
    return dict(sums)


def one(metrics: list[Metric], name: str) -> float:
    (value,) = (metric.value for metric in metrics if metric.name == name)
    return value


def named(metrics: list[Metric]) -> dict[str, float]:
    """Return bytes by source address of the flows that are reported."""
    return {each.labels["src"]: each.value for each in metrics if each.name == "flow_bytes" and "src" in each.labels}


def intervals(readings: list[list[Metric]]) -> Iterator[tuple[list[Metric], list[Metric]]]:
    return itertools.pairwise(readings)


def test_zipf_traffic_is_found_and_adds_up(link: Any, watch: Watch) -> None:
    """Of the hundred largest flows 95 at least are reported, every interval adds up, evictions are counted."""
    drawn = zipf(PACKETS)
    whole, live = watch.collector(top=100), watch.collector(top=20)
    readings = [list(live.collect())]
    before = list(whole.collect())
    pid = forked(lambda: send("kon0", TO_THERE, drawn))
    done = 0
    while not done:
        readings.append(list(live.collect()))
        done, status = os.waitpid(pid, os.WNOHANG)
    readings.append(list(live.collect()))
    after = list(whole.collect())
    assert 0 == status
    frame_bytes: Counter[str] = Counter()
    for flow in drawn:
        frame_bytes[address_of(flow)] += 14 + 28 + payload_bytes(flow)

    # The sum: exact in every interval, though the kernel went on counting while each was read.
    for earlier, later in [*intervals(readings), (before, after)]:
        for total, part in (("bytes", "flow_bytes"), ("packets", "flow_packets")):
            was, now = (by_line(each, f"flow_interface_{total}_total") for each in (earlier, later))
            assert {line: now[line] - was[line] for line in now} == by_line(later, part)
        assert all(each.value >= 0 for each in later if each.name.startswith("flow_"))
    egress = "kon0", "egress"
    assert frame_bytes.total() <= by_line(after, "flow_bytes")[egress] <= frame_bytes.total() + 10_000  # our own ICMP

    # Recall, and never more than was sent.
    largest = {address for address, _ in frame_bytes.most_common(100)}
    found = named(after)
    assert len(largest & found.keys()) >= 95
    assert all(size <= frame_bytes[address] for address, size in found.items() if address in frame_bytes)
    assert len(readings) > 3

    # Evictions are counted: more flows than places came by.
    assert one(after, "flow_evictions_total") > 0
    assert one(after, "flow_inserts_total") - one(after, "flow_evictions_total") == one(after, "flow_table_entries")
    assert one(after, "flow_table_bytes") <= MEMORY_BYTES


def test_a_scan_does_not_push_out_those_that_talk(link: Any, watch: Watch) -> None:
    """In the smallest table twenty flows of one packet in 2,000 keep their places; all others have a single packet."""
    talkers = list(range(20))
    drawn = 4 * talkers  # twice from each of two CPUs
    for start in range(len(talkers), 60_000, 100):
        drawn += [talkers[start // 100 % len(talkers)], *range(start, start + 100)]
    memory_bytes = MIN_FLOW_MEMORY_BYTES * -(-watch.counters.cpus // 2)  # always the same for each CPU
    with closing(FlowCount.load(watch.counters.shared_maps, memory_bytes)) as small:
        watch.counters.run(small.substitutes)
        collector = Watch(watch.counters, small).collector(top=len(talkers))
        list(collector.collect())
        send("kon0", TO_THERE, drawn, batch=2 * len(talkers))
        metrics = list(collector.collect())
        watch.counters.run(None)
    sent = Counter(drawn)
    expected = {address_of(flow): float(sent[flow] * (42 + payload_bytes(flow))) for flow in talkers}
    assert expected == named(metrics)
    assert one(metrics, "flow_evictions_total") > 50_000


def test_the_maps_stay_within_their_memory(link: Any, watch: Watch) -> None:
    """By the kernel's own account of both maps."""
    charged = 0
    for name in ("flows", "flow_buckets"):
        info = Path(f"/proc/self/fdinfo/{watch.flows.maps[f'kon_flows.{name}']}").read_text(encoding="ascii")
        charged += int(re.findall(r"^memlock:\s+(\d+)$", info, re.MULTILINE)[0])
    assert MEMORY_BYTES * 0.98 < charged <= MEMORY_BYTES


def test_each_program_has_its_substitute(link: Any, watch: Watch) -> None:
    """The verifier takes all of them where it takes the plain ones: one that may be left out is not, by mistake."""
    plain = {name for name in watch.counters.program_fds() if name.startswith("kon_")}
    assert {name.rpartition(".")[2] for name in plain} == watch.flows.substitutes.keys()


def ipv4(protocol: int, rest: bytes, fragment: int = 0) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(rest), 0, fragment, 64, protocol, 0, b"\x0a\0\0\x01", b"\x0a\0\0\x02"
    )
    return b"\x08\x00" + header + rest


def ipv6(next_header: int, rest: bytes) -> bytes:
    source, destination = (bytes.fromhex("20010db8") + bytes(11) + bytes([number]) for number in (1, 2))
    return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(rest), next_header, 64) + source + destination + rest


TCP = struct.pack("!HHIIBBHHH", 443, 50000, 0, 0, 0x50, 0x10, 0, 0, 0) + bytes(20)
UDP = struct.pack("!HHHH", 53, 40000, 8 + 20, 0) + bytes(20)
V4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}
TCP_PORTS = {"src_port": "443", "dst_port": "50000"}
UDP_PORTS = {"src_port": "53", "dst_port": "40000"}
NO_PORTS = {"src_port": "0", "dst_port": "0"}
SHAPES: dict[str, tuple[bytes, dict[str, str]]] = {
    "tcp": (ipv4(6, TCP), {"protocol": "tcp", **V4, **TCP_PORTS}),
    "udp": (ipv4(17, UDP), {"protocol": "udp", **V4, **UDP_PORTS}),
    "icmp": (ipv4(1, bytes(40)), {"protocol": "icmp", **V4}),
    "gre": (ipv4(47, bytes(40)), {"protocol": "gre", **V4}),
    "sctp": (ipv4(132, UDP), {"protocol": "sctp", **V4, **UDP_PORTS}),
    "no name": (ipv4(253, bytes(40)), {"protocol": "253", **V4}),
    "later fragment": (ipv4(17, bytes(40), fragment=100), {"protocol": "udp", **V4, **NO_PORTS}),
    "VLAN": (b"\x81\x00\x00\x05" + ipv4(17, UDP), {"protocol": "udp", **V4, **UDP_PORTS}),
    "QinQ": (b"\x88\xa8\x00\x05\x81\x00\x00\x06" + ipv4(6, TCP), {"protocol": "tcp", **V4, **TCP_PORTS}),
    "tcp over IPv6": (ipv6(6, TCP), {"protocol": "tcp", **V6, **TCP_PORTS}),
    "icmpv6": (ipv6(58, bytes(40)), {"protocol": "icmpv6", **V6}),
    "options, then udp": (ipv6(60, bytes([17, 0]) + bytes(6) + UDP), {"protocol": "udp", **V6, **UDP_PORTS}),
    "first fragment of udp": (
        ipv6(44, struct.pack("!BBHI", 17, 0, 1, 1) + UDP),
        {"protocol": "udp", **V6, **UDP_PORTS},
    ),
    "later fragment of udp": (
        ipv6(44, struct.pack("!BBHI", 17, 0, 100 << 3, 1) + UDP),
        {"protocol": "udp", **V6, **NO_PORTS},
    ),
}
WITHOUT_FLOW = {"arp": b"\x08\x06" + bytes(46), "lldp": b"\x88\xcc" + bytes(46), "cut short": ipv4(6, TCP)[:14]}
FRAMES = 20


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_each_kind_of_packet_is_its_flow(link: Any, watch: Watch, eventually: Eventually, direction: str) -> None:
    """By addresses, protocol and ports, v4 and v6, tagged or not, both directions; what is not IP is in other."""
    sender, start = (link.there, TO_HERE) if direction == "ingress" else (link.here, TO_THERE)
    collector = watch.collector(top=10)
    list(collector.collect())
    line = {"interface": "kon0", "direction": direction}
    expected = {name: (rest, {**line, **labels}) for name, (rest, labels) in SHAPES.items()}
    expected |= {name: (rest, {**line, "flow": "other"}) for name, rest in WITHOUT_FLOW.items()}
    for name, (rest, labels) in expected.items():
        before = watch.packets(direction)
        sender.send(start + rest, FRAMES)
        assert eventually(partial(watch.has_counted, direction, before + FRAMES)), name
        metrics = list(collector.collect())
        (size,) = (each.value for each in metrics if each.name == "flow_bytes" and each.labels == labels)
        (packets,) = (each.value for each in metrics if each.name == "flow_packets" and each.labels == labels)
        assert (name, FRAMES * len(start + rest), FRAMES) == (name, size, packets)


def test_the_programs_change_places_under_traffic(link: Any, watch: Watch) -> None:
    """With flows, without, and with again: not a packet goes uncounted."""
    drawn = zipf(50_000)
    collector = watch.collector(top=10)
    before = list(collector.collect())
    pid = forked(lambda: send("kon0", TO_THERE, drawn))
    done = changes = 0
    while not done:
        watch.counters.run(None if changes % 2 else watch.flows.substitutes)
        changes += 1
        done, status = os.waitpid(pid, os.WNOHANG)
    after = list(collector.collect())
    assert 0 == status
    was, now = (by_line(each, "flow_interface_packets_total")["kon0", "egress"] for each in (before, after))
    assert len(drawn) <= now - was <= len(drawn) + 50  # our own ICMP
    assert by_line(after, "flow_packets")["kon0", "egress"] == now - was
    assert changes > 2


def stored(receiver: Receiver, name: str, **labels: str) -> list[float]:
    """Return what the receiver has of a metric of the plugin, oldest first."""
    return [each.value for each in receiver.query("flows", name) if labels.items() <= each.labels.items()]


def test_the_agent_reports_a_talker(link: Any, station: Any) -> None:
    """Enabled in a running agent, through supervisor, worker and receiver: every byte of the flow, then none."""
    receiver = station.receiver
    with station.agent({"ebpf": {"enable": False}, "flows": {"period": "500ms"}}) as agent:
        agent.wait_until_running()
        wait_for(lambda: bool(stored(receiver, "flow_bytes")), "there has been an interval", deadline_s=20)
        link.there.send(TO_HERE + udp(7, 100), 200)
        flow = {"interface": "kon0", "direction": "ingress", "src": address_of(7), "src_port": "1000"}
        size = 200 * (14 + 28 + 100)
        wait_for(lambda: sum(stored(receiver, "flow_bytes", **flow)) >= size, "the flow is stored", deadline_s=20)
        assert float(size) == sum(stored(receiver, "flow_bytes", **flow))
        assert stored(receiver, "flow_table_bytes")[-1] <= MEMORY_BYTES


def test_a_trial_counts_flows(link: Any) -> None:
    """`plugins test` has the same programs for the moment."""
    command = [sys.executable, "-m", "kon_agent.cli.agent", "plugins", "test", "flows", "--json"]
    done = subprocess.run(
        ["ip", "netns", "exec", link.here.name, *command],
        env=environment_of(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = {record["name"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert "bpf" == found["ebpf_source"]["labels"]["source"]
    assert {"flow_table_bytes", "flow_interface_bytes_total"} <= found.keys()
