"""A control server of the tests' own: one thread, one unix socket, scripted answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kon_agent.control_protocol import (
    InterfaceStatus,
    PluginStatus,
    Request,
    ResourceStatus,
    ServerStatus,
    SpoolStatus,
    Status,
    decode_request,
)


class FakeAgent:
    """Answers each connection with what `reply` makes of its request; keeps the requests."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.requests: list[Request] = []
        self.reply: Callable[[Request], bytes | None] = lambda request: b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; a silent reply's connection is let go as well."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        held = []  # connections that shall get no answer
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            with connection.makefile("rb") as lines:
                self.requests.append(decode_request(lines.readline()))
            answer = self.reply(self.requests[-1])
            if answer is None:
                held.append(connection)
            else:
                connection.sendall(answer)
                connection.close()
        for connection in held:
            connection.close()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    """A fake agent, found through KON_AGENT_SOCKET."""
    fake = FakeAgent(tmp_path / "control.sock")
    monkeypatch.setenv("KON_AGENT_SOCKET", fake.path)
    yield fake
    fake.close()


@pytest.fixture
def cpu() -> PluginStatus:
    """A healthy plugin with numbers as large as a year makes them."""
    return PluginStatus(
        name="cpu",
        state="RUNNING",
        enabled=True,
        pid=4194303,
        period_s=5.0,
        produced=69_379_200,
        acked=69_379_190,
        in_flight=10,
        ring_used_bytes=1024,
        ring_size_bytes=262_144,
        collect_ms=0.4,
        uptime_s=31_536_000.0,
    )


@pytest.fixture
def broken() -> PluginStatus:
    """A plugin that dies at its import."""
    return PluginStatus(
        name="memory",
        state="HALF_OPEN",
        enabled=True,
        period_s=0.5,
        restarts=12,
        last_exit="exit 70: ImportError: no module named 'nowhere'\x1b[31m",
        breaker="half_open",
        dropped={"ring_full": 3, "worker_crash": 1},
    )


@pytest.fixture
def whole(cpu: PluginStatus, broken: PluginStatus) -> Status:
    """The status of an agent in trouble."""
    return Status(
        agent_id="edge-1",
        version="9.8.7",
        pid=321,
        uptime_s=3725.0,
        server=ServerStatus(
            address="quic://localhost:7843",
            state="backoff",
            since="2026-01-02T03:04:05Z",
            detail="the server's certificate is not from our CA",
        ),
        plugins=[cpu, broken],
        spool=SpoolStatus(bytes=1536, max_bytes=50_000_000, segments=1, records=7, oldest_age_s=61.0),
        resources=ResourceStatus(cpu_percent=0.42, pss_bytes=43 * 1024 * 1024),
        interfaces=[
            InterfaceStatus(
                name="eth0",
                ingress_mode="generic",
                ingress_reason="native refused: EOPNOTSUPP",
                egress_mode="tcx",
            )
        ],
        warnings=["not root: nothing is dropped"],
    )
