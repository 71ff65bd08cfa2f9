"""How long block devices take to answer: the layout of ebpf/kon_biolat.h, said again.

    row of a slot and CPU: a latency for each of OPERATIONS, device, missed, unused    as u64

A slot is a device's; the last one is of all devices that came when the others were taken.
"""

from __future__ import annotations

import struct

from kon_agent.bpf.latency import LATENCY_WORDS
from kon_agent.bpf.rows import WORD_BYTES, ProbeSpec, Table
from kon_agent.config.schema import BiolatConfig, PluginConfig

ROW_BYTES = 576
DEVICES = 32  # with a slot of their own: one is taken at a device's first request and never given back
SLOTS = DEVICES + 1
OPERATIONS = ("read", "write", "other")
DEVICE = len(OPERATIONS) * LATENCY_WORDS
"""Column: the device's number, in the slot's first row only."""
MISSED = DEVICE + 1
"""Column: requests that were not measured, because too many were in flight."""

SETTINGS_BYTES = 8  # the number of CPUs, and which majors are left out
MAJORS = {"ram*": 1, "fd*": 2, "loop*": 7, "md*": 9, "sr*": 11}  # Documentation/admin-guide/devices.txt
"""Patterns that stand for all devices of a major number below 32: these take no slot."""

MAX_IN_FLIGHT = 8192


def settings(config: PluginConfig) -> bytes:
    """Return the rest of the settings: a bit for each major number that the section leaves out as a whole."""
    assert isinstance(config, BiolatConfig)
    return struct.pack("=I", sum({1 << MAJORS[each] for each in config.exclude_devices if each in MAJORS}))


_NUMBERS_BYTES = 4 * DEVICES
SPEC = ProbeSpec(
    "kon_biolat",
    ROW_BYTES,
    SLOTS,
    settings_bytes=SETTINGS_BYTES,
    settings=settings,
    tables={
        # A hash map's entry: a bucket of 16 bytes, and an element of 48 before key and value.
        "issued": Table(WORD_BYTES, MAX_IN_FLIGHT, 16 + 48 + 2 * WORD_BYTES),
        "devices": Table(_NUMBERS_BYTES, 1, _NUMBERS_BYTES),
    },
)

_MINOR_BITS = 20


def device_number(word: int) -> tuple[int, int]:
    """Return the major and minor number that the kernel holds in one (MKDEV, linux/kdev_t.h)."""
    return word >> _MINOR_BITS, word & ((1 << _MINOR_BITS) - 1)
