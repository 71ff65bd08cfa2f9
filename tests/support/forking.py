"""A body of the test in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def forked(body: Callable[[], object]) -> int:
    """Run `body` in a child that then exits; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
