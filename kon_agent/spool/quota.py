"""The quota: how much of `cache.max_size` is for segments, and what an entry costs at the worst. Pure.

    max_bytes = the folder itself, its lock and the state file | the reserve | segments

The reserve is kept free so that what remains of a segment can be declared lost before it is removed: in a new segment
at the worst, with that one's header and summary.
"""

from __future__ import annotations

from collections.abc import Sequence

from kon_agent.spool.disk import BLOCK_BYTES, NAME_BYTES, on_disk
from kon_agent.spool.frame import HEAD_BYTES
from kon_agent.spool.limits import Limits
from kon_agent.spool.portion import Portion
from kon_agent.spool.segment import MAX_INDEX_BYTES, Segment

RESERVE_BYTES = on_disk(3 * (HEAD_BYTES + MAX_INDEX_BYTES)) + BLOCK_BYTES
STATE_BYTES = on_disk(HEAD_BYTES + MAX_INDEX_BYTES)


def for_segments(limits: Limits, names: int) -> int:
    """Return how much segments and the reserve may take in a folder of `names` files."""
    folder = on_disk(BLOCK_BYTES + NAME_BYTES * names)
    return limits.max_bytes - folder - BLOCK_BYTES - STATE_BYTES


def cost(portions: Sequence[Portion], last: Segment | None) -> int:
    """Return what `portions` take on disk at most: each may begin a segment, which repeats the last one's index."""
    index = last.contents.index_bytes if last and last.contents else 0
    index = min(MAX_INDEX_BYTES, index + sum(portion.index_bytes for portion in portions))
    return sum(on_disk(portion.size + 2 * (HEAD_BYTES + index)) + BLOCK_BYTES for portion in portions)
