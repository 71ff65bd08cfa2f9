"""What the plugins that read BPF rows have in common: histograms, and the word on where their figures come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from kon_agent.bpf.origin import Origin
from kon_agent.clock import NS_PER_S
from kon_agent.metric import Metric, MetricType


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
