"""The delegated control group, on a tree of plain files: this machine may have version 1 only."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.linux import cgroup
from kon_agent.linux.cgroup import Delegated

PID = 4711
PLACE = "/system.slice/kon-agent.service"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with a `/proc` and a mount of cgroup v2, in which the group is ours alone."""
    group = tmp_path / "mount" / PLACE[1:]
    group.mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (group / "cgroup.procs").write_text(f"{PID}\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(f"4:memory:/x\n0::{PLACE}\n")
    return tmp_path


def claim(tree: Path, is_delegated: bool = True) -> Delegated | None:
    """Claim the group of a tree."""
    return cgroup.claim(PID, str(tree / "mount"), str(tree), lambda path: is_delegated and path.endswith(PLACE))


def test_a_delegated_group_is_divided(tree: Path) -> None:
    """This process goes to one leaf, the controllers are passed on, and both leaves are there."""
    group = tree / "mount" / PLACE[1:]
    assert Delegated(str(group)) == claim(tree)
    assert str(PID) == (group / "core" / "cgroup.procs").read_text()
    assert "+cpu +memory" == (group / "cgroup.subtree_control").read_text()


def test_a_group_that_is_divided_already_is_gone_on_with(tree: Path) -> None:
    """After an upgrade this process is in a leaf of its own group."""
    (tree / "self" / "cgroup").write_text(f"0::{PLACE}/core\n")
    assert Delegated(str(tree / "mount" / PLACE[1:])) == claim(tree)


def test_the_workers_are_limited(tree: Path) -> None:
    """A share of a core is a quota of a second; memory is held, not killed for."""
    delegated = claim(tree)
    assert delegated is not None
    delegated.limit(0.02, 64 << 20)
    delegated.admit(77)
    workers = tree / "mount" / PLACE[1:] / "workers"
    assert "20000 1000000" == (workers / "cpu.max").read_text()
    assert str(64 << 20) == (workers / "memory.high").read_text()
    assert "77" == (workers / "cgroup.procs").read_text()


def test_a_tiny_limit_is_the_least_the_kernel_takes(tree: Path) -> None:
    """No limit is refused for being below a millisecond."""
    delegated = claim(tree)
    assert delegated is not None
    delegated.limit(0.0001, 1)
    assert "1000 1000000" == (tree / "mount" / PLACE[1:] / "workers" / "cpu.max").read_text()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("self/cgroup", "4:memory:/x\n"),
        ("self/cgroup", "0::/\n"),
        (f"mount{PLACE}/cgroup.controllers", "cpu io\n"),
        (f"mount{PLACE}/cgroup.procs", f"{PID}\n4712\n"),
    ],
)
def test_what_is_not_ours_is_left_alone(tree: Path, file: str, text: str) -> None:
    """Version 1, the root, a group without the controllers, or one with somebody else in it: nothing is made."""
    (tree / file).write_text(text)
    assert None is claim(tree)
    assert not (tree / "mount" / PLACE[1:] / "workers").exists()


def test_what_nobody_delegated_is_left_alone(tree: Path) -> None:
    """Being root is no permission: the group's manager must have handed it over."""
    assert None is claim(tree, is_delegated=False)
    assert not (tree / "mount" / PLACE[1:] / "core").exists()


def test_a_folder_without_the_mark_is_not_delegated(tmp_path: Path) -> None:
    """The mark is an extended attribute that systemd sets."""
    assert not cgroup.is_marked(str(tmp_path))
