"""The takeover: what a sender killed at any instant had seen acknowledged, which its successor must not count again."""

from __future__ import annotations

import logging

from kon_agent.errors import SpoolError
from kon_agent.spool import segment
from kon_agent.spool.disk import Disk
from kon_agent.spool.inventory import Inventory
from kon_agent.spool.reader import Reader, records_before
from kon_agent.spool.segment import Segment

log = logging.getLogger(__name__)


def take_over(disk: Disk, inventory: Inventory, number: int, position: int) -> None:
    """Settle all that is acknowledged where segment `number` is up to `position`, a chunk's end.

    Older segments stay, should there be any: their files could not be removed, and are sent again and refused. A
    number says nothing of which folder it is from, so it is no reason to remove them.
    """
    for older in inventory:
        if older.number < number and not older.disk_bytes:  # it has not vanished, it was acknowledged
            inventory.settle_all(older)
            inventory.forget(older)
    known = inventory.get(number)
    if known is None or known.contents is None:
        return
    try:
        if known.fate is not None:
            _settle_condemned(inventory, known, position)
        elif position >= known.size:
            _settle_to_end(disk, inventory, known, position - known.size)
        else:
            data = disk.read(segment.name_of(number), 0, position)
            inventory.acknowledge(known, records_before(data, known))
            known.acked_offset = position
    except (OSError, SpoolError) as err:
        log.error("segment %d cannot be read: %s; what it held is sent again", number, err)


def _settle_condemned(inventory: Inventory, known: Segment, position: int) -> None:
    if position > known.size:
        inventory.settle_all(known)
        inventory.forget(known)


def _settle_to_end(disk: Disk, inventory: Inventory, known: Segment, told: int) -> None:
    """Every record that can be read is acknowledged, and so are `told` of the losses behind them."""
    reader = Reader(disk)
    reader.load(known)
    carried, lost = reader.losses()
    left = lost[max(0, told - len(carried)) :]
    inventory.settle_all(known, left)
    known.acked_offset = known.size
    if told >= len(carried) and not left:
        inventory.forget(known)
