"""What must hold whatever happens: nothing is lost without a reason, nothing is stored twice."""

from __future__ import annotations

from collections.abc import Iterable

from kon_agent.control_protocol import PluginStatus, Status
from kon_agent.receiver.reader import LedgerRow


def conservation(plugin: PluginStatus) -> None:
    """Assert the conservation law (DESIGN.md §2): every record produced is somewhere, or lost for a reason."""
    accounted = plugin.acked + plugin.in_flight + plugin.in_ring + plugin.spooled + sum(plugin.dropped.values())
    assert plugin.produced == accounted, plugin


def exactly_once(status: Status, ledger: Iterable[LedgerRow]) -> None:
    """Assert that of each plugin exactly the acknowledged records are stored, and that no number is unaccounted for.

    Holds between two points in time only where nothing is on its way: wait for `is_drained` before asking both.
    """
    rows = list(ledger)
    for plugin in status.plugins:
        conservation(plugin)
        own = [row for row in rows if row.plugin == plugin.name]
        assert plugin.acked == sum(row.stored for row in own), (plugin, own)
        assert plugin.dropped == _sum(row.declared_lost for row in own), (plugin, own)
    gapless(rows)


def gapless(ledger: Iterable[LedgerRow]) -> None:
    """Assert that every sequence number of every epoch is stored or declared lost."""
    assert [] == [row for row in ledger if row.missing]


def is_drained(status: Status) -> bool:
    """Whether nothing of any plugin is on its way."""
    return not any(plugin.in_flight or plugin.in_ring or plugin.spooled for plugin in status.plugins)


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for reason, count in each.items():
            total[reason] = total.get(reason, 0) + count
    return total
