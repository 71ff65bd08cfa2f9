"""The receiver's configuration: every key, its type, its default. Data only, like `schema`."""

from __future__ import annotations

import msgspec

from kon_agent.config.schema import LogConfig, Text


class ReceiverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file of `kon-receiver run -c FILE`.

    Attributes:
        listen: `host:port` to accept agents on; `[::]` takes IPv6 and IPv4.
        store: the store's file.
        cert, key: PEM files of the server's certificate (with its chain) and key.
        client_ca: PEM file of the authority every agent's certificate must chain to; None: none is asked.
        token_file: file with the token an agent must present where it has no certificate.
    """

    listen: Text = "[::]:7843"
    store: Text = "/var/lib/kon-receiver/store.db"
    cert: Text | None = None
    key: Text | None = None
    client_ca: Text | None = None
    token_file: Text | None = None
    log: LogConfig = LogConfig()
