"""The pressure collector's promises."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kon_agent.config.schema import PressureConfig
from kon_agent.errors import NoData
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.pressure import Pressure

CPU = """\
some avg10=4.13 avg60=2.96 avg300=2.11 total=925704796
full avg10=0.00 avg60=0.00 avg300=0.00 total=0
"""
MEMORY = """\
some avg10=0.20 avg60=0.10 avg300=0.05 total=1500000
full avg10=0.10 avg60=0.04 avg300=0.01 total=250
"""
IO = """\
some avg10=0.94 avg60=0.53 avg300=0.42 total=51513882
full avg10=0.47 avg60=0.33 avg300=0.33 total=40407988
"""
IRQ = "full avg10=1.00 avg60=2.00 avg300=3.00 total=4000000\n"

Series = dict[tuple[str, ...], float]


@pytest.fixture
def folder(host: Path) -> Path:
    """Return the host's /proc/pressure, of a kernel with IRQ time accounting."""
    folder = host / "proc/pressure"
    folder.mkdir()
    for name, text in {"cpu": CPU, "memory": MEMORY, "io": IO, "irq": IRQ}.items():
        (folder / name).write_text(text)
    return folder


def stalls(context: Context, name: str) -> Series:
    """Collect; return one metric's values by the values of its labels."""
    metrics = Pressure(PressureConfig(), context).collect()
    return {tuple(metric.labels.values()): metric.value for metric in metrics if metric.name == name}


def test_percentages_are_the_kernels_averages(folder: Path, context: Context) -> None:
    """Each window of each resource and kind is one series."""
    assert {
        ("cpu", "some", "10s"): 4.13,
        ("cpu", "some", "60s"): 2.96,
        ("cpu", "some", "300s"): 2.11,
        ("memory", "some", "10s"): 0.20,
        ("memory", "some", "60s"): 0.10,
        ("memory", "some", "300s"): 0.05,
        ("memory", "full", "10s"): 0.10,
        ("memory", "full", "60s"): 0.04,
        ("memory", "full", "300s"): 0.01,
        ("io", "some", "10s"): 0.94,
        ("io", "some", "60s"): 0.53,
        ("io", "some", "300s"): 0.42,
        ("io", "full", "10s"): 0.47,
        ("io", "full", "60s"): 0.33,
        ("io", "full", "300s"): 0.33,
        ("irq", "full", "10s"): 1.0,
        ("irq", "full", "60s"): 2.0,
        ("irq", "full", "300s"): 3.0,
    } == stalls(context, "pressure_stall_percent")


def test_totals_are_seconds(folder: Path, context: Context) -> None:
    """The kernel's microseconds since boot come as seconds; `full` of the processor means nothing and is left out."""
    assert {
        ("cpu", "some"): 925.704796,
        ("memory", "some"): 1.5,
        ("memory", "full"): 0.00025,
        ("io", "some"): 51.513882,
        ("io", "full"): 40.407988,
        ("irq", "full"): 4.0,
    } == stalls(context, "pressure_stall_seconds_total")


def test_the_labels_have_names(folder: Path, context: Context) -> None:
    """A series is told apart by resource, kind and window."""
    metric = next(iter(Pressure(PressureConfig(), context).collect()))
    assert {"resource": "cpu", "kind": "some", "window": "10s"} == dict(metric.labels)


def test_a_resource_the_kernel_does_not_account_is_left_out(folder: Path, context: Context) -> None:
    """Without IRQ time accounting there are the other three."""
    (folder / "irq").unlink()
    assert {"cpu", "memory", "io"} == {resource for resource, _ in stalls(context, "pressure_stall_seconds_total")}


def test_a_kernel_before_the_processors_full_line_is_read(folder: Path, context: Context) -> None:
    """Until Linux 5.13 the processor had one line."""
    (folder / "cpu").write_text(CPU.splitlines(keepends=True)[0])
    assert 925.704796 == stalls(context, "pressure_stall_seconds_total")["cpu", "some"]


def test_a_kernel_without_psi_is_no_data(context: Context) -> None:
    """Without /proc/pressure there is nothing to collect, and the reason says what to turn on."""
    with pytest.raises(NoData, match="CONFIG_PSI, or needs psi=1"):
        Pressure(PressureConfig(), context).collect()


def test_a_kernel_with_psi_switched_off_is_no_data(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files are there but answer EOPNOTSUPP, that is the same."""
    monkeypatch.setattr(procfs, "read", failing(errno.EOPNOTSUPP))
    with pytest.raises(NoData, match="psi=1"):
        Pressure(PressureConfig(), context).collect()


def test_another_failure_is_not_hidden(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read for any other reason is an error."""
    monkeypatch.setattr(procfs, "read", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        Pressure(PressureConfig(), context).collect()


@pytest.mark.skipif(not os.path.exists("/proc/pressure/cpu"), reason="this kernel has no PSI")
def test_this_machine_is_under_some_pressure() -> None:
    """On the real /proc, percentages lie within 0 and 100 and totals do not go back."""
    before = stalls(Context(), "pressure_stall_seconds_total")
    after = stalls(Context(), "pressure_stall_seconds_total")
    assert all(before[series] <= after[series] for series in before)
    assert all(0.0 <= share <= 100.0 for share in stalls(Context(), "pressure_stall_percent").values())


def failing(number: int) -> object:
    """Return a stand-in for procfs.read that fails with an errno."""

    def read(context: Context, path: str) -> bytes:
        raise OSError(number, os.strerror(number), path)

    return read
