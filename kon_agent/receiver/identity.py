"""Who an agent is: the gate every agent passes before the first of its records is looked at.

aioquic checks that a client owns the key of the certificate it shows, and nothing else: chain, dates, usage
and name are verified here, after the handshake (FACTS: its client certificate support is "for test purposes
only"). Pure: the certificates, the token and the time come in.

Invariants:
* With an authority, with tokens, or with both, an agent needs one of the two; a bad certificate is never
  excused.
* Tokens are compared in constant time. A token given to one agent is no other's, and the common one is not
  for an agent that has its own.
"""

from __future__ import annotations

import datetime
import hmac
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from kon_agent.errors import ConfigError, KonError
from kon_agent.receiver.batch import MAX_ID_CHARS
from kon_agent.wire import kon_agent_pb2 as pb

MAX_CHAIN_DEPTH = 4  # intermediates between an agent and the authority; more only cost us signatures
MIN_TOKEN_CHARS = 16  # shorter ones can be guessed


class RefusedError(KonError):
    """An agent may not go on.

    Attributes:
        code: the wire's `Refusal.Code`, also the connection's application error code.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = int(code)


class Authority:
    """The certificate authorities that name agents.

    Args:
        pem: their certificates.

    Raises:
        ConfigError: there is none in it.
    """

    def __init__(self, pem: bytes) -> None:
        try:
            self._store = Store(x509.load_pem_x509_certificates(pem))
        except ValueError as err:
            raise ConfigError(f"--client-ca holds no PEM certificate: {err}") from err

    def names(self, chain: Sequence[x509.Certificate], now: datetime.datetime) -> list[str]:
        """Return the names `chain`, leaf first, gives its owner: common name, DNS and URI alternative names.

        Raises:
            RefusedError: it does not chain to the authority, is not valid at `now`, or is not for TLS
                clients.
        """
        leaf, *intermediates = chain
        builder = PolicyBuilder().store(self._store).time(now).max_chain_depth(MAX_CHAIN_DEPTH)
        # Besides the web's rules: authorities made by `openssl req -x509` carry no key usage, agents may have
        # no SAN.
        ca_policy = ExtensionPolicy.webpki_defaults_ca().may_be_present(
            x509.KeyUsage, Criticality.AGNOSTIC, _signs_certificates
        )
        ee_policy = ExtensionPolicy.webpki_defaults_ee().may_be_present(
            x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
        )
        verifier = builder.extension_policies(ca_policy=ca_policy, ee_policy=ee_policy).build_client_verifier()
        try:
            verifier.verify(leaf, intermediates)
            usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (VerificationError, ValueError, x509.ExtensionNotFound) as err:
            reason = f"{err}".partition(" (encountered")[0]
            raise RefusedError(
                pb.Refusal.UNAUTHENTICATED,
                f"client certificate not accepted: {reason}; issue one with `kon-receiver pki agent`",
            ) from err
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
            raise RefusedError(pb.Refusal.UNAUTHENTICATED, "client certificate is not for TLS clients (clientAuth)")
        return list(dict.fromkeys(_names(leaf)))


class Gate:
    """What an agent must show to be let in.

    Args:
        authority: lets in the agents it has named, or None.
        tokens: agent id to token, "" for a token any agent may use; or None.
    """

    def __init__(self, authority: Authority | None = None, tokens: Mapping[str, str] | None = None) -> None:
        self.authority = authority
        self._tokens = tokens

    @property
    def is_open(self) -> bool:
        """Whether any agent is let in."""
        return self.authority is None and self._tokens is None

    def certified_names(self, chain: Sequence[x509.Certificate], now: datetime.datetime) -> list[str]:
        """Return the names the certificate shown in the handshake entitles to; none where it showed none.

        Raises:
            RefusedError: it showed one that is no good.
        """
        return self.authority.names(chain, now) if self.authority is not None and chain else []

    def admit(self, agent_id: str, token: str, names: Sequence[str]) -> None:
        """Let the agent in, having shown `token` and a certificate for `names`, or refuse it.

        Raises:
            RefusedError: with the reason and what to do.
        """
        if self.is_open or agent_id in names:
            return
        if names:
            raise RefusedError(
                pb.Refusal.WRONG_IDENTITY,
                f"the certificate names {' and '.join(names)}, not {agent_id!r}; "
                "set client-id to that name or issue a certificate for this one",
            )
        if self._tokens is None:
            raise RefusedError(
                pb.Refusal.UNAUTHENTICATED,
                "a client certificate is needed: issue one with `kon-receiver pki agent` and set tls.cert and tls.key",
            )
        if token:
            known = self._tokens.get(agent_id, self._tokens.get("", ""))
            if known and hmac.compare_digest(token.encode(), known.encode()):
                return
        what = f"the token is not the one of {agent_id!r}" if token else "a token is needed"
        raise RefusedError(pb.Refusal.UNAUTHENTICATED, f"{what}: set tls.token_file to the one the receiver was given")


def load_authority(path: Path) -> Authority:
    """Read the authorities in a PEM file.

    Raises:
        ConfigError: it cannot be read or holds none.
    """
    return Authority(_read(path, "--client-ca"))


def load_tokens(path: Path) -> dict[str, str]:
    """Read a token file: lines `agent_id token`, or a token alone for any agent; `#` begins a comment.

    Raises:
        ConfigError: it cannot be read, is empty, or a line is neither.
    """
    tokens: dict[str, str] = {}
    for number, line in enumerate(_read(path, "--token-file").decode(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < MIN_TOKEN_CHARS or len(words[0]) > MAX_ID_CHARS:
            what = f"{path}:{number}: expected `agent_id token` or one token"
            raise ConfigError(f"{what}, of {MIN_TOKEN_CHARS} characters or more")
        tokens["" if len(words) == 1 else words[0]] = words[-1]
    if not tokens:
        raise ConfigError(f"{path}: no token in it; write lines of `agent_id token`")
    return tokens


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"{what} {path}: {err.strerror}") from err


def _signs_certificates(_: Policy, __: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("an issuer's key may not sign certificates")


def _names(leaf: x509.Certificate) -> Iterator[str]:
    for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        yield str(attribute.value)
    try:
        alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    yield from alternatives.get_values_for_type(x509.DNSName)
    yield from alternatives.get_values_for_type(x509.UniformResourceIdentifier)
