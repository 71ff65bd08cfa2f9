"""What every process of the tree costs: CPU since the last measurement, and its proportional share of memory.

The supervisor alone may read the others' figures (they are not dumpable). CPU and resident memory are read at every
measurement, about 20 us each; PSS, for which the kernel walks the page tables, about 500 us, is read of one process
at a time, in turn, and of those first that have grown meanwhile.

What a process uses until its first sign of life, within bounds, is the cost of its start and told apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kon_agent.clock import NS_PER_S
from kon_agent.linux import procfs
from kon_agent.telemetry import ProcessSample

RATE_SPAN_S = 10.0  # what `cpu_percent` is an average over: two periods of most plugins
GROWN_BYTES = 4 << 20  # since its PSS was read: it is read again before others
START_CPU_S = 0.5  # what a worker's start may use; in a busy loop it would use more
SENDER_START_CPU_S = 2.0  # the network's and cryptography's libraries


@dataclass(frozen=True, slots=True)
class Subject:
    """A process to measure.

    Attributes:
        name: its role: `supervisor`, `sender`, `worker cpu`.
        pid: its process id.
        plugin: whose worker it is; empty for the others.
        is_starting: whether it has not shown life yet.
        start_cpu_s: what its start may use.
        has_programs: whether it may have started others, which count with it.
    """

    name: str
    pid: int
    plugin: str = ""
    is_starting: bool = False
    start_cpu_s: float = START_CPU_S
    has_programs: bool = False


@dataclass(slots=True)
class Account:
    """What is known of one process.

    Attributes:
        used_s: CPU since the measurement before, without `start_s`, the part that was its start.
        pss_bytes: its memory when it was last read; `is_exact`: not its resident set, for want of the right.
    """

    subject: Subject
    cpu_s: float = 0.0
    used_s: float = 0.0
    start_s: float = 0.0
    pss_bytes: int = 0
    is_exact: bool = True
    is_starting: bool = True
    start_left_s: float = 0.0
    resident_bytes: int = 0
    pss_resident_bytes: int = 0
    pss_at_ns: int = 0
    readings: deque[tuple[int, float]] = field(default_factory=deque)

    def percent(self) -> float:
        """Return its CPU over the last RATE_SPAN_S, percent of one core."""
        (then_ns, then_s), (now_ns, now_s) = self.readings[0], self.readings[-1]
        return 100 * NS_PER_S * (now_s - then_s) / (now_ns - then_ns) if now_ns > then_ns else 0.0


class Meter:
    """Remembers what it has measured of each process."""

    def __init__(self) -> None:
        self.samples: list[ProcessSample] = []
        self.span_s = 0.0
        self._accounts: dict[int, Account] = {}
        self._measured_ns: int | None = None

    @property
    def cpu_percent(self) -> float:
        """CPU of the whole tree over the last RATE_SPAN_S, percent of one core."""
        return sum(sample.cpu_percent for sample in self.samples)

    @property
    def pss_bytes(self) -> int:
        """Memory of the whole tree."""
        return sum(sample.pss_bytes for sample in self.samples)

    def measure(self, subjects: Iterable[Subject], now_ns: int) -> list[Account]:
        """Measure each process and return what is known of it; one that has gone meanwhile is left out."""
        is_first = self._measured_ns is None
        self.span_s = (now_ns - (self._measured_ns or now_ns)) / NS_PER_S
        self._measured_ns = now_ns
        known, self._accounts = self._accounts, {}
        for subject in subjects:
            account = known.get(subject.pid)
            if account is None or account.subject.name != subject.name:
                account = Account(subject, start_left_s=subject.start_cpu_s)
            try:
                self._read_cpu(account, subject, now_ns, is_first)
            except OSError:
                continue
            self._accounts[subject.pid] = account
        self._read_memory(now_ns)
        accounts = list(self._accounts.values())
        self.samples = [
            ProcessSample(each.subject.name, each.subject.pid, each.cpu_s, each.percent(), each.pss_bytes)
            for each in accounts
        ]
        return accounts

    def _read_cpu(self, account: Account, subject: Subject, now_ns: int, is_first: bool) -> None:
        pids = _family(subject)
        if subject.has_programs:
            cpu_s = procfs.read_family_cpu_seconds(subject.pid)
            for pid in pids[1:]:
                cpu_s += _or_zero(procfs.read_family_cpu_seconds, pid)
        else:
            cpu_s = procfs.read_cpu_seconds(subject.pid)
        account.resident_bytes = procfs.read_resident_bytes(subject.pid)
        for pid in pids[1:]:
            account.resident_bytes += int(_or_zero(procfs.read_resident_bytes, pid))
        cpu_s = max(cpu_s, account.cpu_s)  # a program that ended a moment ago is not in its parent's figure yet
        used_s = 0.0 if is_first else cpu_s - account.cpu_s
        account.start_s = min(used_s, account.start_left_s) if account.is_starting else 0.0
        account.start_left_s -= account.start_s
        account.used_s = used_s - account.start_s
        account.subject, account.cpu_s, account.is_starting = subject, cpu_s, subject.is_starting
        readings = account.readings
        readings.append((now_ns, cpu_s))
        while len(readings) > 2 and now_ns - readings[1][0] >= RATE_SPAN_S * NS_PER_S:
            readings.popleft()

    def _read_memory(self, now_ns: int) -> None:
        accounts = list(self._accounts.values())
        wanted = [each for each in accounts if not each.pss_at_ns]
        if not wanted and accounts:
            grown = [each for each in accounts if each.resident_bytes - each.pss_resident_bytes >= GROWN_BYTES]
            wanted = [min(grown or accounts, key=lambda each: each.pss_at_ns)]
        for account in wanted:
            try:
                account.pss_bytes, kind = procfs.read_pss_bytes(account.subject.pid)
            except OSError:
                del self._accounts[account.subject.pid]
                continue
            for pid in _family(account.subject)[1:]:
                account.pss_bytes += int(_or_zero(lambda pid: procfs.read_pss_bytes(pid)[0], pid))
            account.is_exact = kind == "pss"
            account.pss_at_ns, account.pss_resident_bytes = now_ns, account.resident_bytes


def _family(subject: Subject) -> list[int]:
    return [subject.pid, *(procfs.read_descendants(subject.pid) if subject.has_programs else ())]


def _or_zero(read: Callable[[int], float], pid: int) -> float:
    try:
        return read(pid)
    except OSError:  # ended since it was listed
        return 0.0
