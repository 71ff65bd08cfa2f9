"""The `pressure` collector: how much time tasks lost waiting for the processor, memory, I/O and interrupts.

Source: /proc/pressure (Documentation/accounting/psi.rst). `some` is the share of time in which at least one task
waited, `full` in which all that were not idle did.

* A resource the kernel does not account is left out: `irq` came with Linux 6.1 and needs IRQ time accounting.
* `full` of the processor means nothing for a whole machine; the kernel has only printed a zero since 5.13 (psi.rst).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from kon_agent.config.schema import PressureConfig
from kon_agent.errors import NoData
from kon_agent.metric import Metric
from kon_agent.plugins import procfs
from kon_agent.plugins.context import Context

RESOURCES = ("cpu", "memory", "io", "irq")

_WINDOWS = {b"avg10": "10s", b"avg60": "60s", b"avg300": "300s"}
_US_PER_S = 1_000_000


class Pressure:
    """Report `pressure_stall_percent{resource,kind,window}` and `pressure_stall_seconds_total{resource,kind}`."""

    def __init__(self, config: PressureConfig, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        """Return the stalls of every resource the kernel accounts.

        Raises:
            NoData: it accounts none.
        """
        metrics = [metric for resource in RESOURCES for metric in _parse(resource, self._read(resource))]
        if not metrics:
            raise NoData(
                f"{self._context.path('/proc/pressure')} accounts nothing: "
                "the kernel was built without CONFIG_PSI, or needs psi=1 on its command line"
            )
        return metrics

    def _read(self, resource: str) -> bytes:
        try:
            return procfs.read(self._context, f"/proc/pressure/{resource}")
        except NoData:
            return b""
        except OSError as err:
            if err.errno != errno.EOPNOTSUPP:  # CONFIG_PSI_DEFAULT_DISABLED or psi=0: the files are there, but mute
                raise
            return b""


def _parse(resource: str, text: bytes) -> Iterator[Metric]:
    """Yield one resource's metrics from lines of `some avg10=0.12 avg60=0.05 avg300=0.01 total=12345`."""
    for line in text.splitlines():
        word, *fields = line.split()
        kind = word.decode()
        if (resource, kind) == ("cpu", "full"):
            continue
        labels = {"resource": resource, "kind": kind}
        for field in fields:
            key, _, number = field.partition(b"=")
            if key in _WINDOWS:
                yield Metric("pressure_stall_percent", float(number), {**labels, "window": _WINDOWS[key]})
            elif key == b"total":
                yield Metric("pressure_stall_seconds_total", int(number) / _US_PER_S, labels)
