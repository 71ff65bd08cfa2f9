"""The way to the servers: their names, whether they answer and take us, how long certificates are still valid."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - asyncio wants it late, when its file may be out of reach
import os
import time
from collections.abc import Iterable, Sequence

from kon_agent import credentials
from kon_agent.config.schema import TlsConfig
from kon_agent.config.server import parse_server
from kon_agent.credentials import Credentials
from kon_agent.doctor.finding import Finding, fail, ok, split, warn
from kon_agent.doctor.patient import Patient
from kon_agent.errors import ConfigError
from kon_agent.linux import privileges
from kon_agent.sender.transport import validity_of
from kon_agent.sender.visit import Visit, visit
from kon_agent.wire.frames import ALPN_LEGACY

TIMEOUT_S = 4.0  # with what it takes to begin and to end, a check of the network is over within 5 s
EXPIRES_SOON_DAYS = 30  # time to notice, and to issue another
DAY_S = 86_400

RENEW = "issue a new one: `kon-receiver pki agent DIR NAME`, then restart the agent"
RENEW_SERVER = "issue a new one for the receiver: `kon-receiver pki init`, or your authority"


def judge_name(one: Visit) -> Finding:
    """Return whether a server's name resolves."""
    check = f"dns:{one.server.host}"
    if one.addresses:
        return ok(check, ", ".join(one.addresses))
    found, advice = split(one.failure)
    return fail(
        check, found or "it does not resolve", advice or "correct `server`, or /etc/resolv.conf and its servers"
    )


def judge_server(one: Visit, is_the_agent: bool, has_another: bool) -> Finding:
    """Return whether a server answers and takes us.

    Args:
        one: the visit.
        is_the_agent: whether we could prove ourselves as the agent will; without its key no server would take us.
        has_another: whether another of the servers takes us.
    """
    check = f"receiver:{one.server}"
    if one.is_welcome:
        found = f"takes us, speaks {one.alpn}, round trip {one.rtt_s * 1000:.1f} ms"
        if one.alpn == ALPN_LEGACY:
            return warn(check, f"{found}: the original's protocol, which acknowledges nothing", "use a kon-receiver")
        return ok(check, found)
    if one.alpn and not is_the_agent:
        found = (
            f"answers, speaks {one.alpn}; not asked whether it takes us: the agent's key cannot be read by this user"
        )
        return warn(check, found, "run `kon-agent doctor` as root")
    found, advice = split(one.failure)
    advice = advice or "see the reasons in docs/troubleshooting.md, `No connection`"
    return (warn if has_another else fail)(check, found, advice)


def judge_certificate(check: str, starts_s: float, ends_s: float, now_s: float, what_to_do: str) -> Finding:
    """Return whether a certificate is valid, and for how long.

    Args:
        check: the finding's name.
        starts_s, ends_s: from when until when, UNIX times.
        now_s: the wall clock.
        what_to_do: about one that is not, or soon will not be.
    """
    days = int((ends_s - now_s) // DAY_S)
    day = time.strftime("%Y-%m-%d", time.gmtime(ends_s))
    if now_s < starts_s:
        begins = time.strftime("%Y-%m-%d %H:%M", time.gmtime(starts_s))
        return fail(check, f"not valid before {begins} UTC", "set this machine's clock, or " + what_to_do)
    if now_s >= ends_s:
        return fail(check, f"expired on {day}", what_to_do)
    if days < EXPIRES_SOON_DAYS:
        return warn(check, f"expires on {day}, in {days} days", what_to_do)
    return ok(check, f"valid until {day}, {days} days more")


def judge_trust(tls: TlsConfig, has_system_trust: bool) -> Finding | None:
    """Return what is wrong with how servers are verified; None: nothing."""
    if tls.insecure_skip_verify:
        found = "tls.insecure_skip_verify: whoever answers in the server's place gets the records"
        return warn("trust", found, "set tls.ca to the ca.pem of the receiver's authority, and take that line out")
    if tls.ca is None and not has_system_trust:
        return fail("trust", "no tls.ca, and this system has no authorities", "set tls.ca, or install ca-certificates")
    return None


def check_certificate(patient: Patient) -> Iterable[Finding]:
    """Look at our own certificate, and whom we trust."""
    tls = patient.config.tls
    trust = judge_trust(tls, any(os.path.exists(path) for path in credentials.SYSTEM_TRUST))
    if trust is not None:
        yield trust
    if tls.cert is None:
        return
    try:
        with open(tls.cert, "rb") as file:
            starts_s, ends_s = validity_of(file.read())
    except OSError:
        return  # `file:tls.cert` says it
    except ConfigError as err:
        yield fail("certificate:agent", *split(f"{tls.cert}: {err}"))
        return
    yield judge_certificate("certificate:agent", starts_s, ends_s, time.time(), RENEW)


def check_receivers(patient: Patient) -> Iterable[Finding]:
    """Visit every server. The last of the checks: whoever speaks to the network is root no longer."""
    servers = [parse_server(url) for url in patient.config.servers()]
    try:
        proof, is_the_agent = _read_proof(patient.config.tls)
        _drop_root(patient.config.user)
        visits = visit(servers, proof, patient.config.client_id, TIMEOUT_S)
    except ConfigError as err:
        yield fail("receiver", *split(str(err)))
        return
    yield from judge_visits(visits, is_the_agent, time.time())


def _drop_root(user: str) -> None:
    """Become the user that the sender is, as it does before it hears from anybody.

    Raises:
        PrivilegeError: there is no such user, and no `nobody`.
    """
    if os.getuid() == 0 and not privileges.current_privileges().missing("CAP_SETUID", "CAP_SETGID"):
        "localhost".encode("idna")  # the codec is loaded from files that the user may not be able to read
        privileges.change_user(privileges.resolve_user(user))


def judge_visits(visits: Sequence[Visit], is_the_agent: bool, now_s: float) -> Iterable[Finding]:
    """Return what is to be said of all visits."""
    for one in visits:
        if one.addresses != (one.server.host,):  # else it is an address
            yield judge_name(one)
        if one.addresses:
            has_another = any(other.is_welcome for other in visits if other is not one)
            yield judge_server(one, is_the_agent, has_another)
        if one.certificate_ends_s is not None:
            check = f"certificate:{one.server}"
            yield judge_certificate(check, 0.0, one.certificate_ends_s, now_s, RENEW_SERVER)


def _read_proof(tls: TlsConfig) -> tuple[Credentials, bool]:
    """Return what we prove ourselves with, and whether that is all that the agent has."""
    secrets = [path for path in (tls.key, tls.token_file) if path is not None]
    if all(os.access(path, os.R_OK) or not os.path.exists(path) for path in secrets):
        return credentials.read(tls), True
    anonymous = TlsConfig(ca=tls.ca, server_name=tls.server_name, insecure_skip_verify=tls.insecure_skip_verify)
    return credentials.read(anonymous), False
