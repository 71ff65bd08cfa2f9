"""The way to the servers, judged from what visits have come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from kon_agent.config.schema import Config, TlsConfig
from kon_agent.config.server import ServerAddress
from kon_agent.doctor import receiver
from kon_agent.doctor.finding import Finding
from kon_agent.doctor.patient import Patient
from kon_agent.doctor.receiver import DAY_S, judge_certificate, judge_name, judge_server, judge_trust, judge_visits
from kon_agent.receiver import pki
from kon_agent.sender.visit import Visit

NOW_S = 1_700_000_000.0
SERVER = ServerAddress("collector.example", 7843)
WELCOME = Visit(SERVER, ("192.0.2.1",), "kon-agent/2", 0.0125, NOW_S + 100 * DAY_S, True)
SILENT = Visit(SERVER, ("192.0.2.1",), failure="no answer within 4 s; is a receiver running there?")


def test_a_welcome_is_told_with_protocol_and_round_trip() -> None:
    """What an operator wants to see of a connection."""
    expected = Finding("receiver:collector.example:7843", "ok", "takes us, speaks kon-agent/2, round trip 12.5 ms")
    assert expected == judge_server(WELCOME, True, False)


def test_the_originals_protocol_acknowledges_nothing() -> None:
    """It works, and is worth a word."""
    assert "warn" == judge_server(Visit(SERVER, ("192.0.2.1",), "kon-agent", is_welcome=True), True, False).verdict


@pytest.mark.parametrize(("has_another", "verdict"), [(False, "fail"), (True, "warn")])
def test_a_silent_server_fails_unless_another_takes_us(has_another: bool, verdict: str) -> None:
    """The sender's own words are split into what is and what to do."""
    found = judge_server(SILENT, True, has_another)
    assert (verdict, "no answer within 4 s") == (found.verdict, found.found)
    assert "is a receiver running there?" == found.advice


def test_without_the_key_nobody_can_tell_whether_we_are_taken() -> None:
    """That a user may not read it is no failure of the server."""
    refused = Visit(SERVER, ("192.0.2.1",), "kon-agent/2", failure="the server refused us: a certificate is needed")
    assert ("warn", "fail") == (judge_server(refused, False, False).verdict, judge_server(refused, True, False).verdict)


def test_a_name_resolves_or_does_not() -> None:
    """Its addresses, or the resolver's words."""
    assert Finding("dns:collector.example", "ok", "192.0.2.1") == judge_name(WELCOME)
    lost = judge_name(Visit(SERVER, failure="[Errno -2] Name or service not known"))
    assert ("fail", "[Errno -2] Name or service not known") == (lost.verdict, lost.found)


@pytest.mark.parametrize(
    ("starts_days", "ends_days", "verdict", "words"),
    [
        (-1, 100, "ok", "100 days more"),
        (-1, 29.5, "warn", "in 29 days"),
        (-1, 0.5, "warn", "in 0 days"),
        (-1, -0.5, "fail", "expired on"),
        (1, 100, "fail", "not valid before"),
    ],
)
def test_a_certificate_ends(starts_days: float, ends_days: float, verdict: str, words: str) -> None:
    """A month before it does is the time to say so."""
    found = judge_certificate(
        "certificate:agent", NOW_S + starts_days * DAY_S, NOW_S + ends_days * DAY_S, NOW_S, "renew"
    )
    assert verdict == found.verdict
    assert words in found.found
    assert ("renew" in found.advice) == (verdict != "ok")


def test_whom_we_trust() -> None:
    """Nobody verified is worth a word; nobody to trust is a failure."""
    assert None is judge_trust(TlsConfig(ca="ca.pem"), False)
    assert None is judge_trust(TlsConfig(), True)
    without, skipping = judge_trust(TlsConfig(), False), judge_trust(TlsConfig(insecure_skip_verify=True), True)
    assert without is not None and "fail" == without.verdict
    assert skipping is not None and "warn" == skipping.verdict


def test_all_of_a_visit_is_said() -> None:
    """Name, server, certificate; of a name that does not resolve only that; an address needs none."""
    lost = Visit(ServerAddress("nowhere.example", 1), failure="[Errno -2] Name or service not known")
    address = Visit(ServerAddress("192.0.2.1", 1), ("192.0.2.1",), "kon-agent/2", is_welcome=True)
    found = list(judge_visits([WELCOME, SILENT, lost, address], True, NOW_S))
    assert [
        ("dns:collector.example", "ok"),
        ("receiver:collector.example:7843", "ok"),
        ("certificate:collector.example:7843", "ok"),
        ("dns:collector.example", "ok"),
        ("receiver:collector.example:7843", "warn"),
        ("dns:nowhere.example", "fail"),
        ("receiver:192.0.2.1:1", "ok"),
    ] == [(each.check, each.verdict) for each in found]


def test_our_own_certificate_is_read(tmp_path: Path) -> None:
    """One that the receiver's authority has just issued is valid for 825 days."""
    pki.init(tmp_path, [])
    pki.agent(tmp_path, "edge-1")
    tls = TlsConfig(ca=str(tmp_path / "ca.pem"), cert=str(tmp_path / "edge-1.pem"), key=str(tmp_path / "edge-1.key"))
    (found,) = receiver.check_certificate(Patient(Config(tls=tls)))
    assert ("certificate:agent", "ok") == (found.check, found.verdict)
    (broken,) = receiver.check_certificate(Patient(Config(tls=TlsConfig(ca="ca.pem", cert=str(tmp_path / "ca.key")))))
    assert ("fail", True) == (broken.verdict, "no PEM certificate" in broken.found)


def test_unusable_credentials_are_a_finding(tmp_path: Path) -> None:
    """They are told where the visit would begin, and no other check suffers."""
    absent = Config(server="quic://127.0.0.1:1", tls=TlsConfig(ca=str(tmp_path / "absent.pem")))
    (found,) = receiver.check_receivers(Patient(absent))
    assert ("receiver", "fail") == (found.check, found.verdict)
    assert "absent.pem" in found.found
