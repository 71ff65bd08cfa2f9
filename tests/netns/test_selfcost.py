"""What the counters cost, as the kernel has measured it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from kon_agent.bpf import layout, selfcost
from kon_agent.bpf.net import NetCounters
from kon_agent.bpf.selfcost import Statistics

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.netns]

FRAMES = 100
FRAME = bytes.fromhex("02000000000102000000000288b5") + bytes(50)  # an ethertype for experiments


@pytest.fixture
def counters(link: Any) -> Iterator[NetCounters]:
    """Return loaded counters."""
    with closing(NetCounters.load()) as loaded:
        yield loaded


def runs(counters: NetCounters) -> dict[str, tuple[int, int]]:
    costs = selfcost.program_costs(counters.program_fds().items())
    return {cost.name: (cost.run_cnt, cost.run_time_ns) for cost in costs}


def test_runs_and_time(link: Any, counters: NetCounters) -> None:
    """While statistics are on, each frame that comes in is a run of the program that counts it, and takes time."""
    at = counters.attach(link.here.ifindex(), "kon0")
    assert "native" == at.ingress_mode
    with closing(Statistics()):
        before = runs(counters)
        link.there.send(FRAME, FRAMES)
        after = runs(counters)
    grown = {name: count - before[name][0] for name, (count, _) in after.items()}
    spent = {name: spent_ns - before[name][1] for name, (_, spent_ns) in after.items()}
    assert FRAMES == sum(count for name, count in grown.items() if name.startswith("kon_xdp_"))
    assert 0 == grown["kon_tc_egress"]
    assert 0 < sum(spent.values()) < FRAMES * 1_000_000


def test_maps(counters: NetCounters) -> None:
    """The counters take at least what is mapped of them."""
    (cost, _) = sorted(selfcost.map_costs(counters.shared_maps.items()), key=lambda cost: cost.name)
    assert "counters" == cost.name
    assert len(counters.counters()) <= cost.bytes <= len(counters.counters()) + (1 << 20)


def test_the_table_carries_them(counters: NetCounters) -> None:
    """The worker reads what the supervisor measured."""
    programs = selfcost.program_costs(counters.program_fds().items())
    maps = selfcost.map_costs(counters.shared_maps.items())
    table = layout.decode(counters.table(programs, maps))
    assert (programs, maps) == (table.programs, table.maps)
