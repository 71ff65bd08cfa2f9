"""What the process bodies are given: made by the supervisor's side of the fork, consumed by the child's.

Nothing is pickled: the child inherits these objects, its mappings already made, before it drops its privileges.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kon_agent.config.schema import BatchConfig, LogConfig, PluginConfig
from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.page import PageReader, PageWriter
from kon_agent.ring import Producer
from kon_agent.spool.limits import Limits

ORDERS_BYTES = 8


def encode_orders(period_ns: int) -> bytes:
    """Return what a worker's page of orders holds: nanoseconds between its cycles."""
    return period_ns.to_bytes(ORDERS_BYTES, sys.byteorder)


def decode_orders(data: bytes) -> int:
    """Return the period in a worker's page of orders."""
    return int.from_bytes(data, sys.byteorder)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is given.

    Attributes:
        name: the plugin's name.
        target: its collector's class, `module:Class`.
        config: its section of the configuration.
        producer: its end of its ring.
        doorbell: eventfd that wakes the sender.
        grants: read-only shared memory by name.
        log: how to log.
        orders: how often to run, as `decode_orders` reads it; it changes while the worker runs.
        source: the code of a plugin that is a file.
    """

    name: str
    target: str
    config: PluginConfig
    producer: Producer
    doorbell: int
    grants: Mapping[str, memoryview]
    log: LogConfig
    orders: PageReader
    source: bytes = b""


@dataclass(frozen=True, slots=True)
class SpoolSeat:
    """The sender's way to its spool.

    Attributes:
        folder_fd: the folder; -1 where it cannot be had.
        obstacle: why it cannot.
        limits: what the spool may take.
        writer: the page its figures are published in.
        reader: the same page: a predecessor's figures.
    """

    folder_fd: int
    obstacle: str
    limits: Limits
    writer: PageWriter
    reader: PageReader


@dataclass(frozen=True, slots=True)
class SenderSpec:
    """What the sender is given.

    Attributes:
        agent_id: this agent's name at the receiver.
        servers: in order of preference.
        credentials: what it proves itself with.
        batch: when a batch leaves.
        orders: the supervisor's channel.
        doorbell: eventfd the workers ring after publishing.
        report: the page the connection's state is shown in.
        plugins: the plugins' names; a name's place is its slot in the spool's report. Rings of others may follow: each
            new name has the next slot.
        spool: the way to the spool.
        log: how to log.
    """

    agent_id: str
    servers: Sequence[ServerAddress]
    credentials: Credentials
    batch: BatchConfig
    orders: socket.socket
    doorbell: int
    report: PageWriter
    plugins: Sequence[str]
    spool: SpoolSeat
    log: LogConfig
