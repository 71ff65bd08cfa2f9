"""The memory collector's promises."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kon_agent.config.schema import MemoryConfig
from kon_agent.errors import NoData
from kon_agent.metric import MetricType
from kon_agent.plugins.context import Context
from kon_agent.plugins.memory import Memory

KIB = 1024


def values(context: Context) -> dict[str, float]:
    """Collect; return the values by name."""
    return {metric.name: metric.value for metric in Memory(MemoryConfig(), context).collect()}


def test_used_is_total_minus_available(context: Context) -> None:
    """The figures are those of free(1) of procps 4, in bytes."""
    assert {
        "memory_usage_percent": 40.0,
        "memory_usage_bytes": 400_000 * KIB,
        "memory_total_bytes": 1_000_000 * KIB,
        "memory_available_bytes": 600_000 * KIB,
        "memory_swap_usage_percent": 25.0,
        "memory_swap_usage_bytes": 100_000 * KIB,
    } == values(context)


def test_an_old_kernel_is_estimated(host: Path, context: Context) -> None:
    """Without MemAvailable, available is free + buffers + cached."""
    meminfo = host / "proc/meminfo"
    meminfo.write_text(meminfo.read_text().replace("MemAvailable:", "MemSomething:"))
    assert 550_000 * KIB == values(context)["memory_available_bytes"]


def test_available_beyond_total_falls_back_to_free(host: Path, context: Context) -> None:
    """A container that shows the host's available memory never uses a negative amount."""
    meminfo = host / "proc/meminfo"
    meminfo.write_text(meminfo.read_text().replace("   600000 kB", "  9600000 kB"))
    assert 800_000 * KIB == values(context)["memory_usage_bytes"]


def test_no_swap_is_zero_percent(host: Path, context: Context) -> None:
    """A machine without swap uses 0 % of it."""
    (host / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n")
    collected = values(context)
    assert (0.0, 0) == (collected["memory_swap_usage_percent"], collected["memory_swap_usage_bytes"])


def test_every_metric_is_memory_usage(context: Context) -> None:
    """All metrics carry the wire's MEMORY_USAGE type and no label."""
    assert {(MetricType.MEMORY_USAGE, 0)} == {
        (metric.type, len(metric.labels)) for metric in Memory(MemoryConfig(), context).collect()
    }


@pytest.mark.parametrize("content", [None, "SwapTotal: 0 kB\n"])
def test_no_total_is_no_data(host: Path, context: Context, content: str | None) -> None:
    """Without meminfo, or without a total in it, there is nothing to collect."""
    meminfo = host / "proc/meminfo"
    meminfo.unlink()
    if content is not None:
        meminfo.write_text(content)
    with pytest.raises(NoData, match="meminfo"):
        Memory(MemoryConfig(), context).collect()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a meminfo in a mount namespace of its own")
@pytest.mark.skipif(not shutil.which("free"), reason="needs free(1) of procps")
def test_equals_free_to_the_unit(host: Path) -> None:
    """Given the same meminfo, free -b and the collector agree in every figure."""
    shutil.copyfile("/proc/meminfo", host / "proc/meminfo")
    script = 'mount --bind "$1" /proc/meminfo && free -b'
    table = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(host / "proc/meminfo")],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    collected = values(Context(root=str(host)))
    assert (int(rows["Mem:"][0]), int(rows["Mem:"][1]), int(rows["Mem:"][5]), int(rows["Swap:"][1])) == (
        collected["memory_total_bytes"],
        collected["memory_usage_bytes"],
        collected["memory_available_bytes"],
        collected["memory_swap_usage_bytes"],
    )
