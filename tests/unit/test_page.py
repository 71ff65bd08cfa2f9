"""The page's promises: the latest whole value, never half of one."""

from __future__ import annotations

import pytest

from kon_agent.page import HEADER_BYTES, PageReader, PageWriter, page_size


def make(payload_bytes: int = 64) -> tuple[memoryview, PageWriter, PageReader]:
    """Return a page in plain memory, and its ends."""
    memory = memoryview(bytearray(page_size(payload_bytes)))
    return memory, PageWriter(memory), PageReader(memory)


def test_nothing_is_read_before_something_is_published() -> None:
    """An empty page has no value."""
    assert None is make()[2].read()


def test_the_latest_value_is_read() -> None:
    """Each publication replaces the one before."""
    _, writer, reader = make()
    for value in (b"one", b"two", b"", b"x" * 64):
        writer.publish(value)
        assert value == reader.read()


def test_a_value_beyond_the_capacity_is_refused() -> None:
    """A too long value changes nothing."""
    _, writer, reader = make()
    writer.publish(b"kept")
    with pytest.raises(ValueError, match="exceeds"):
        writer.publish(b"x" * 65)
    assert b"kept" == reader.read()


def test_a_writer_killed_half_way_leaves_the_last_value() -> None:
    """Bytes of an unfinished publication are not read."""
    memory, writer, reader = make()
    writer.publish(b"whole")
    other_slot = HEADER_BYTES + ((writer._selector[0] + 1) & 1) * writer._slot_bytes
    memory[other_slot : other_slot + 20] = b"\xff" * 20
    assert b"whole" == reader.read()


def test_a_damaged_value_is_not_read() -> None:
    """A value whose CRC does not match is none."""
    memory, writer, reader = make()
    writer.publish(b"value")
    memory[HEADER_BYTES + writer._slot_bytes + 9] ^= 1
    assert None is reader.read()


def test_a_new_writer_goes_on() -> None:
    """A restarted writer replaces the value of the one before."""
    memory, writer, reader = make()
    writer.publish(b"old")
    PageWriter(memory).publish(b"new")
    assert b"new" == reader.read()
