"""The `process` collector: who uses the processors and the memory, and how many processes there are.

Source: /proc/PID/stat (proc(5)), read once per process and cycle. Reported by name are the processes that used
the most CPU time since the last cycle and those with the most resident memory, `top` of each; of all others
the sum. The command line is never looked at: it may hold secrets.

The resident memory in stat is an estimate (proc(5)), off by up to some dozen pages per processor; of the few
processes that are reported it is read again from statm, which newer kernels sum up exactly.

Invariants:
* The reported processes and `other` together are everything seen: nothing is counted twice or left out.
* A process is its pid and its start time: a pid used again is another process.
* CPU time is what was used since the last cycle. A process that started since then has used all it has; one
  that is older and yet was not seen before (hidden, or beyond MAX_PROCESSES) counts from the next cycle on.
* One that ends during the scan is not there; one we may not read is counted in `process_omitted`.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ProcessConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins.context import Context

log = logging.getLogger(__name__)

MAX_PROCESSES = 10_000  # about a quarter of a second of one core; those with higher pids are only counted
MAX_STAT_BYTES = 4096  # 52 numbers of at most 20 digits and a name of at most 64 bytes

STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "blocked",
    "I": "idle",
    "Z": "zombie",
    "T": "stopped",
    "t": "stopped",
}
"""The state letter (proc(5)) to its name; `blocked` cannot be interrupted, `idle` is a kernel thread at rest."""
OTHER_STATE = "other"

# Places in /proc/PID/stat, counted from the state behind the name (proc(5) counts it as field 3).
_STATE, _UTIME, _STIME, _THREADS, _STARTTIME, _RSS = 0, 11, 12, 17, 19, 21

# A kernel worker's name ends in what it last did (kworker/u8:3-events_unbound): another series every cycle.
_KWORKER_DEED = re.compile(r"^(kworker/u?\d+:\w+)[-+].*", re.DOTALL)

Identity = tuple[int, int]
"""A process id and the start time, in ticks since boot, of the process that has it."""


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What one process's stat file said.

    Attributes:
        identity: the process.
        name: the name the process gave itself, raw.
        state: the state's name, of STATES.
        ticks: CPU time used since it started, user and system, in clock ticks.
        threads: how many threads it has.
        resident_pages: its resident memory.
    """

    identity: Identity
    name: bytes
    state: str
    ticks: int
    threads: int
    resident_pages: int


class Scan(msgspec.Struct, frozen=True):
    """All that was seen at one moment: the readings, and how many processes were listed but not read."""

    at_ns: int
    readings: list[Reading]
    omitted: int
    is_partial: bool


class Process:
    """Report the largest processes by CPU and memory, the sum of the others, and the numbers by state."""

    def __init__(self, config: ProcessConfig, context: Context) -> None:
        self._top = config.top
        self._context = context
        self._folder = context.path("/proc")
        self._ticks: dict[Identity, int] = {}
        self._newest = -1  # no baseline: nothing counts as started since
        self._at_ns = 0
        self._was_partial = False
        self._percent_per_tick_ns = 100.0 * NS_PER_S / os.sysconf("SC_CLK_TCK")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        """Take the baseline, so that the first cycle already reports a real interval."""
        self._remember(self._scan())

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of the interval since the last call.

        Raises:
            NoData: /proc shows no process at all.
        """
        scan = self._scan()
        if not scan.readings:
            raise NoData(f"{self._folder} shows no process")
        self._tell_partial(scan)
        used = self._used(scan)
        self._remember(scan)
        return [*self._sizes(scan.readings, used), *_numbers(scan)]

    def _sizes(self, readings: list[Reading], used: dict[Identity, float] | None) -> Iterator[Metric]:
        """Yield the top processes' figures and the others' sums; no CPU figures without an interval."""
        percents = used or {}
        chosen = _largest(readings, percents, self._top)
        for reading in chosen.values():
            labels = {"pid": str(reading.identity[0]), "name": printable_name(reading.name)}
            if used is not None:
                yield Metric("process_cpu_percent", used[reading.identity], labels, MetricType.OTHER)
            resident_bytes = self._resident_pages(reading) * self._page_bytes
            yield Metric("process_resident_bytes", resident_bytes, labels, MetricType.OTHER)
            yield Metric("process_threads", reading.threads, labels, MetricType.OTHER)
        others = [reading for reading in readings if reading.identity not in chosen]
        if used is not None:
            percent = sum(used[other.identity] for other in others)
            yield Metric("process_other_cpu_percent", percent, {}, MetricType.OTHER)
        pages = sum(other.resident_pages for other in others)
        yield Metric("process_other_resident_bytes", pages * self._page_bytes, {}, MetricType.OTHER)

    def _used(self, scan: Scan) -> dict[Identity, float] | None:
        """Return each process's CPU use in percent of one core; None where no time has passed."""
        passed_ns = scan.at_ns - self._at_ns
        if self._newest < 0 or passed_ns <= 0:
            return None
        scale = self._percent_per_tick_ns / passed_ns
        used = {}
        for reading in scan.readings:
            # Nobody seen last time had started later than `_newest`; whoever has is new.
            unseen = 0 if reading.identity[1] > self._newest else reading.ticks
            before = self._ticks.get(reading.identity, unseen)
            used[reading.identity] = max(0, reading.ticks - before) * scale
        return used

    def _remember(self, scan: Scan) -> None:
        self._ticks = {reading.identity: reading.ticks for reading in scan.readings}
        self._newest = max((reading.identity[1] for reading in scan.readings), default=-1)
        self._at_ns = scan.at_ns

    def _scan(self) -> Scan:
        at_ns = self._context.now_ns()
        pids = [name for name in os.listdir(self._folder) if name.isdigit()]
        readings = []
        omitted = max(0, len(pids) - MAX_PROCESSES)
        for pid in pids[:MAX_PROCESSES]:
            try:
                text = self._read(pid, "stat")
            except (FileNotFoundError, ProcessLookupError):  # it has ended since
                continue
            except PermissionError:  # /proc mounted with hidepid=1 (noaccess)
                omitted += 1
                continue
            readings.append(_parse_stat(text))
        # The first process of a pid namespace lives as long as the namespace: unseen, it is hidden from us.
        is_partial = all(reading.identity[0] != 1 for reading in readings)
        return Scan(at_ns, readings, omitted, is_partial)

    def _resident_pages(self, reading: Reading) -> int:
        try:
            return int(self._read(str(reading.identity[0]), "statm").split()[1])  # total resident shared …
        except OSError:  # it has ended since
            return reading.resident_pages

    def _read(self, pid: str, name: str) -> bytes:
        # Without a file object, which would cost as much as the reading itself.
        fd = os.open(f"{self._folder}/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, MAX_STAT_BYTES)
        finally:
            os.close(fd)

    def _tell_partial(self, scan: Scan) -> None:
        if scan.is_partial and not self._was_partial:
            log.warning(
                "%s hides processes from this user (hidepid, proc(5)): figures are of the %d it shows",
                self._folder,
                len(scan.readings),
            )
        self._was_partial = scan.is_partial


def _parse_stat(text: bytes) -> Reading:
    """Return what a stat file says; the name in it may hold anything, parentheses and newlines included."""
    opening, closing = text.index(b"("), text.rindex(b")")
    fields = text[closing + 1 :].split(None, _RSS + 1)
    return Reading(
        identity=(int(text[:opening]), int(fields[_STARTTIME])),
        name=text[opening + 1 : closing],
        state=STATES.get(fields[_STATE].decode(), OTHER_STATE),
        ticks=int(fields[_UTIME]) + int(fields[_STIME]),
        threads=int(fields[_THREADS]),
        resident_pages=int(fields[_RSS]),
    )


def _largest(readings: list[Reading], used: dict[Identity, float], top: int) -> dict[Identity, Reading]:
    """Return the `top` by CPU and the `top` by memory; those that use none of it are in no top."""
    busy = [reading for reading in readings if used.get(reading.identity)]
    resident = [reading for reading in readings if reading.resident_pages > 0]
    chosen = heapq.nlargest(top, busy, key=lambda reading: used[reading.identity])
    chosen += heapq.nlargest(top, resident, key=lambda reading: reading.resident_pages)
    return {reading.identity: reading for reading in chosen}


def _numbers(scan: Scan) -> Iterator[Metric]:
    """Yield how many processes there are, by state, and how many threads; every state, every time."""
    states = Counter(reading.state for reading in scan.readings)
    for state in dict.fromkeys((*STATES.values(), OTHER_STATE)):
        yield Metric("process_count", states[state], {"state": state}, MetricType.OTHER)
    threads = sum(reading.threads for reading in scan.readings)
    yield Metric("process_threads_count", threads, {}, MetricType.OTHER)
    yield Metric("process_omitted", scan.omitted, {}, MetricType.OTHER)


def printable_name(raw: bytes) -> str:
    """Return a process's name as a label: UTF-8, every other byte and control character replaced."""
    name = _KWORKER_DEED.sub(r"\1", raw.decode("utf-8", "replace"))
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
