"""Counting a user's tasks."""

from __future__ import annotations

import os
import threading

from kon_agent.linux.tasks import count_tasks


def test_threads_count() -> None:
    """Each thread is one more, as RLIMIT_NPROC has it."""
    gate = threading.Barrier(4)
    threads = [threading.Thread(target=gate.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    counted = count_tasks(os.getuid())
    gate.wait()
    for thread in threads:
        thread.join()
    assert 4 <= counted


def test_a_user_without_processes() -> None:
    """Nobody has that number."""
    assert 0 == count_tasks(4_000_000_000)
