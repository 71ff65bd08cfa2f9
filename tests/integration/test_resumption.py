"""Session resumption: a reconnection speaks with its first datagram, where a repetition harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aioquic.quic import events

from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.sender import transport
from kon_agent.sender.connector import Connector
from kon_agent.sender.dialect import Answer
from tests.support.receiver import Receiver

Handshakes = list[tuple[bool, bool]]
DEADLINE_S = 15.0


class Client:
    """A user of the connection who only notes whether there is one."""

    def __init__(self) -> None:
        self.is_ready = asyncio.Event()

    def on_ready(self) -> None:
        self.is_ready.set()

    def on_answers(self, answers: list[Answer]) -> None:
        """Nothing is sent."""

    def on_lost(self) -> None:
        self.is_ready.clear()


@pytest.fixture
def handshakes(monkeypatch: pytest.MonkeyPatch) -> Handshakes:
    """Return what every handshake of this process turns out to be: resumed, and early data accepted."""
    seen: Handshakes = []
    handle = transport.Link.quic_event_received

    def note(link: transport.Link, event: events.QuicEvent) -> None:
        if isinstance(event, events.HandshakeCompleted):
            seen.append((event.session_resumed, event.early_data_accepted))
        handle(link, event)

    monkeypatch.setattr(transport.Link, "quic_event_received", note)
    return seen


@pytest.fixture
def open_receiver(folder: Path, pki: Path) -> Iterator[Receiver]:
    """Return a receiver that asks nobody for a certificate."""
    with Receiver(folder, pki) as running:
        yield running


@pytest.fixture
def strict_receiver(folder: Path, pki: Path) -> Iterator[Receiver]:
    """Return a receiver that accepts only the authority's agents."""
    with Receiver(folder, pki, ["--client-ca", str(pki / "ca.pem")]) as running:
        yield running


def connect_twice(receiver: Receiver, pki: Path, *, restarts: bool = False, has_certificate: bool = False) -> None:
    """Connect, lose the connection, connect again."""
    cert, key = (pki / "edge-1.pem").read_bytes(), (pki / "edge-1.key").read_bytes()
    spec = SimpleNamespace(
        servers=[ServerAddress("127.0.0.1", receiver.port)],
        report=SimpleNamespace(publish=lambda _: None),
        agent_id="edge-1",
        credentials=Credentials(
            ca=(pki / "ca.pem").read_bytes(),
            cert=cert if has_certificate else None,
            key=key if has_certificate else None,
            token="",
            server_name=None,
            skip_verify=False,
        ),
    )

    async def converse() -> None:
        client = Client()
        connector = Connector(cast(Any, spec), True, client)
        running = asyncio.create_task(connector.run())
        async with asyncio.timeout(DEADLINE_S):
            await client.is_ready.wait()
            while connector._link is not None and connector._link.ticket is None and not has_certificate:
                await asyncio.sleep(0.01)  # a ticket comes right behind the handshake
            if restarts:
                receiver.kill()
                receiver.start()
            client.is_ready.clear()
            connector.end("again")
            await client.is_ready.wait()
        running.cancel()

    asyncio.run(converse())


def test_a_reconnection_speaks_early(open_receiver: Receiver, pki: Path, handshakes: Handshakes) -> None:
    """Hello travels with the first datagram, and the receiver takes it."""
    connect_twice(open_receiver, pki)
    assert [(False, False), (True, True)] == handshakes


def test_a_receiver_that_knows_no_ticket_is_no_obstacle(
    open_receiver: Receiver, pki: Path, handshakes: Handshakes
) -> None:
    """After its restart the handshake is a full one, and what was said early is said again."""
    connect_twice(open_receiver, pki, restarts=True)
    assert [(False, False), (False, False)] == handshakes


def test_with_client_certificates_nothing_is_resumed(
    strict_receiver: Receiver, pki: Path, handshakes: Handshakes
) -> None:
    """A resumption would skip the certificate, so no ticket is issued."""
    connect_twice(strict_receiver, pki, has_certificate=True)
    assert [(False, False), (False, False)] == handshakes
