"""What the plugins that read a probe's rows have in common: rows or procfs, the word on which, and histograms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from kon_agent.bpf.origin import Origin, origin_of
from kon_agent.clock import NS_PER_S
from kon_agent.metric import Metric, MetricType
from kon_agent.plugins.context import Context


class Probed:
    """A collector that reads a probe's rows, or procfs where there are none.

    Args:
        plugin: its name.
        context: with the grants `rows` and `origin`; without them procfs is read.
    """

    def __init__(self, plugin: str, context: Context) -> None:
        self._plugin = plugin
        self._context = context
        self._origin = origin_of(context.grants)
        self._rows = context.grants.get("rows")

    def collect(self) -> Iterable[Metric]:
        """Return what was counted until now, and where the figures come from.

        Raises:
            BpfError: the rows are not what this version's programs write.
        """
        found = self._from_procfs() if self._rows is None else self._from_rows(self._rows)
        return [*origin_metrics(self._plugin, self._origin), *found]

    def _from_rows(self, rows: memoryview) -> Iterable[Metric]:
        raise NotImplementedError

    def _from_procfs(self) -> Iterable[Metric]:
        raise NotImplementedError


def histogram(
    name: str,
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float,
    labels: Mapping[str, str],
    type: MetricType = MetricType.EBPF_RAW,
) -> Iterator[Metric]:
    """Yield a histogram as Prometheus shapes it: `NAME_bucket{le}` cumulative, `NAME_sum`, `NAME_count`.

    Args:
        name: with its unit.
        bounds: upper bounds of all classes but the last, ascending, in the name's unit.
        counts: how many were seen in each class: one more than there are bounds.
        total: the sum of all that was seen, in the name's unit.
        labels: of every metric.
        type: of every metric.
    """
    uppers = [*(f"{bound:.7g}" for bound in bounds), "+Inf"]
    cumulative = list(accumulate(counts))
    for upper, count in zip(uppers, cumulative, strict=True):
        yield Metric(f"{name}_bucket", float(count), {**labels, "le": upper}, type)
    yield Metric(f"{name}_sum", total, dict(labels), type)
    yield Metric(f"{name}_count", float(cumulative[-1]), dict(labels), type)


def origin_metrics(plugin: str, origin: Origin) -> Iterator[Metric]:
    """Yield where a plugin's figures come from, and since when they count."""
    labels = {"plugin": plugin, "source": origin.source, "reason": origin.reason}
    yield Metric("ebpf_source", 1.0, labels, MetricType.AGENT_TELEMETRY)
    if origin.created_ns:
        created_s = origin.created_ns / NS_PER_S
        yield Metric("ebpf_counters_created_seconds", created_s, {"plugin": plugin}, MetricType.AGENT_TELEMETRY)
