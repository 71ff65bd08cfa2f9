"""The prober: ask filesystems for their size without ever being held up by one that does not answer.

A dead NFS server or FUSE daemon keeps its caller in statvfs(2) for ever, and nothing in user space can end
that. So the question is put by daemon threads that take mount points from a queue and put answers on another:

    ask() ── mount points ──▶ [_todo] ──▶ thread, thread, … ──▶ [_answers] ──▶ ask()

Invariants:
* A healthy system has one thread, made once. Another is started only where no answer has come for a share of
  the timeout, so a mount that hangs delays the others by that share, once.
* A mount point that was asked and has not answered is not asked again: one thread at most hangs on it.
* At most MAX_THREADS exist. Where all hang, the remaining mount points are not asked, and not called stuck
  either.
* `ask` returns within the timeout.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable

from kon_agent import clock

MAX_THREADS = 8  # so many mounts may hang before the others are no longer asked; each costs about 50 KB

Statvfs = Callable[[str], os.statvfs_result]
Answer = os.statvfs_result | OSError


class Prober:
    """Ask `statvfs` about many paths, within `timeout_s` for all of them together."""

    def __init__(self, statvfs: Statvfs, timeout_s: float) -> None:
        self._statvfs = statvfs
        self._timeout_ns = int(timeout_s * clock.NS_PER_S)
        self._patience_ns = self._timeout_ns // (MAX_THREADS + 1)  # every thread gets its chance in time
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        self._unanswered: set[str] = set()
        self._threads = 0

    @property
    def stuck(self) -> frozenset[str]:
        """The paths that were asked and have not answered."""
        return frozenset(self._unanswered)

    @property
    def threads(self) -> int:
        """How many threads there are, stuck ones included."""
        return self._threads

    def ask(self, paths: Iterable[str]) -> dict[str, Answer]:
        """Return what each path answered: its statvfs result, or the error it met. A stuck one is missing.

        Raises:
            RuntimeError: the system lets this process start no thread at all.
        """
        self._take_late_answers()
        wanted = dict.fromkeys(paths)
        asked = [path for path in wanted if path not in self._unanswered]
        if not asked:
            return {}
        if not self._has_idle_thread():
            self._start_thread()
        if not self._has_idle_thread():
            return {}  # MAX_THREADS hang: waiting for them would cost the timeout in every cycle
        self._unanswered.update(asked)
        for path in asked:
            self._todo.put(path)
        answered = self._await_answers(set(asked))
        self._take_back_unasked()
        self._dismiss_idle_threads()
        # A call of an earlier cycle may have returned just now: as good an answer, if it is still asked for.
        return {path: answer for path, answer in answered.items() if path in wanted}

    def _await_answers(self, awaited: set[str]) -> dict[str, Answer]:
        answered: dict[str, Answer] = {}
        deadline_ns = clock.now_ns() + self._timeout_ns
        while awaited and (left_ns := deadline_ns - clock.now_ns()) > 0:
            try:
                path, answer = self._answers.get(timeout=min(left_ns, self._patience_ns) / clock.NS_PER_S)
            except queue.Empty:
                if not self._todo.empty():
                    self._start_thread()
                continue
            self._unanswered.discard(path)
            awaited.discard(path)
            answered[path] = answer
        return answered

    def _take_late_answers(self) -> None:
        """Let go of what has answered since: it is asked again like any other."""
        while not self._answers.empty():
            self._unanswered.discard(self._answers.get()[0])

    def _take_back_unasked(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                path = self._todo.get_nowait()
                if path is None:
                    self._threads += 1  # nobody was idle enough to take that dismissal
                else:
                    self._unanswered.discard(path)

    def _dismiss_idle_threads(self) -> None:
        """Keep one thread besides the stuck ones."""
        while self._threads > len(self._unanswered) + 1:
            self._todo.put(None)
            self._threads -= 1

    def _has_idle_thread(self) -> bool:
        return self._threads > len(self._unanswered)

    def _start_thread(self) -> None:
        if self._threads >= MAX_THREADS:
            return
        try:
            threading.Thread(target=self._answer, name="statvfs", daemon=True).start()
        except RuntimeError:  # RLIMIT_NPROC: as good as MAX_THREADS, as long as there is one
            if self._threads == 0:
                raise
            return
        self._threads += 1

    def _answer(self) -> None:
        while (path := self._todo.get()) is not None:
            answer: Answer
            try:
                answer = self._statvfs(path)
            except OSError as err:
                answer = err
            self._answers.put((path, answer))
