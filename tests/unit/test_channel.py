"""The channel's promises: orders and their descriptors arrive whole, in order, and its end is noticed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from kon_agent import channel
from kon_agent.channel import MAX_ORDER_BYTES, Order


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "order",
    [Order("attach", 3, "cpu", 2**64 - 1, 262144), Order("close", 3), Order("stop", timeout_s=5.0)],
    ids=lambda order: order.op,
)
def test_an_order_arrives_as_it_was_given(ends: tuple[socket.socket, socket.socket], order: Order) -> None:
    """Every field survives, the largest epoch included."""
    channel.send(ends[0], order)
    assert (order, []) == channel.receive(ends[1])


def test_descriptors_ride_along(ends: tuple[socket.socket, socket.socket]) -> None:
    """What arrives is the same open file, in the order given."""
    reader, writer = os.pipe()
    channel.send(ends[0], Order("attach"), (reader, writer))
    received = channel.receive(ends[1])
    assert received is not None
    theirs = received[1]
    os.write(theirs[1], b"through")
    assert b"through" == os.read(reader, 7)
    for fd in (reader, writer, *theirs):
        os.close(fd)


def test_orders_keep_their_order(ends: tuple[socket.socket, socket.socket]) -> None:
    """Each order is a datagram: none is split, joined or overtaken."""
    orders = [Order("close", number) for number in range(50)]
    for order in orders:
        channel.send(ends[0], order)
    assert [(order, []) for order in orders] == [channel.receive(ends[1]) for _ in orders]


def test_nothing_to_receive_is_said_so(ends: tuple[socket.socket, socket.socket]) -> None:
    """The receiver never waits."""
    with pytest.raises(BlockingIOError):
        channel.receive(ends[1])


def test_the_end_of_the_supervisor_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    """What was ordered before its death is still received; then comes the end."""
    channel.send(ends[0], Order("close", 1))
    ends[0].close()
    assert (Order("close", 1), []) == channel.receive(ends[1])
    assert None is channel.receive(ends[1])


def test_a_dead_sender_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    """An order nobody can take is not silently lost, and no signal ends us."""
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        channel.send(ends[0], Order("close", 1))


def test_a_deaf_sender_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    """A queue that is full makes an error, never a supervisor that waits."""
    with pytest.raises(BlockingIOError):
        for number in range(100_000):
            channel.send(ends[0], Order("close", number))


def test_nonsense_leaves_no_descriptor_open(ends: tuple[socket.socket, socket.socket]) -> None:
    """What is no order is refused whole."""
    before = open_fds()
    socket.send_fds(ends[0], [b"nonsense"], [0])
    with pytest.raises(msgspec.DecodeError):
        channel.receive(ends[1])
    assert before == open_fds()


def test_the_longest_order_fits() -> None:
    """A plugin's name of 128 characters, every one of them escaped, and the largest numbers."""
    longest = Order("attach", 2**64 - 1, "\x01" * 128, 2**64 - 1, 2**64 - 1, 1e300)
    assert MAX_ORDER_BYTES >= len(msgspec.json.encode(longest))
