"""kon_agent.bpf.drops: the same layout on both sides, and the kernel's names for the columns."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import drops
from kon_agent.errors import BpfError

HEADER = (Path(__file__).parents[3] / "ebpf" / "kon_drops.h").read_text(encoding="utf-8")
REASONS = {
    0: "SKB_NOT_DROPPED_YET",
    1: "SKB_CONSUMED",
    2: "SKB_DROP_REASON_NOT_SPECIFIED",
    3: "SKB_DROP_REASON_NO_SOCKET",
    0xFFFF0000: "SKB_DROP_REASON_SUBSYS_MASK",
}
SUBSYSTEMS = {0: "SKB_DROP_REASON_SUBSYS_CORE", 2: "SKB_DROP_REASON_SUBSYS_OPENVSWITCH"}
ENUMS = {drops.REASONS: REASONS, drops.SUBSYSTEMS: SUBSYSTEMS}


def rows(*cpus: dict[int, int]) -> memoryview:
    """Return rows, one per CPU, with packets by column."""
    memory = bytearray(drops.ROW_BYTES * len(cpus))
    for cpu, columns in enumerate(cpus):
        for column, packets in columns.items():
            struct.pack_into("=Q", memory, cpu * drops.ROW_BYTES + column * 8, packets)
    return memoryview(memory)


def nonzero(named: drops.Names, *cpus: dict[int, int]) -> dict[str, int]:
    return {reason: packets for reason, packets in drops.read(rows(*cpus), named).items() if packets}


def test_header_and_python_agree_on_every_number() -> None:
    """A number changed on one side only fails here."""
    for name, ours in (
        ("KON_CORE_REASONS", drops.CORE_REASONS),
        ("KON_REASON_COLUMNS", drops.COLUMNS),
        ("KON_OTHER_COLUMN", drops.OTHER_COLUMN),
    ):
        assert f"#define {name} {ours}\n" in HEADER
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", HEADER))
    assert {"kon_drops_row": str(drops.ROW_BYTES), "kon_drops_settings": str(drops.SETTINGS_BYTES)} == asserted


def test_reasons_bear_the_kernel_s_names() -> None:
    """Lower case, without prefix, added up over the CPUs."""
    assert {"no_socket": 5, "not_specified": 1} == nonzero(drops.names(ENUMS), {3: 2, 2: 1}, {3: 3})


def test_what_is_no_drop_does_not_count() -> None:
    """A packet that was not dropped, or has been consumed, is none, whatever its column says."""
    assert {} == nonzero(drops.names(ENUMS), {0: 1, 1: 1})


def test_subsystems_and_the_rest_have_a_column_each() -> None:
    """A subsystem bears its name; one the kernel does not name, and a reason it does not, their numbers."""
    counted = nonzero(drops.names(ENUMS), {drops.CORE_REASONS: 1, drops.CORE_REASONS + 1: 2, 255: 3, 200: 4})
    assert {"subsystem_1": 1, "openvswitch": 2, "other": 3, "reason_200": 4} == counted


def test_a_kernel_without_reasons_gives_none() -> None:
    """Before 5.17 there is no enumeration: all drops are not_specified."""
    assert {"not_specified": 9} == nonzero(drops.names({drops.REASONS: {}}), {0: 9})


def test_without_names_there_are_numbers() -> None:
    """Where the kernel's names cannot be read, no drop is left out."""
    assert {"reason_0": 1, "reason_3": 2, "other": 3} == nonzero(drops.numbered(), {0: 1, 3: 2, 255: 3})


def test_rows_of_another_size_are_refused() -> None:
    """What cannot be whole rows is an error, not a count."""
    with pytest.raises(BpfError):
        drops.read(memoryview(bytes(8)), {})
