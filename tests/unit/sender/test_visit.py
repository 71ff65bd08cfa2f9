"""Visits to servers that are not there, or do not speak: they end in time, with a reason. Others: integration."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kon_agent.config.server import ServerAddress
from kon_agent.credentials import Credentials
from kon_agent.errors import ConfigError
from kon_agent.receiver import pki
from kon_agent.sender import visit as visiting
from kon_agent.sender.transport import validity_of
from kon_agent.sender.visit import visit

NOBODY = Credentials(ca=b"", cert=None, key=None, token="", server_name=None, skip_verify=True)


def test_visits_end_together(tmp_path: Path) -> None:
    """One that is refused and one that hears nothing, at once, take no longer than they are given."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            closed = ServerAddress("127.0.0.1", gone.getsockname()[1])
        begun_s = time.monotonic()
        refused, silent = visit([closed, ServerAddress(*mute.getsockname())], NOBODY, "edge-1", 1.0)
        assert time.monotonic() - begun_s < 10.0
    assert "Connection refused" in refused.failure
    assert silent.failure.startswith("no answer within 1 s")
    assert [("127.0.0.1",)] * 2 == [refused.addresses, silent.addresses]
    assert [False] * 2 == [refused.is_welcome, silent.is_welcome]


def test_a_name_that_does_not_resolve_has_no_addresses() -> None:
    """The resolver's words are the reason (the name: RFC 6761 section 6.4)."""
    (found,) = visit([ServerAddress("nowhere.invalid", 7843)], NOBODY, "edge-1", 4.0)
    assert ((), True) == (found.addresses, bool(found.failure))


def test_until_when_a_certificate_is_valid(tmp_path: Path) -> None:
    """The first of a file is ours; a file without one is a mistake."""
    pki.init(tmp_path, [])
    pki.agent(tmp_path, "edge-1")
    pem = (tmp_path / "edge-1.pem").read_bytes()
    starts_s, ends_s = validity_of(pem + (tmp_path / "ca.pem").read_bytes())
    assert (starts_s, ends_s) == validity_of(pem)
    assert starts_s <= time.time() < ends_s
    for wrong in (b"", b"nonsense", (tmp_path / "edge-1.key").read_bytes()):
        with pytest.raises(ConfigError, match="no PEM certificate"):
            validity_of(wrong)


class Answering:
    """A server that has two addresses, of which the first cannot be reached; the second takes us at its leisure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self.rtt_us = 1500
        self.certificate_ends_s = None
        monkeypatch.setattr(visiting, "resolve", self.resolve)
        monkeypatch.setattr(visiting, "connect", self.connect)

    async def resolve(self, server: ServerAddress) -> list[SimpleNamespace]:
        return [SimpleNamespace(address=(address, server.port)) for address in ("::1", "127.0.0.1")]

    async def connect(self, target: Any, configuration: Any, call: Any) -> Any:
        if target.address[0] == "::1":
            raise OSError("Network is unreachable")

        def welcome() -> None:
            call.is_welcome = True
            call._tell()

        asyncio.get_running_loop().call_later(0.01, welcome)  # not before whoever gives up early is gone
        return self

    def end(self, reason: str) -> None:
        self.ended.append(reason)


def test_one_address_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """That another cannot be reached, and fails at once, does not end the visit; every connection is hung up."""
    server = Answering(monkeypatch)
    (found,) = visit([ServerAddress("receiver", 7843)], NOBODY, "edge-1", 5.0)
    assert (True, "") == (found.is_welcome, found.failure)
    assert ("::1", "127.0.0.1") == found.addresses
    assert ["only a visit"] == server.ended
