"""A wall clock that tests can step, for a process tree whose own cannot be: it reads true time plus an offset.

Python imports a module of this name at its start where it finds one (docs.python.org, `site`). The offset, nanoseconds
as a native signed 64-bit word, is in the file that KON_TEST_CLOCK names; the mapping is inherited by every fork, so
that a step is seen by all processes at once, whatever they have given up since. The scheduling clock is left alone:
the kernel does not step that one either.
"""

from __future__ import annotations

import mmap
import os
import time

if path := os.environ.get("KON_TEST_CLOCK"):
    with open(path, "rb") as file:
        offset = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("q")
    true_ns = time.time_ns

    def stepped_ns() -> int:
        """Return wall time as the test wants it."""
        return true_ns() + offset[0]

    time.time_ns = stepped_ns
    time.time = lambda: stepped_ns() / 1e9
