"""The rows of ebpf/kon_drops.bpf.c: what they are, and what the kernel calls its reasons. Mirrors ebpf/kon_drops.h.

    row     packets by reason: 0 to 239 the core's, 240 to 254 one for each other subsystem, 255 all above; u64 each,
            one row per CPU

The numbers differ from kernel to kernel; their names are enumerations in the kernel's BTF.
"""

from __future__ import annotations

from collections.abc import Mapping

from kon_agent.bpf import netns
from kon_agent.bpf.btf import Enumerators
from kon_agent.bpf.rows import ProbeSpec, sum_rows

CORE_REASONS = 240
COLUMNS = 256
OTHER_COLUMN = 255
ROW_BYTES = 2048
SETTINGS_BYTES = 8

REASONS, SUBSYSTEMS = "skb_drop_reason", "skb_drop_reason_subsys"
"""The enumerations."""

OTHER = "other"
NOT_SPECIFIED = "not_specified"
"""What a kernel before 5.17 knows of a drop: its successors' name for a drop nobody gave a reason for."""

_REASON_PREFIX, _SUBSYSTEM_PREFIX = "SKB_DROP_REASON_", "SKB_DROP_REASON_SUBSYS_"

SPEC = ProbeSpec("kon_drops", ROW_BYTES, settings_bytes=SETTINGS_BYTES, settings=netns.settings)

Names = dict[int, str]
"""Column to reason; a column that is not there counts no drops."""


def names(enums: Mapping[str, Enumerators]) -> Names:
    """Return the columns' names from the kernel's enumerations: lower case, without their prefix.

    Those without the prefix (SKB_NOT_DROPPED_YET, SKB_CONSUMED) are no drops. Without the enumeration of reasons, the
    kernel is one that gives none.
    """
    reasons = enums.get(REASONS, {})
    named = {OTHER_COLUMN: OTHER}
    for number in range(1, OTHER_COLUMN - CORE_REASONS + 1):
        called = enums.get(SUBSYSTEMS, {}).get(number, f"subsystem_{number}")
        named[CORE_REASONS + number - 1] = called.removeprefix(_SUBSYSTEM_PREFIX).lower()
    if not reasons:
        return {0: NOT_SPECIFIED, **named}
    for column in range(CORE_REASONS):
        called = reasons.get(column, f"{_REASON_PREFIX}reason_{column}")
        if called.startswith(_REASON_PREFIX):
            named[column] = called.removeprefix(_REASON_PREFIX).lower()
    return named


def numbered() -> Names:
    """Return names for a kernel whose own cannot be read: the numbers."""
    return {column: f"reason_{column}" for column in range(CORE_REASONS)} | {
        column: name for column, name in names({}).items() if column >= CORE_REASONS
    }


def read(rows: memoryview, named: Names) -> dict[str, int]:
    """Return the packets dropped by reason, over all CPUs.

    Raises:
        BpfError: these are not that object's rows.
    """
    columns = sum_rows(rows, ROW_BYTES, 0, SPEC.cpus_of(rows))
    return {name: columns[column] for column, name in sorted(named.items())}
