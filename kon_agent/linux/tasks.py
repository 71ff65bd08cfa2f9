"""How many tasks, that is threads of any process, a user has: what RLIMIT_NPROC counts (getrlimit(2))."""

from __future__ import annotations

import os

from kon_agent.linux import procfs


def count_tasks(uid: int) -> int:
    """Return how many tasks of user `uid` this process can see in /proc."""
    tasks = 0
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            status = procfs.read_status(pid)
        except OSError:  # it has ended meanwhile
            continue
        if int(status.get("Uid", "-1").split()[0]) == uid:
            tasks += int(status.get("Threads", "1"))
    return tasks
