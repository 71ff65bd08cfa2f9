"""The gate: who gets in by certificate or token, and that nobody else does."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kon_agent.errors import ConfigError
from kon_agent.receiver import pki
from kon_agent.receiver.identity import Authority, Gate, RefusedError, load_authority, load_tokens
from kon_agent.wire import kon_agent_pb2 as pb

NOW = datetime.datetime.now(datetime.UTC)
TOKEN = "correct-horse-battery"
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    pki.init(folder, [])
    pki.agent(folder, "edge-1")
    return folder


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Ca:
    """An authority as `openssl req -x509` makes it, without key usage."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self.issue(name("ca"), self.key, [(x509.BasicConstraints(True, None), True)])

    def issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
        days: tuple[int, int] = (-1, 30),
    ) -> x509.Certificate:
        key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder(name("ca"), subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(NOW + datetime.timedelta(days=days[0]))
            .not_valid_after(NOW + datetime.timedelta(days=days[1]))
            .add_extension(key_id, critical=False)
            .add_extension(issuer_id, critical=False)
        )
        for extension, is_critical in extensions:
            builder = builder.add_extension(extension, is_critical)
        return builder.sign(self.key, hashes.SHA256())

    def agent(
        self,
        usage: x509.ObjectIdentifier | None = CLIENT,
        names: Sequence[x509.GeneralName] = (),
        days: tuple[int, int] = (-1, 30),
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> x509.Certificate:
        extensions: list[tuple[x509.ExtensionType, bool]] = list(extra)
        if usage is not None:
            extensions.append((x509.ExtendedKeyUsage([usage]), False))
        if names:
            extensions.append((x509.SubjectAlternativeName(names), False))
        return self.issue(name("edge-1"), ec.generate_private_key(ec.SECP256R1()), extensions, days)

    def authority(self) -> Authority:
        from cryptography.hazmat.primitives.serialization import Encoding

        return Authority(self.certificate.public_bytes(Encoding.PEM))


def test_our_own_certificates_fit(folder: Path) -> None:
    """What `kon-receiver pki agent` makes is accepted, under the name it was made for."""
    authority = load_authority(folder / "ca.pem")
    assert ["edge-1"] == authority.names([load(folder / "edge-1.pem")], NOW)


def test_all_names_of_a_certificate_count() -> None:
    """Common name, DNS and URI alternatives name the agent; an authority made by openssl will do."""
    ca = Ca()
    names = [x509.DNSName("edge.example"), x509.UniformResourceIdentifier("urn:edge")]
    assert ["edge-1", "edge.example", "urn:edge"] == ca.authority().names([ca.agent(names=names)], NOW)
    assert ["edge-1"] == ca.authority().names([ca.agent()], NOW)


@pytest.mark.parametrize(
    "flaw",
    [
        {"usage": SERVER},
        {"usage": None},
        {"days": (-9, -1)},
        {"days": (1, 9)},
        {"extra": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b""), True)]},
    ],
    ids=["server's", "no usage", "expired", "not yet valid", "unknown critical extension"],
)
def test_a_flawed_certificate_is_refused(flaw: dict[str, object]) -> None:
    """Usage, dates and what we do not understand count."""
    ca = Ca()
    with pytest.raises(RefusedError, match="client certificate") as refused:
        ca.authority().names([ca.agent(**flaw)], NOW)  # type: ignore[arg-type]
    assert pb.Refusal.UNAUTHENTICATED == refused.value.code


def test_another_authoritys_certificate_is_refused(folder: Path) -> None:
    """The right name from the wrong authority, even with that authority in the chain, is nobody."""
    rogue = Ca()
    with pytest.raises(RefusedError, match="not accepted"):
        load_authority(folder / "ca.pem").names([rogue.agent(), rogue.certificate], NOW)


def test_an_agent_cannot_issue_certificates(folder: Path) -> None:
    """An agent's own certificate is no authority for another name."""
    ca = Ca()
    intermediate = ca.agent()
    ca.certificate = intermediate
    leaf = ca.agent(names=[x509.DNSName("edge-2")])
    with pytest.raises(RefusedError, match="not accepted"):
        load_authority(folder / "ca.pem").names([leaf, intermediate], NOW)


def test_a_certificate_is_good_for_its_name_only(folder: Path) -> None:
    """The gate compares the agent's id with the names; the refusal says both."""
    gate = Gate(load_authority(folder / "ca.pem"))
    gate.admit("edge-1", "", ["edge-1"])
    with pytest.raises(RefusedError, match="names edge-1, not 'edge-2'") as refused:
        gate.admit("edge-2", "", ["edge-1"])
    assert pb.Refusal.WRONG_IDENTITY == refused.value.code
    with pytest.raises(RefusedError, match="pki agent"):
        gate.admit("edge-1", TOKEN, [])


def test_tokens_are_an_agents_own() -> None:
    """An agent's own token excludes the common one; the others share the common one."""
    gate = Gate(tokens={"edge-1": TOKEN, "": "common-token-of-all"})
    gate.admit("edge-1", TOKEN, [])
    gate.admit("edge-2", "common-token-of-all", [])
    for agent_id, token in (("edge-1", "common-token-of-all"), ("edge-2", TOKEN), ("edge-1", ""), ("edge-1", "é")):
        with pytest.raises(RefusedError, match=r"tls\.token_file"):
            gate.admit(agent_id, token, [])


def test_a_certificate_or_a_token_is_enough(folder: Path) -> None:
    """Where both are configured, either lets in; the wrong name is not excused by a token."""
    gate = Gate(load_authority(folder / "ca.pem"), {"": TOKEN})
    gate.admit("edge-1", "", ["edge-1"])
    gate.admit("edge-2", TOKEN, [])
    with pytest.raises(RefusedError, match="names edge-1"):
        gate.admit("edge-2", TOKEN, ["edge-1"])


def test_an_open_gate_is_open() -> None:
    """Without authority or tokens anyone gets in."""
    assert Gate().is_open
    Gate().admit("anyone", "", [])


def test_a_token_file_is_read(tmp_path: Path) -> None:
    """Lines of agent and token, or a token alone; comments and empty lines are skipped."""
    path = tmp_path / "tokens"
    path.write_text(f"# agents\n\nedge-1 {TOKEN}  # the first\n{TOKEN}2\n")
    assert {"edge-1": TOKEN, "": f"{TOKEN}2"} == load_tokens(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "edge-1 short\n", f"edge-1 {TOKEN} more\n"])
def test_a_bad_token_file_is_an_error(tmp_path: Path, text: str) -> None:
    """An empty file, a token that can be guessed, a third word: none is taken for no authentication."""
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match="tokens"):
        load_tokens(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """An absent or empty authority file says which."""
    with pytest.raises(ConfigError, match="absent"):
        load_authority(tmp_path / "absent.pem")
    with pytest.raises(ConfigError, match="no PEM certificate"):
        Authority(b"")
