"""The load collector's promises."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from kon_agent.config.schema import LoadConfig
from kon_agent.errors import NoData
from kon_agent.plugins.context import Context
from kon_agent.plugins.load import Load


@pytest.fixture
def proc(host: Path) -> Path:
    """Return the host's /proc, with the files the other collectors do not need."""
    proc = host / "proc"
    (proc / "uptime").write_text("12035.73 14504.03\n")
    (proc / "sys/fs").mkdir(parents=True)
    (proc / "sys/fs/file-nr").write_text("648\t0\t2466170\n")
    return proc


def values(context: Context) -> dict[str, float]:
    """Collect; return the values by name."""
    return {metric.name: metric.value for metric in Load(LoadConfig(), context).collect()}


def test_every_value_is_the_kernels(proc: Path, context: Context) -> None:
    """Each figure is the one of its file, and the load per processor is over those online."""
    assert {
        "load1": 0.20,
        "load5": 0.18,
        "load15": 0.12,
        "load1_per_cpu": 0.10,
        "load_threads": 80.0,
        "load_processes_running": 1.0,
        "load_processes_blocked": 0.0,
        "load_forks_total": 2915.0,
        "load_context_switches_total": 1990473.0,
        "load_boot_time_seconds": 1700000000.0,
        "load_uptime_seconds": 12035.73,
        "load_file_descriptors_allocated": 648.0,
        "load_file_descriptors_maximum": 2466170.0,
    } == values(context)


def test_values_are_floats_without_labels(proc: Path, context: Context) -> None:
    """The machine is one series per name."""
    assert {(float, 0)} == {
        (type(metric.value), len(metric.labels)) for metric in Load(LoadConfig(), context).collect()
    }


def test_a_core_that_is_off_does_not_share_the_load(proc: Path, context: Context) -> None:
    """Load per processor follows hotplug: /proc/stat has the lines of the cores online."""
    stat = proc / "stat"
    stat.write_text("".join(line for line in stat.open() if not line.startswith("cpu1")))
    assert 0.20 == values(context)["load1_per_cpu"]


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("loadavg", {"load1", "load5", "load15", "load1_per_cpu", "load_threads"}),
        ("uptime", {"load_uptime_seconds"}),
        ("sys/fs/file-nr", {"load_file_descriptors_allocated", "load_file_descriptors_maximum"}),
        (
            "stat",
            {
                *("load1_per_cpu", "load_processes_running", "load_processes_blocked", "load_forks_total"),
                *("load_context_switches_total", "load_boot_time_seconds"),
            },
        ),
    ],
)
def test_a_missing_file_takes_only_its_own_metrics(proc: Path, context: Context, file: str, missing: set[str]) -> None:
    """What another file says is reported all the same."""
    before = values(context).keys()
    (proc / file).unlink()
    assert missing == before - values(context).keys()


def test_a_proc_with_processes_only_is_no_data(proc: Path, context: Context) -> None:
    """A /proc mounted with subset=pid has nothing to collect."""
    shutil.rmtree(proc)
    with pytest.raises(NoData, match="/proc/loadavg"):
        Load(LoadConfig(), context).collect()


def test_this_machine_agrees_with_the_system_calls() -> None:
    """On the real /proc: boot time and uptime meet at now, and the load is getloadavg's."""
    collected = values(Context())
    assert time.time() == pytest.approx(collected["load_boot_time_seconds"] + collected["load_uptime_seconds"], abs=2.0)
    assert os.getloadavg()[2] == pytest.approx(collected["load15"], abs=0.2)
