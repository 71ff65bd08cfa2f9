"""The cpu collector's promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.config.schema import CpuConfig
from kon_agent.errors import NoData
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.cpu import MODES, Cpu, _percentages


def usage(cpu: Cpu) -> dict[tuple[str | None, str], float]:
    """Collect; return the usages by (core, mode), None for the whole machine."""
    return {
        (metric.labels.get("cpu"), metric.labels["mode"]): metric.value
        for metric in cpu.collect()
        if metric.name == "cpu_usage_percent"
    }


def started(context: Context, *, per_core: bool = False) -> Cpu:
    """Return a collector that has taken its baseline."""
    cpu = Cpu(CpuConfig(per_core=per_core), context)
    cpu.start()
    return cpu


def test_usage_is_over_the_interval(host: Path, context: Context) -> None:
    """A usage is the mode's share of the ticks since the last cycle, not since boot."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1040 110 520 8100 220 11 22 37 50 5\n")
    assert {
        (None, "total"): 40.0,
        (None, "user"): 20.0,
        (None, "nice"): 5.0,
        (None, "system"): 10.0,
        (None, "idle"): 50.0,
        (None, "iowait"): 10.0,
        (None, "irq"): 0.5,
        (None, "softirq"): 1.0,
        (None, "steal"): 3.5,
    } == pytest.approx(usage(cpu))


def test_the_next_interval_begins_where_the_last_ended(host: Path, context: Context) -> None:
    """Each cycle compares with the one before, not with the baseline."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1100 100 500 8000 200 10 20 30\n")
    usage(cpu)
    (host / "proc/stat").write_text("cpu  1100 100 500 8100 200 10 20 30\n")
    assert 0.0 == usage(cpu)[None, "total"]


def test_guest_time_is_not_counted_twice(host: Path, context: Context) -> None:
    """Guest time is part of user time: a machine that ran guests only was 100 % in user mode."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1100 100 500 8000 200 10 20 30 150 5\n")
    values = usage(cpu)
    assert (100.0, 100.0) == (values[None, "user"], values[None, "total"])


def test_a_counter_going_back_counts_as_standing_still(host: Path, context: Context) -> None:
    """Iowait that decreased is 0 %, and the other modes still share 100 %."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1025 100 500 8075 150 10 20 30\n")
    values = usage(cpu)
    assert (0.0, 25.0, 75.0) == (values[None, "iowait"], values[None, "user"], values[None, "idle"])


def test_an_interval_without_a_tick_has_loads_only(context: Context) -> None:
    """Where no tick has passed there is no usage, but the load averages are reported."""
    assert {"cpu_load1": 0.20, "cpu_load5": 0.18, "cpu_load15": 0.12} == {
        metric.name: metric.value for metric in started(context).collect()
    }


def test_cores_are_reported_where_asked_for(host: Path, context: Context) -> None:
    """With per_core, each core has its own usages besides the machine's."""
    cpu = started(context, per_core=True)
    (host / "proc/stat").write_text(
        "cpu  1100 100 500 8100 200 10 20 30 50 5\n"
        "cpu0 700 60 250 4000 150 10 10 20 50 5\n"
        "cpu1 400 40 250 4100 50 0 10 10 0 0\n"
        "intr 1 2 3\n"
    )
    values = usage(cpu)
    assert (50.0, 100.0, 0.0) == (values[None, "total"], values["0", "total"], values["1", "total"])


def test_cores_are_left_out_unless_asked_for(host: Path, context: Context) -> None:
    """Without per_core there is the whole machine only."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1100 100 500 8000 200 10 20 30\ncpu0 700 60 250 4000 150 10 10 20\n")
    assert {None} == {core for core, _ in usage(cpu)}


def test_a_core_plugged_in_is_reported_from_its_second_cycle(host: Path, context: Context) -> None:
    """A core without an earlier reading has no interval yet; one that went away is not reported."""
    cpu = started(context, per_core=True)
    (host / "proc/stat").write_text("cpu  1100 100 500 8000 200 10 20 30\ncpu2 5 0 0 5 0 0 0 0\n")
    assert {None} == {core for core, _ in usage(cpu)}
    (host / "proc/stat").write_text("cpu  1200 100 500 8000 200 10 20 30\ncpu2 15 0 0 15 0 0 0 0\n")
    assert {None, "2"} == {core for core, _ in usage(cpu)}


def test_a_kernel_without_steal_is_read(host: Path, context: Context) -> None:
    """A kernel that reports fewer modes has those and no others."""
    (host / "proc/stat").write_text("cpu  10 0 10 80\n")
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  20 0 20 160\n")
    assert {"total", "user", "nice", "system", "idle"} == {mode for _, mode in usage(cpu)}


def test_every_metric_is_cpu_usage(host: Path, context: Context) -> None:
    """All metrics carry the wire's CPU_USAGE type."""
    cpu = started(context)
    (host / "proc/stat").write_text("cpu  1100 100 500 8000 200 10 20 30\n")
    assert {MetricType.CPU_USAGE} == {metric.type for metric in cpu.collect()}


def test_a_proc_without_stat_is_no_data(host: Path, context: Context) -> None:
    """A /proc mounted with subset=pid is no failure: there is nothing to collect."""
    (host / "proc/stat").unlink()
    with pytest.raises(NoData, match="proc/stat"):
        Cpu(CpuConfig(), context).collect()


def test_this_machine_reports_a_sensible_usage() -> None:
    """On the real /proc, once ticks have passed, the modes sum to 100 and the total lies within 0 and 100."""
    cpu = started(Context())
    values = usage(cpu)
    while not values:  # at most a few ticks of 10 ms; the suite's timeout is the deadline
        values = usage(cpu)
    assert 100.0 == pytest.approx(sum(values[None, mode] for mode in MODES))
    assert 0.0 <= values[None, "total"] <= 100.0 + 1e-9


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)), min_size=8, max_size=8))
def test_percentages_are_shares(readings: list[tuple[int, int]]) -> None:
    """Whatever the counters do, no percentage is negative and together they are 100, or there are none."""
    before, after = zip(*readings, strict=True)
    shares = _percentages(before, after)
    assert all(share >= 0.0 for share in shares)
    assert not shares or 100.0 == pytest.approx(sum(shares))
