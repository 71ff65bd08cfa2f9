"""The private authority: certificates that do what they should, and keys nobody else reads."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from kon_agent.errors import ConfigError
from kon_agent.receiver import pki


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    pki.init(folder, ["edge.example", "192.0.2.7"])
    return folder


@pytest.mark.parametrize("host", ["localhost", "edge.example"])
def test_the_server_certificate_is_valid_for_its_names(folder: Path, host: str) -> None:
    """A strict verifier accepts the server under each of its names, and not under another."""
    builder = PolicyBuilder().store(Store([load(folder / "ca.pem")]))
    builder.build_server_verifier(x509.DNSName(host)).verify(load(folder / "server.pem"), [])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("other")).verify(load(folder / "server.pem"), [])


def test_the_server_certificate_carries_its_addresses(folder: Path) -> None:
    """Both loopback addresses and those asked for are in it."""
    names = load(folder / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert {"127.0.0.1", "::1", "192.0.2.7"} == addresses


def test_an_agents_certificate_names_it(folder: Path) -> None:
    """A strict verifier accepts the agent as a TLS client; OpenSSL takes certificate and key for a pair."""
    cert, key = pki.agent(folder, "edge-1")
    verifier = PolicyBuilder().store(Store([load(folder / "ca.pem")])).build_client_verifier()
    assert [x509.DNSName("edge-1")] == verifier.verify(load(cert), []).subjects
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key)


def test_keys_are_private(folder: Path) -> None:
    """Keys are readable by their owner only, certificates by all."""
    pki.agent(folder, "edge-1")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert {0o600} == {mode for name, mode in modes.items() if name.endswith(".key")}
    assert {"ca.key", "server.key", "edge-1.key"} == {name for name in modes if name.endswith(".key")}
    assert all(mode & 0o022 == 0 for mode in modes.values())


def test_nothing_is_overwritten(folder: Path) -> None:
    """Making it again is an error and leaves what is there."""
    pki.agent(folder, "edge-1")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="is not overwritten"):
        pki.init(folder, [])
    with pytest.raises(ConfigError, match="is not overwritten"):
        pki.agent(folder, "edge-1")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["", "../edge", "a/b", ".hidden", "-x", "a b", "ca", "server", "x" * 65, "a\n", "é"])
def test_a_name_must_be_a_file_name(folder: Path, name: str) -> None:
    """A name that leaves the folder, hides, or clashes with the authority's own files is refused."""
    with pytest.raises(ConfigError, match="agent name"):
        pki.agent(folder, name)


def test_an_agent_needs_an_authority(tmp_path: Path) -> None:
    """Without one, the message says how to make it; a host name that is none is refused."""
    with pytest.raises(ConfigError, match="kon-receiver pki init"):
        pki.agent(tmp_path, "edge-1")
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        pki.init(tmp_path, ["https://edge"])
