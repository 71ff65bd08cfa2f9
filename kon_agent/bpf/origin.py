"""Where a plugin's figures come from: BPF programs of ours in the kernel, or else procfs, and why.

Said by the supervisor, which has tried, to the worker, which reports it: as JSON in a grant, fixed when the worker is
forked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from kon_agent.errors import BpfError

GRANT = "origin"
MAX_REASON_CHARS = 120  # it becomes a label: enough for an errno and what to do


class Origin(msgspec.Struct, frozen=True):
    """Where the figures come from.

    Attributes:
        source: `bpf`, or `procfs` where BPF cannot be had.
        reason: why not; empty for `bpf`.
        created_ns: when the counters were at zero, in ns of wall time; 0: not known.
        left_out: programs this kernel has no place for: what they count is not there.
    """

    source: Literal["bpf", "procfs"]
    reason: str = ""
    created_ns: int = 0
    left_out: list[str] = []

    @classmethod
    def without_bpf(cls, reason: str) -> Origin:
        """Return that of procfs, with a reason of any length."""
        return cls("procfs", reason[:MAX_REASON_CHARS])

    def grant(self) -> dict[str, memoryview]:
        """Return it as a plugin is granted it."""
        return {GRANT: memoryview(msgspec.json.encode(self))}


def origin_of(grants: Mapping[str, memoryview]) -> Origin:
    """Return what the supervisor says in a plugin's grants.

    Raises:
        BpfError: that is not what a supervisor says.
    """
    said = grants.get(GRANT)
    if said is None:
        return Origin("procfs", "no BPF is granted here")
    try:
        return msgspec.json.decode(said, type=Origin)
    except msgspec.MsgspecError as err:
        raise BpfError(f"the origin of the figures is not what a supervisor says: {err}") from err
