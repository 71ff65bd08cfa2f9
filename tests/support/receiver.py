"""The receiver under test."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from kon_agent.errors import StoreError
from kon_agent.receiver.reader import Filter, LedgerRow, StoredRecord, read_ledger, read_records
from tests.support.program import Program


class Receiver(Program):
    """A receiver that keeps its port and its store over all its starts.

    Args:
        folder: where its store and its log are kept.
        pki: a folder made by `kon-receiver pki init`.
        flags: more of `kon-receiver run`'s.
        prefix: what to put before its command.
    """

    def __init__(self, folder: Path, pki: Path, flags: Sequence[str] = (), prefix: Sequence[str] = ()) -> None:
        super().__init__("receiver", folder, prefix)
        self.port = free_port()
        self.store = folder / "store.db"
        self._flags = [*("--cert", str(pki / "server.pem"), "--key", str(pki / "server.key")), *flags]

    def arguments(self) -> list[str]:
        """Return what follows `python -m`."""
        address = f"127.0.0.1:{self.port}"
        return ["kon_agent.cli.receiver", "run", "-v", "--listen", address, "--store", str(self.store), *self._flags]

    def ledger(self) -> list[LedgerRow]:
        """Return what is known of every epoch."""
        return read_ledger(self.store)

    def query(self, plugin: str | None = None, name: str | None = None) -> list[StoredRecord]:
        """Return the stored records, oldest first; none while there is no store yet."""
        try:
            return list(read_records(self.store, Filter(plugin=plugin, name=name)))
        except StoreError:
            return []


def free_port() -> int:
    """Return a UDP port of the loopback that nobody uses now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
