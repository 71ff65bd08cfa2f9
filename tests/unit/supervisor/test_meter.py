"""The meter's promises: rates over an interval, sums over the tree, starts told apart, no error for who has gone."""

from __future__ import annotations

import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.linux import procfs
from kon_agent.supervisor.meter import GROWN_BYTES, RATE_SPAN_S, START_CPU_S, Meter, Subject

SUPERVISOR, WORKER = 1, 2


class Kernel:
    """What /proc says of each process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpu_s: dict[int, float] = {SUPERVISOR: 10.0, WORKER: 5.0}
        self.pss_bytes: dict[int, int] = {SUPERVISOR: 1000, WORKER: 500}
        self.resident_bytes: dict[int, int] = {}
        self.descendants: dict[int, list[int]] = {}
        self.pss_reads: list[int] = []
        self.kind = "pss"
        self.refusal: type[OSError] = FileNotFoundError
        monkeypatch.setattr(procfs, "read_cpu_seconds", self.read_cpu_seconds)
        monkeypatch.setattr(procfs, "read_family_cpu_seconds", self.read_cpu_seconds)
        monkeypatch.setattr(procfs, "read_pss_bytes", self.read_pss_bytes)
        monkeypatch.setattr(procfs, "read_resident_bytes", lambda pid: self.resident_bytes.get(pid, 0))
        monkeypatch.setattr(procfs, "read_descendants", lambda pid: self.descendants.get(pid, []))

    def read_cpu_seconds(self, pid: int) -> float:
        if pid not in self.cpu_s:
            raise self.refusal(pid)
        return self.cpu_s[pid]

    def read_pss_bytes(self, pid: int) -> tuple[int, str]:
        self.pss_reads.append(pid)
        return self.pss_bytes[pid], self.kind


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


TREE = [Subject("supervisor", SUPERVISOR), Subject("worker cpu", WORKER, "cpu")]


def at(second: float) -> int:
    """Return a time."""
    return int((1000 + second) * NS_PER_S)


def test_cpu_is_a_share_of_the_interval(kernel: Kernel) -> None:
    """What was used between two measurements, in percent of one core; nothing is known at the first."""
    meter = Meter()
    meter.measure(TREE, at(0))
    assert 0.0 == meter.cpu_percent
    kernel.cpu_s = {SUPERVISOR: 10.5, WORKER: 5.1}
    meter.measure(TREE, at(2))
    assert pytest.approx([25.0, 5.0]) == [sample.cpu_percent for sample in meter.samples]
    assert pytest.approx(30.0) == meter.cpu_percent


def test_a_rate_is_an_average_over_some_seconds(kernel: Kernel) -> None:
    """One busy second shows for RATE_SPAN_S, and then no more."""
    meter = Meter()
    meter.measure(TREE, at(0))
    kernel.cpu_s[WORKER] += 1.0
    seen = []
    for second in range(1, 2 + int(RATE_SPAN_S)):
        meter.measure(TREE, at(second))
        seen.append(meter.cpu_percent)
    assert pytest.approx([100.0, 50.0, 10.0, 0.0]) == [seen[0], seen[1], *seen[-2:]]


def test_what_was_used_since_the_last_measurement_is_told(kernel: Kernel) -> None:
    """By each process, in seconds; nothing is held against what was there before the first."""
    meter = Meter()
    assert [0.0, 0.0] == [account.used_s for account in meter.measure(TREE, at(0))]
    kernel.cpu_s[WORKER] += 0.25
    assert [0.0, 0.25] == [account.used_s for account in meter.measure(TREE, at(1))]
    assert 1.0 == meter.span_s


def test_the_cost_of_a_start_is_told_apart(kernel: Kernel) -> None:
    """Until the measurement after its first sign of life, what a process uses is its start's; then no more."""
    meter = Meter()
    meter.measure(TREE[:1], at(0))
    kernel.cpu_s[WORKER] = 0.2
    starting = [TREE[0], Subject("worker cpu", WORKER, "cpu", is_starting=True)]
    account = meter.measure(starting, at(1))[1]
    assert (0.0, 0.2) == (account.used_s, account.start_s)
    kernel.cpu_s[WORKER] = 0.25
    account = meter.measure(TREE, at(2))[1]
    assert pytest.approx((0.0, 0.05)) == (account.used_s, account.start_s)
    kernel.cpu_s[WORKER] = 0.3
    account = meter.measure(TREE, at(3))[1]
    assert pytest.approx((0.05, 0.0)) == (account.used_s, account.start_s)


def test_a_start_costs_no_more_than_a_start(kernel: Kernel) -> None:
    """Whoever is in a busy loop from its first cycle on is found out."""
    meter = Meter()
    meter.measure(TREE[:1], at(0))
    kernel.cpu_s[WORKER] = 3.0
    account = meter.measure([Subject("worker cpu", WORKER, "cpu", is_starting=True)], at(3))[0]
    assert (3.0 - START_CPU_S, START_CPU_S) == (account.used_s, account.start_s)


def test_the_programs_of_a_worker_count_with_it(kernel: Kernel) -> None:
    """Their CPU and their memory are the worker's; one that ends takes nothing away."""
    kernel.descendants, kernel.cpu_s[3], kernel.pss_bytes[3] = {WORKER: [3]}, 2.0, 70
    tree = [Subject("worker x", WORKER, "x", has_programs=True)]
    meter = Meter()
    meter.measure(tree, at(0))
    assert 570 == meter.pss_bytes
    kernel.cpu_s[3] = 2.5
    assert [0.5] == [account.used_s for account in meter.measure(tree, at(1))]
    del kernel.cpu_s[3]  # it has ended, and its parent has not waited for it yet
    assert [0.0] == [account.used_s for account in meter.measure(tree, at(2))]
    kernel.descendants, kernel.cpu_s[WORKER] = {}, 7.5
    assert [0.0] == [account.used_s for account in meter.measure(tree, at(3))]


def test_memory_is_the_sum_of_shares(kernel: Kernel) -> None:
    """PSS adds up over the tree."""
    meter = Meter()
    meter.measure(TREE, at(0))
    assert 1500 == meter.pss_bytes


def test_pss_is_read_of_one_process_at_a_time(kernel: Kernel) -> None:
    """The kernel walks page tables for it: of a new process at once, then in turn."""
    meter = Meter()
    meter.measure(TREE, at(0))
    kernel.pss_reads.clear()
    for second in range(1, 5):
        meter.measure(TREE, at(second))
    assert [SUPERVISOR, WORKER, SUPERVISOR, WORKER] == kernel.pss_reads


def test_who_has_grown_is_read_first(kernel: Kernel) -> None:
    """A leak is seen at the next measurement, not when its turn comes."""
    meter = Meter()
    meter.measure(TREE, at(0))
    kernel.pss_reads.clear()
    for second in range(1, 3):
        kernel.resident_bytes[WORKER] = second * GROWN_BYTES
        kernel.pss_bytes[WORKER] = second * GROWN_BYTES
        meter.measure(TREE, at(second))
    assert [WORKER, WORKER] == kernel.pss_reads
    assert 1000 + 2 * GROWN_BYTES == meter.pss_bytes


def test_what_is_no_pss_is_known_as_such(kernel: Kernel) -> None:
    """Without the right to read it, the resident set stands in, and does not add up."""
    kernel.kind = "rss"
    assert [False, False] == [account.is_exact for account in Meter().measure(TREE, at(0))]


@pytest.mark.parametrize("refusal", [FileNotFoundError, ProcessLookupError, PermissionError])
def test_who_cannot_be_looked_at_is_left_out(kernel: Kernel, refusal: type[OSError]) -> None:
    """A process that has died since, or that /proc hides (hidepid=1), is not there, and that is all."""
    kernel.refusal = refusal
    del kernel.cpu_s[WORKER]
    meter = Meter()
    meter.measure(TREE, at(0))
    assert ["supervisor"] == [sample.name for sample in meter.samples]


def test_a_successor_of_the_same_number_starts_anew(kernel: Kernel) -> None:
    """Nothing is remembered of who was missing at the last measurement."""
    meter = Meter()
    meter.measure(TREE, at(0))
    meter.measure(TREE[:1], at(1))
    kernel.cpu_s[WORKER], kernel.pss_bytes[WORKER] = 0.0, 1
    meter.measure(TREE, at(2))
    assert (0.0, 1) == (meter.samples[1].cpu_percent, meter.samples[1].pss_bytes)


def test_a_clock_that_stands_still_is_no_division(kernel: Kernel) -> None:
    """Two measurements at one instant give no rate."""
    meter = Meter()
    meter.measure(TREE, at(0))
    meter.measure(TREE, at(0))
    assert 0.0 == meter.cpu_percent
