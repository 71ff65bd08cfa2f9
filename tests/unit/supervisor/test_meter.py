"""The meter's promises: rates over the interval, sums over the tree, and no error for whoever has gone."""

from __future__ import annotations

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.linux import procfs
from kon_agent.supervisor.meter import PSS_INTERVAL_S, Meter


class Kernel:
    """What /proc says of each process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpu_s: dict[int, float] = {}
        self.pss_bytes: dict[int, int] = {}
        self.pss_reads = 0
        self.refusal: type[OSError] = FileNotFoundError
        monkeypatch.setattr(procfs, "read_cpu_seconds", self.read_cpu_seconds)
        monkeypatch.setattr(procfs, "read_pss_bytes", self.read_pss_bytes)

    def read_cpu_seconds(self, pid: int) -> float:
        if pid not in self.cpu_s:
            raise self.refusal(pid)
        return self.cpu_s[pid]

    def read_pss_bytes(self, pid: int) -> tuple[int, str]:
        self.pss_reads += 1
        return self.pss_bytes[pid], "pss"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(monkeypatch)
    made.cpu_s, made.pss_bytes = {1: 10.0, 2: 5.0}, {1: 1000, 2: 500}
    return made


TREE = [("supervisor", 1), ("worker cpu", 2)]


def test_cpu_is_a_share_of_the_interval(kernel: Kernel) -> None:
    """What was used between two measurements, in percent of one core; nothing is known at the first."""
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    assert 0.0 == meter.cpu_percent
    kernel.cpu_s = {1: 10.5, 2: 5.1}
    meter.measure(TREE, 3 * NS_PER_S)
    assert pytest.approx([25.0, 5.0]) == [sample.cpu_percent for sample in meter.samples]
    assert pytest.approx(30.0) == meter.cpu_percent


def test_memory_is_the_sum_of_shares(kernel: Kernel) -> None:
    """PSS adds up over the tree."""
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    assert 1500 == meter.pss_bytes


def test_pss_is_read_rarely(kernel: Kernel) -> None:
    """The kernel walks page tables for it: once per interval and process is enough."""
    meter = Meter()
    for second in range(int(PSS_INTERVAL_S)):
        meter.measure(TREE, (1 + second) * NS_PER_S)
    assert 2 == kernel.pss_reads
    kernel.pss_bytes[1] = 2000
    meter.measure(TREE, int((1 + PSS_INTERVAL_S) * NS_PER_S))
    assert (4, 2500) == (kernel.pss_reads, meter.pss_bytes)


@pytest.mark.parametrize("refusal", [FileNotFoundError, ProcessLookupError])
def test_who_has_gone_is_left_out(kernel: Kernel, refusal: type[OSError]) -> None:
    """A process that died since it was listed is not there, and that is all."""
    kernel.refusal = refusal
    del kernel.cpu_s[2]
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    assert ["supervisor"] == [sample.name for sample in meter.samples]


def test_who_may_not_be_looked_at_is_left_out(kernel: Kernel) -> None:
    """Where /proc hides what is not dumpable (hidepid=1), or no descriptor is left, the agent goes on."""
    kernel.refusal = PermissionError
    del kernel.cpu_s[2]
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    assert ["supervisor"] == [sample.name for sample in meter.samples]


def test_a_successor_of_the_same_number_starts_anew(kernel: Kernel) -> None:
    """Nothing is remembered of who was missing at the last measurement."""
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    meter.measure(TREE[:1], 2 * NS_PER_S)
    kernel.cpu_s[2], kernel.pss_bytes[2] = 0.0, 1
    meter.measure(TREE, 3 * NS_PER_S)
    assert (0.0, 1) == (meter.samples[1].cpu_percent, meter.samples[1].pss_bytes)


def test_a_clock_that_stands_still_is_no_division(kernel: Kernel) -> None:
    """Two measurements at one instant give no rate."""
    meter = Meter()
    meter.measure(TREE, NS_PER_S)
    meter.measure(TREE, NS_PER_S)
    assert 0.0 == meter.cpu_percent
