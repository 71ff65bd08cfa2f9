"""Where a child imports from. (With a real change of user: test_process.)"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kon_agent import importpath


@pytest.mark.parametrize(
    ("expected", "folder"),
    [
        ("/proc/self/fd/3", "/home/x"),
        ("/proc/self/fd/3/pkg", "/home/x/pkg"),
        ("/proc/self/fd/4/pkg", "/home/x/site/pkg"),
        ("/home/xyz/pkg", "/home/xyz/pkg"),
        ("/usr/lib/pkg", "/usr/lib/pkg"),
    ],
)
def test_the_longest_place_wins_at_a_folder_boundary(expected: str, folder: str) -> None:
    """A package moves with the innermost place that holds it, never with a mere prefix of its name."""
    moved = {"/home/x": "/proc/self/fd/3", "/home/x/site": "/proc/self/fd/4"}
    assert expected == importpath.relocate(folder, moved)


def test_only_existing_places_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zipped library that does not exist, the root, and repetitions are skipped; our own package is held."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/nonexistent/python311.zip", "/", str(tmp_path) + "/"])
    held = importpath.hold()
    for fd in held.values():
        os.close(fd)
    assert [str(tmp_path), importpath._PACKAGE] == list(held)


def test_the_current_folder_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon started in somebody's home does not hand that home to its children."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    held = importpath.hold()
    for fd in held.values():
        os.close(fd)
    assert [importpath._PACKAGE] == list(held)


def test_reachable_places_stay_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user can read everything, sys.path keeps its names and no descriptor stays open."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    before = set(os.listdir("/proc/self/fd"))
    assert () == importpath.adopt(importpath.hold())
    assert [str(tmp_path)] == sys.path
    assert before == set(os.listdir("/proc/self/fd"))
