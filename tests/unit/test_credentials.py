"""The promises about credentials: contents are read whole, what is missing is told all at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kon_agent import credentials
from kon_agent.config.schema import TlsConfig
from kon_agent.errors import ConfigError


def written(folder: Path, name: str, content: bytes) -> str:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content)
    return str(path)


def test_files_become_contents(tmp_path: Path) -> None:
    """The sender gets what is in the files, the token without its newline, and never a path."""
    tls = TlsConfig(
        ca=written(tmp_path, "ca.pem", b"CA"),
        cert=written(tmp_path, "agent.pem", b"CERT"),
        key=written(tmp_path, "agent.key", b"KEY"),
        token_file=written(tmp_path, "token", b"secret\n"),
        server_name="receiver",
        insecure_skip_verify=True,
    )
    credentials.check(tls)
    expected = credentials.Credentials(b"CA", b"CERT", b"KEY", "secret", "receiver", True)
    assert expected == credentials.read(tls)


def test_the_system_is_trusted_where_no_ca_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bundle that exists counts; without one nobody is trusted."""
    bundle = written(tmp_path, "bundle.crt", b"BUNDLE")
    monkeypatch.setattr(credentials, "SYSTEM_TRUST", (str(tmp_path / "none"), bundle))
    assert b"BUNDLE" == credentials.read(TlsConfig()).ca
    monkeypatch.setattr(credentials, "SYSTEM_TRUST", ())
    assert credentials.Credentials(b"", None, None, "", None, False) == credentials.read(TlsConfig())


def test_everything_missing_is_told_at_once(tmp_path: Path) -> None:
    """One line per file, with its key and its path."""
    tls = TlsConfig(ca=str(tmp_path / "ca.pem"), cert=str(tmp_path / "a.pem"), key=str(tmp_path / "a.key"))
    with pytest.raises(ConfigError) as caught:
        credentials.check(tls)
    lines = str(caught.value).splitlines()
    assert ["tls.ca", "tls.cert", "tls.key"] == [line.partition(":")[0] for line in lines]
    assert all("does not exist" in line for line in lines)


def test_an_unreadable_file_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists and may not be read has another remedy than what does not exist."""
    path = written(tmp_path, "agent.key", b"KEY")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root itself may read everything
    with pytest.raises(ConfigError, match="cannot be read"):
        credentials.check(TlsConfig(key=path))


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["gone", "not text"])
def test_what_cannot_be_read_after_all_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    """A file that vanished after the check, or a token that is no text, is told like any other mistake."""
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="tls: "):
        credentials.read(TlsConfig(token_file=str(path)))
