"""What the sender proves itself with, read from its files while that is still possible: before the drop.

The files may belong to root and be closed to everybody else; the sender gets their content, never their path. The
supervisor only checks that they are there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kon_agent.config.schema import TlsConfig
from kon_agent.errors import ConfigError

SYSTEM_TRUST = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where Debian, Fedora and Alpine keep the system's certificate authorities."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM contents and names; the empty string is an absent token.

    Attributes:
        ca: authorities a server must chain to.
        cert, key: our certificate with its chain, and its key; both or neither.
        token: what authenticates us without a certificate.
        server_name: the name to expect in the server's certificate; None: the host connected to.
        skip_verify: accept any server certificate.
    """

    ca: bytes
    cert: bytes | None
    key: bytes | None
    token: str
    server_name: str | None
    skip_verify: bool


def check(tls: TlsConfig) -> None:
    """See that every file named is there and readable.

    Raises:
        ConfigError: one line per file that is not.
    """
    problems = []
    for key in ("ca", "cert", "key", "token_file"):
        path = getattr(tls, key)
        if path is not None and not os.access(path, os.R_OK):
            why = "cannot be read" if os.path.exists(path) else "does not exist"
            problems.append(f"tls.{key}: {path} {why}; correct the path or its permissions")
    if problems:
        raise ConfigError("\n".join(problems))


def read(tls: TlsConfig) -> Credentials:
    """Read the files `tls` names.

    Raises:
        ConfigError: one of them cannot be read.
    """
    try:
        return Credentials(
            ca=_content(tls.ca) or _system_trust(),
            cert=_content(tls.cert),
            key=_content(tls.key),
            token=(_content(tls.token_file) or b"").decode().strip(),
            server_name=tls.server_name,
            skip_verify=tls.insecure_skip_verify,
        )
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"tls: {err}") from err


def _content(path: str | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read()


def _system_trust() -> bytes:
    for path in SYSTEM_TRUST:
        if os.path.exists(path):
            return _content(path) or b""
    return b""
