"""The `runqlat` collector: how long tasks that could run waited for a CPU.

From ebpf/kon_runqlat.bpf.c: each wait is one observation, made when the task runs, on the CPU it runs on. A wait begins
when the task is woken or made, or when another one takes its place while it still wants to run.

    scheduler_run_queue_latency_seconds_bucket|sum|count    {cpu, le}    `cpu` if configured; CPUs that ran something
    scheduler_run_queue_missed_total                        {cpu}        waits whose beginning was not seen

Without BPF, from /proc/schedstat (Documentation/scheduler/sched-stats.rst), which needs CONFIG_SCHEDSTATS: the same sum
and count since boot, labelled `source="procfs"`, with the one bucket that has no bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from kon_agent.bpf.latency import BOUNDS_S, Latency, latency_of
from kon_agent.bpf.rows import sum_rows
from kon_agent.bpf.runqlat import MISSED, ROW_BYTES, SPEC
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import RunqlatConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context
from kon_agent.plugins.probed import Probed, histogram

NAME = "scheduler_run_queue_latency_seconds"
MISSED_NAME = "scheduler_run_queue_missed_total"

_RUN_DELAY, _TIMESLICES = 8, 9  # fields of a `cpu` line, its name being field 0; the same since version 14


class Runqlat(Probed):
    """Report how long tasks waited to run, per CPU or of the whole machine.

    Args:
        config: the plugin's section.
        context: with the grants `rows` and `origin`; without them /proc/schedstat is read.
    """

    def __init__(self, config: RunqlatConfig, context: Context) -> None:
        super().__init__("runqlat", context)
        self._per_cpu = config.per_cpu

    def _from_rows(self, rows: memoryview) -> Iterator[Metric]:
        cpus = SPEC.cpus_of(rows)
        if not self._per_cpu:
            yield from _row_metrics(sum_rows(rows, ROW_BYTES, 0, cpus), {})
            return
        for cpu in range(cpus):
            columns = sum_rows(rows, ROW_BYTES, cpu, 1)
            if any(columns):  # a possible CPU need not be there
                yield from _row_metrics(columns, {"cpu": str(cpu)})

    def _from_procfs(self) -> Iterator[Metric]:
        try:
            waits = _parse_schedstat(procfs.read(self._context, "/proc/schedstat"))
        except NoData:  # the origin is still told
            return
        if not self._per_cpu:
            waits = {"": _sum(waits.values())} if waits else {}
        for cpu, wait in waits.items():
            labels = {"cpu": cpu} if cpu else {}
            yield from histogram(NAME, (), wait.counts, wait.total_s, {**labels, "source": "procfs"})


def _row_metrics(columns: list[int], labels: Mapping[str, str]) -> Iterator[Metric]:
    wait = latency_of(columns)
    yield from histogram(NAME, BOUNDS_S, wait.counts, wait.total_s, labels)
    yield Metric(MISSED_NAME, float(columns[MISSED]), dict(labels), MetricType.EBPF_RAW)


def _sum(waits: Collection[Latency]) -> Latency:
    return Latency([sum(wait.counts[0] for wait in waits)], sum(wait.total_s for wait in waits))


def _parse_schedstat(text: bytes) -> dict[str, Latency]:
    """Return each CPU's waits: nanoseconds tasks have waited for it, and how many times they then ran."""
    waits: dict[str, Latency] = {}
    for line in text.decode().splitlines():
        fields = line.split()
        if fields and fields[0].startswith("cpu") and len(fields) > _TIMESLICES:
            count, delay_s = int(fields[_TIMESLICES]), int(fields[_RUN_DELAY]) / NS_PER_S
            waits[fields[0].removeprefix("cpu")] = Latency([count], delay_s)
    return waits
