"""The receiver's socket: where it listens, with and without IPv6. (What goes through it: tests/integration.)"""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from kon_agent.config.server import ServerAddress
from kon_agent.errors import ConfigError, KonError
from kon_agent.receiver import pki, transport
from kon_agent.receiver.transport import _bind, _reason, configure


def test_one_socket_takes_both_families() -> None:
    """Listening on [::], a datagram to 127.0.0.1 arrives."""
    try:
        listening = _bind(ServerAddress("::", 0))
    except KonError:
        pytest.skip("needs IPv6")
    with listening, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        if listening.family != socket.AF_INET6:
            pytest.skip("needs IPv6")
        sender.sendto(b"hello", ("127.0.0.1", listening.getsockname()[1]))
        listening.settimeout(10)
        assert b"hello" == listening.recv(10)


def test_without_ipv6_it_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no IPv6 at all, [::] means every IPv4 address."""
    bind_one = transport._bind_one

    def without_ipv6(family: int, target: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return bind_one(family, target)

    monkeypatch.setattr(transport, "_bind_one", without_ipv6)
    with _bind(ServerAddress("::", 0)) as listening:
        assert (socket.AF_INET, "0.0.0.0") == (listening.family, listening.getsockname()[0])


def test_a_taken_port_is_named() -> None:
    """The message says which address and what may hold it."""
    with _bind(ServerAddress("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(KonError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* another receiver"):
            _bind(ServerAddress("127.0.0.1", port))


def test_bad_certificates_are_named(tmp_path: Any) -> None:
    """A missing file says how to make it; one that is no PEM is named."""
    with pytest.raises(ConfigError, match="kon-receiver pki init"):
        configure(tmp_path / "no.pem", tmp_path / "no.key")
    pki.init(tmp_path, [])
    (tmp_path / "bad.key").write_text("rubbish")
    with pytest.raises(ConfigError, match=r"bad\.key: not a PEM certificate and its key"):
        configure(tmp_path / "server.pem", tmp_path / "bad.key")
    with pytest.raises(ConfigError, match="another certificate's key"):
        configure(tmp_path / "server.pem", tmp_path / "ca.key")


def test_a_reason_fits_a_packet() -> None:
    """However long the message, the close carries a part of it, cut between characters."""
    assert "é" * 256 == _reason("é" * 3000)
    assert "short" == _reason("short")
