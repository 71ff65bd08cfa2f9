"""Asking filesystems, some of which never answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from kon_agent.plugins.prober import MAX_THREADS, Prober

TIMEOUT_S = 0.2
DEADLINE_S = 10.0  # far beyond any wait that is not a bug

ANSWER = os.statvfs("/")


class Filesystems:
    """A statvfs whose paths can be made to hang; each remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._hanging: dict[str, threading.Event] = {}

    def hang(self, *paths: str) -> None:
        """Let these paths not answer."""
        self._hanging.update((path, threading.Event()) for path in paths)

    def heal(self) -> None:
        """Let every path answer again, and those who wait for one go on."""
        hanging, self._hanging = self._hanging, {}
        for event in hanging.values():
            event.set()

    def statvfs(self, path: str) -> os.statvfs_result:
        """Answer for `path`, once it does."""
        self.asked.append(path)
        if event := self._hanging.get(path):
            assert event.wait(DEADLINE_S)
        if path == "/denied":
            raise PermissionError(13, "Permission denied", path)
        return ANSWER


@pytest.fixture
def filesystems() -> Iterator[Filesystems]:
    """Yield filesystems; leave no thread waiting for one."""
    made = Filesystems()
    yield made
    made.heal()


def healed(prober: Prober, paths: list[str]) -> dict[str, object]:
    """Ask until nothing is stuck any more; return the last answers."""
    deadline = monotonic() + DEADLINE_S
    answers: dict[str, object] = dict(prober.ask(paths))
    while prober.stuck or len(answers) < len(paths):
        assert monotonic() < deadline
        answers = dict(prober.ask(paths))
    return answers


def test_every_healthy_path_answers(filesystems: Filesystems) -> None:
    """All answers come, from one thread however often it is asked."""
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    for _ in range(3):
        assert {"/a": ANSWER, "/b": ANSWER, "/c": ANSWER} == prober.ask(["/a", "/b", "/c"])
    assert 1 == prober.threads


def test_an_error_is_an_answer(filesystems: Filesystems) -> None:
    """A path that cannot be asked answers with its error, and is not stuck."""
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    answers = prober.ask(["/denied", "/a"])
    assert isinstance(answers["/denied"], PermissionError)
    assert (ANSWER, frozenset()) == (answers["/a"], prober.stuck)


def test_a_hanging_path_does_not_stop_the_others(filesystems: Filesystems) -> None:
    """The paths after one that hangs answer in the same cycle; it is stuck."""
    filesystems.hang("/dead")
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    assert {"/a", "/b"} == prober.ask(["/a", "/dead", "/b"]).keys()
    assert frozenset({"/dead"}) == prober.stuck


def test_a_stuck_path_is_not_asked_again(filesystems: Filesystems) -> None:
    """However many cycles pass, one thread hangs on one path, and one more serves the others."""
    filesystems.hang("/dead")
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    for _ in range(3):
        assert {"/a"} == prober.ask(["/dead", "/a"]).keys()
    assert (1, 2) == (filesystems.asked.count("/dead"), prober.threads)


def test_a_stuck_path_costs_no_time_later(filesystems: Filesystems) -> None:
    """Once known as stuck, a path delays the others no more."""
    filesystems.hang("/dead")
    prober = Prober(filesystems.statvfs, 2 * TIMEOUT_S)
    prober.ask(["/dead", "/a"])
    started = monotonic()
    for _ in range(5):
        prober.ask(["/dead", "/a"])
    assert 2 * TIMEOUT_S > monotonic() - started


def test_a_path_that_answers_again_is_asked_again(filesystems: Filesystems) -> None:
    """Once the stuck call returns, the path is served like any other, and the spare thread goes."""
    filesystems.hang("/dead")
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    prober.ask(["/dead", "/a"])
    filesystems.heal()
    assert {"/dead": ANSWER, "/a": ANSWER} == healed(prober, ["/dead", "/a"])
    assert 1 == prober.threads


def test_a_late_answer_nobody_asked_for_is_dropped(filesystems: Filesystems) -> None:
    """A path that is asked no more (unmounted while it hung) is in no answer, whenever its call returns."""
    filesystems.hang("/dead")
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    prober.ask(["/dead", "/a"])
    filesystems.heal()
    assert {"/a": ANSWER} == healed(prober, ["/a"])


def test_many_hanging_paths_share_one_timeout(filesystems: Filesystems) -> None:
    """Several that hang are all found out within one timeout, and those after them still answer."""
    dead = [f"/dead{number}" for number in range(MAX_THREADS - 1)]
    filesystems.hang(*dead)
    prober = Prober(filesystems.statvfs, 1.0)
    started = monotonic()
    assert {"/a"} == prober.ask([*dead, "/a"]).keys()
    assert 2.0 > monotonic() - started  # seven timeouts in a row would be 7 s
    assert frozenset(dead) == prober.stuck


def test_threads_are_bounded(filesystems: Filesystems) -> None:
    """With MAX_THREADS paths hanging no other is asked, nor called stuck; all recover together."""
    dead = [f"/dead{number}" for number in range(MAX_THREADS + 3)]
    filesystems.hang(*dead)
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    for _ in range(3):
        assert {} == prober.ask([*dead, "/a"])
    assert (MAX_THREADS, frozenset(dead[:MAX_THREADS])) == (prober.threads, prober.stuck)
    filesystems.heal()
    assert {*dead, "/a"} == healed(prober, [*dead, "/a"]).keys()
    assert 1 == prober.threads


def test_where_all_hang_nobody_waits(filesystems: Filesystems) -> None:
    """With every thread hanging, a cycle returns at once instead of after its timeout."""
    dead = [f"/dead{number}" for number in range(MAX_THREADS)]
    filesystems.hang(*dead)
    prober = Prober(filesystems.statvfs, 2 * TIMEOUT_S)
    prober.ask(dead)
    started = monotonic()
    for _ in range(5):
        prober.ask([*dead, "/a"])
    assert 2 * TIMEOUT_S > monotonic() - started


def test_a_refused_thread_is_a_bound(filesystems: Filesystems, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows no second thread, the first goes on serving what it can."""
    prober = Prober(filesystems.statvfs, TIMEOUT_S)
    prober.ask(["/a"])
    filesystems.hang("/dead")
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    assert {"/a"} == prober.ask(["/a", "/dead", "/b"]).keys()
    assert {} == prober.ask(["/a", "/dead", "/b"])
    filesystems.heal()
    assert {"/a", "/dead", "/b"} == healed(prober, ["/a", "/dead", "/b"]).keys()


def test_no_thread_at_all_is_an_error(filesystems: Filesystems, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one thread can be started, that is said instead of reporting nothing for ever."""
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    with pytest.raises(RuntimeError, match="thread"):
        Prober(filesystems.statvfs, TIMEOUT_S).ask(["/a"])


def _refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
