"""kon_agent.bpf.surroundings: who holds a program, and whether anybody answers for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.bpf.surroundings import SUPERVISOR_TITLE, Holder, Occupant, holders, is_abandoned, is_any_orphaned

INIT = "/sbin/init"
WORKER = Holder("kon-agent: worker cpu", SUPERVISOR_TITLE)
ORPHAN = Holder("kon-agent: worker cpu", INIT)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], False),  # somebody has it whom we do not see
        ([ORPHAN], True),
        ([Holder("kon-agent: sender", INIT), ORPHAN], True),
        ([WORKER], False),
        ([ORPHAN, Holder(SUPERVISOR_TITLE, INIT)], False),
        ([ORPHAN, Holder("bpftool prog", "bash")], False),
    ],
)
def test_what_only_orphans_hold_is_abandoned(found: list[Holder], expected: bool) -> None:
    """A supervisor, a child of one, a stranger or somebody out of sight answers for it."""
    assert expected == is_abandoned(found)


def test_an_occupant_in_words() -> None:
    """Mode, number and name; without the right to ask for the name, none."""
    assert "native program 42 xdp_drop" == str(Occupant(42, "xdp_drop", "native"))
    assert "generic program 42" == str(Occupant(42, "", "generic"))


def test_holders_by_fdinfo(tmp_path: Path) -> None:
    """Only who has the very number, with its title and its parent's; a name in stat may contain anything."""
    process(tmp_path, 10, 1, "kon-agent: worker cpu", {3: "pos:\t0\nlink_id:\t77\n"})
    process(tmp_path, 11, 10, "else", {3: "link_id:\t777\n", 4: "link_id:\t7\n"})
    process(tmp_path, 1, 0, INIT, {})
    (tmp_path / "12").mkdir()  # ending
    (tmp_path / "self").mkdir()
    assert [Holder("kon-agent: worker cpu", INIT)] == list(holders("link_id:\t77\n", str(tmp_path)))


def test_no_orphan_no_search(tmp_path: Path) -> None:
    """A living agent's children and other people's processes are none; an agent's child without an agent is one."""
    process(tmp_path, 1, 0, INIT, {})
    process(tmp_path, 10, 1, SUPERVISOR_TITLE, {3: "link_id:\t77\n"})
    process(tmp_path, 11, 10, "kon-agent: worker cpu", {3: "link_id:\t77\n"})
    process(tmp_path, 12, 1, "bash", {})
    assert not is_any_orphaned(str(tmp_path))
    process(tmp_path, 13, 1, "kon-agent: sender", {})
    assert is_any_orphaned(str(tmp_path))


def process(root: Path, pid: int, parent: int, title: str, fdinfo: dict[int, str]) -> None:
    (root / f"{pid}" / "fdinfo").mkdir(parents=True)
    (root / f"{pid}" / "cmdline").write_bytes(title.encode() + bytes(4))
    (root / f"{pid}" / "stat").write_text(f"{pid} (a) b) S {parent} 1 1\n")
    for fd, text in fdinfo.items():
        (root / f"{pid}" / "fdinfo" / f"{fd}").write_text(text)
