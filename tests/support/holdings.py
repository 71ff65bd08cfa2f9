"""What a process holds: to see that restarts leave nothing behind."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path


def descriptors(pid: int) -> Counter[str]:
    """Return how many descriptors of each kind a process holds; numbers that tell two of a kind apart left out."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            kinds[os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0].removesuffix(" (deleted)")] += 1
    return kinds


def rings(pid: int) -> int:
    """Return how many mappings of rings a process has."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:kon-ring-")
