"""The biolat collector's promises; the kernel's side is in tests/integration/test_latency_probes.py."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kon_agent.bpf import biolat
from kon_agent.bpf.latency import BUCKETS
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import BiolatConfig
from kon_agent.errors import BpfError
from kon_agent.plugins.biolat import Biolat
from kon_agent.plugins.context import Context

NAME = "disk_io_latency_seconds"
CPUS = 2
SDA, LOOP0, CCISS = (8 << 20 | 0, 7 << 20 | 0, 104 << 20 | 0)

Samples = dict[tuple[str, str, str | None, str | None], float]
Latencies = dict[str, tuple[dict[int, int], int]]


def row(latencies: Latencies, device: int = 0, missed: int = 0) -> bytes:
    """Return a row with the counts and the sum (ns) of some operations."""
    columns: list[int] = []
    for operation in biolat.OPERATIONS:
        counts, sum_ns = latencies.get(operation, ({}, 0))
        columns += [*(counts.get(bucket, 0) for bucket in range(BUCKETS)), sum_ns]
    return struct.pack(f"={biolat.ROW_BYTES // 8}Q", *columns, device, missed, 0)


def granted(host: Path, rows: dict[int, bytes]) -> Context:
    """Return the context of a worker whose supervisor has loaded the probe."""
    memory = bytearray(biolat.SLOTS * CPUS * biolat.ROW_BYTES)
    for number, content in rows.items():
        memory[number * biolat.ROW_BYTES : (number + 1) * biolat.ROW_BYTES] = content
    return Context(root=str(host), grants={"rows": memoryview(memory), **Origin("bpf").grant()})


def samples(context: Context, exclude: list[str] | None = None) -> Samples:
    """Collect; return the values by name, device, operation and bound, without those of the origin."""
    return {
        (each.name, each.labels["device"], each.labels.get("operation"), each.labels.get("le")): each.value
        for each in Biolat(BiolatConfig(exclude_devices=exclude or []), context).collect()
        if not each.name.startswith("ebpf_")
    }


@pytest.fixture
def host(host: Path) -> Path:
    """Return the host with the device numbers of some of its disks."""
    folder = host / "sys/dev/block"
    folder.mkdir(parents=True)
    for number, name in (("8:0", "sda"), ("7:0", "loop0"), ("104:0", "cciss!c0d0")):
        (folder / number).symlink_to(f"../../devices/virtual/block/{name}")
    return host


def test_a_device_is_the_sum_of_its_cpus(host: Path) -> None:
    """Counts and times of all CPUs add up, per operation, under the device's name."""
    rows = {
        0: row({"read": ({3: 2}, 16_000), "other": ({21: 1}, 3_000_000_000)}, SDA, missed=1),
        1: row({"read": ({0: 1, 4: 1}, 14_500)}, missed=2),
    }
    found = samples(granted(host, rows))
    assert 1 == found[f"{NAME}_bucket", "sda", "read", "1e-06"]
    assert 3 == found[f"{NAME}_bucket", "sda", "read", "8e-06"]
    assert (4, 30.5e-06) == (found[f"{NAME}_count", "sda", "read", None], found[f"{NAME}_sum", "sda", "read", None])
    assert (1, 3.0) == (found[f"{NAME}_count", "sda", "other", None], found[f"{NAME}_sum", "sda", "other", None])
    assert 0 == found[f"{NAME}_bucket", "sda", "write", "+Inf"]
    assert 3 == found["disk_io_latency_missed_total", "sda", None, None]


def test_operations_of_no_kind_appear_with_their_first_request(host: Path) -> None:
    """Reads and writes are there from the start, `other` when there is one."""
    found = samples(granted(host, {0: row({}, SDA)}))
    assert {"read", "write", None} == {operation for _, _, operation, _ in found}


def test_a_slash_in_a_name_is_restored(host: Path) -> None:
    """sysfs writes `!` for it."""
    assert {"cciss/c0d0"} == {device for _, device, _, _ in samples(granted(host, {0: row({}, CCISS)}))}


def test_excluded_and_departed_devices_are_left_out(host: Path) -> None:
    """A slot whose device matches a pattern or has no name now has no series; those after it have theirs."""
    rows = {0: row({}, LOOP0), 1 * CPUS: row({}, 9 << 20 | 9), 2 * CPUS: row({}, SDA)}
    assert {"sda"} == {device for _, device, _, _ in samples(granted(host, rows), ["loop*"])}


def test_devices_without_a_slot_are_reported_together(host: Path) -> None:
    """The last slot is `other`: it appears when all others are taken and it has counted something."""
    taken = {slot * CPUS: row({}, SDA) for slot in range(biolat.DEVICES)}
    assert {"sda"} == {device for _, device, _, _ in samples(granted(host, taken))}
    last = {biolat.DEVICES * CPUS + 1: row({"write": ({2: 5}, 20_000)})}
    found = samples(granted(host, {**taken, **last}))
    assert 5 == found[f"{NAME}_count", "other", "write", None]


def test_rows_of_another_layout_are_refused(host: Path) -> None:
    """A mapping that is no whole number of slots is none of this program's."""
    context = Context(root=str(host), grants={"rows": memoryview(bytes(biolat.ROW_BYTES))})
    with pytest.raises(BpfError, match="kon_biolat"):
        samples(context)


def test_diskstats_stands_in_for_bpf(host: Path) -> None:
    """Without BPF sum and count are the kernel's own, of whole disks that have done something, and say so."""
    (host / "proc/diskstats").write_text(
        "   8       0 sda 100 3 2048 50 40 5 4096 70 0 90 120 6 0 0 1 4 9\n"
        "   8       1 sda1 90 3 2000 45 40 5 4096 70 0 85 115 0 0 0 0 0 0\n"
        "   7       0 loop0 5 0 10 1 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
        "  11       0 sr0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
        " 253       0 dm-0 20 0 160 9 8 0 64 3 0 7 12\n"
    )
    context = Context(root=str(host))
    found = samples(context, ["loop*"])
    assert {
        ("sda", "read"): (100, 0.05),
        ("sda", "write"): (40, 0.07),
        ("sda", "other"): (10, 0.01),
        ("dm-0", "read"): (20, 0.009),  # a kernel before 4.18: neither discards nor flushes
        ("dm-0", "write"): (8, 0.003),
    } == {
        (device, operation): (value, found[f"{NAME}_sum", device, operation, None])
        for (name, device, operation, _), value in found.items()
        if name == f"{NAME}_count"
    }
    assert {"procfs"} == {metric.labels["source"] for metric in Biolat(BiolatConfig(), context).collect()}


def test_without_either_the_origin_is_still_told(host: Path) -> None:
    """No block layer and no BPF for us: the plugin says why there is nothing."""
    (host / "proc/diskstats").unlink()
    (metric,) = Biolat(BiolatConfig(), Context(root=str(host))).collect()
    assert {"plugin": "biolat", "source": "procfs", "reason": "no BPF is granted here"} == metric.labels
