"""The runqlat collector's promises; the kernel's side is in tests/integration/test_latency_probes.py."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kon_agent.bpf import runqlat
from kon_agent.bpf.latency import BUCKETS
from kon_agent.bpf.origin import Origin
from kon_agent.config.schema import RunqlatConfig
from kon_agent.errors import BpfError
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.runqlat import Runqlat

NAME = "scheduler_run_queue_latency_seconds"
SCHEDSTAT = """\
version 15
timestamp 4295321011
cpu0 0 0 0 0 0 0 8000000000 2500000000 400
domain0 00000003 26 26 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
cpu1 0 0 0 0 0 0 9000000000 1500000000 600
"""

Samples = dict[tuple[str, str | None, str | None], float]


def row(counts: dict[int, int], sum_ns: int, missed: int = 0) -> bytes:
    """Return a CPU's row."""
    columns = [counts.get(bucket, 0) for bucket in range(BUCKETS)]
    return struct.pack(f"={BUCKETS + 2}Q", *columns, sum_ns, missed)


def granted(*rows: bytes) -> Context:
    """Return the context of a worker whose supervisor has loaded the probe."""
    return Context(grants={"rows": memoryview(b"".join(rows)), **Origin("bpf", created_ns=5_000_000_000).grant()})


def samples(context: Context, *, per_cpu: bool = True) -> Samples:
    """Collect; return the values by name, CPU and bound, without those of the origin."""
    return {
        (metric.name, metric.labels.get("cpu"), metric.labels.get("le")): metric.value
        for metric in Runqlat(RunqlatConfig(per_cpu=per_cpu), context).collect()
        if not metric.name.startswith("ebpf_")
    }


def test_each_cpu_has_its_histogram() -> None:
    """Buckets are cumulative, the last one is all, and sum and count are exact."""
    found = samples(granted(row({0: 3, 5: 2, 21: 1}, 2_000_000_500, missed=4), row({1: 7}, 9_000)))
    assert 3 == found[f"{NAME}_bucket", "0", "1e-06"]
    assert 3 == found[f"{NAME}_bucket", "0", "1.6e-05"]
    assert 5 == found[f"{NAME}_bucket", "0", "3.2e-05"]
    assert 6 == found[f"{NAME}_bucket", "0", "+Inf"]
    assert (6, 2.0000005) == (found[f"{NAME}_count", "0", None], found[f"{NAME}_sum", "0", None])
    assert (7, 9e-06) == (found[f"{NAME}_count", "1", None], found[f"{NAME}_sum", "1", None])
    assert 4 == found["scheduler_run_queue_missed_total", "0", None]


def test_a_cpu_that_is_not_there_is_not_reported() -> None:
    """A machine has fewer CPUs than it may have; one that never ran anything has no series."""
    assert {"0"} == {cpu for _, cpu, _ in samples(granted(row({0: 1}, 10), row({}, 0)))}


def test_one_histogram_for_the_whole_machine() -> None:
    """Without `per_cpu` the CPUs are added up, and no label tells them apart."""
    found = samples(granted(row({0: 3}, 1000, missed=1), row({0: 4, 1: 1}, 2000, missed=2)), per_cpu=False)
    assert {None} == {cpu for _, cpu, _ in found}
    assert (8, 3e-06) == (found[f"{NAME}_count", None, None], found[f"{NAME}_sum", None, None])
    assert 7 == found[f"{NAME}_bucket", None, "1e-06"]
    assert 3 == found["scheduler_run_queue_missed_total", None, None]


def test_rows_of_another_layout_are_refused() -> None:
    """A row too short by a word is no row."""
    with pytest.raises(BpfError, match="kon_runqlat"):
        samples(granted(bytes(runqlat.ROW_BYTES - 8)))


@pytest.mark.parametrize(
    ("per_cpu", "expected"),
    [
        (
            True,
            {
                (f"{NAME}_bucket", "0", "+Inf"): 400.0,
                (f"{NAME}_sum", "0", None): 2.5,
                (f"{NAME}_count", "0", None): 400.0,
                (f"{NAME}_bucket", "1", "+Inf"): 600.0,
                (f"{NAME}_sum", "1", None): 1.5,
                (f"{NAME}_count", "1", None): 600.0,
            },
        ),
        (
            False,
            {
                (f"{NAME}_bucket", None, "+Inf"): 1000.0,
                (f"{NAME}_sum", None, None): 4.0,
                (f"{NAME}_count", None, None): 1000.0,
            },
        ),
    ],
)
def test_schedstat_stands_in_for_bpf(host: Path, context: Context, per_cpu: bool, expected: Samples) -> None:
    """Without BPF sum and count are the kernel's own, and say so."""
    (host / "proc/schedstat").write_text(SCHEDSTAT)
    assert expected == samples(context, per_cpu=per_cpu)
    metrics = [*Runqlat(RunqlatConfig(per_cpu=per_cpu), context).collect()]
    assert {"procfs"} == {metric.labels["source"] for metric in metrics}
    assert {MetricType.EBPF_RAW, MetricType.AGENT_TELEMETRY} == {metric.type for metric in metrics}


@pytest.mark.parametrize("per_cpu", [True, False])
def test_without_either_the_origin_is_still_told(context: Context, per_cpu: bool) -> None:
    """A kernel without CONFIG_SCHEDSTATS and without BPF for us: the plugin says why there is nothing."""
    (metric,) = Runqlat(RunqlatConfig(per_cpu=per_cpu), context).collect()
    assert "ebpf_source" == metric.name
    assert {"plugin": "runqlat", "source": "procfs", "reason": "no BPF is granted here"} == metric.labels
