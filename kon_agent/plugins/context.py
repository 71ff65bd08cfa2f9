"""What a collector is given besides its configuration: where the kernel's files are, the clocks, and its grants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kon_agent import clock


@dataclass(frozen=True, slots=True)
class Context:
    """The surroundings of one collector.

    Attributes:
        root: prefix of every path a collector reads; `/` in production, a fixture folder in tests.
        now_ns: the scheduling clock (never steps); rates are taken over it.
        wall_ns: wall time, for time stamps only.
        grants: read-only shared memory the supervisor handed to this plugin, by name: `counters` and `interfaces`
            for `ebpf`, `telemetry` for `agent`.
    """

    root: str = "/"
    now_ns: Callable[[], int] = clock.now_ns
    wall_ns: Callable[[], int] = clock.wall_ns
    grants: Mapping[str, memoryview] = field(default_factory=dict)

    def path(self, absolute: str) -> str:
        """Return `absolute` (for instance `/proc/stat`) below this context's root."""
        return self.root.rstrip("/") + absolute
