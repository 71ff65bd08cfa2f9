"""Server and listen addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.config.server import ServerAddress, parse_listen, parse_server


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("quic://localhost:7843", "localhost", 7843),
        ("quic://192.0.2.1:1", "192.0.2.1", 1),
        ("quic://[2001:db8::1]:65535", "2001:db8::1", 65535),
        ("quic://[fe80::1%eth0]:7843", "fe80::1%eth0", 7843),
        ("QUIC://a-b.example.:7843", "a-b.example.", 7843),
    ],
)
def test_server(url: str, host: str, port: int) -> None:
    """Names, IPv4 and bracketed IPv6 addresses give host and port."""
    assert ServerAddress(host, port) == parse_server(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost:7843", "did you mean 'quic://localhost:7843'?"),
        ("http://h.example/x", "did you mean 'quic://h.example:7843'?"),
        ("quic://h", "the port is missing; did you mean 'quic://h:7843'?"),
        ("quic://::1", "stands in brackets and a port follows; did you mean 'quic://[::1]:7843'?"),
        ("quic://h:0", "the port must be from 1 to 65535"),
        ("quic://h:65536", "the port must be from 1 to 65535"),
        ("quic://h:http", "the port must be a number"),
        ("quic://h:7843/", "only a host and a port are allowed; did you mean 'quic://h:7843'?"),
        ("quic://user@h:7843", "is not a host name or an address"),
        ("quic://:7843", "the host is missing"),
        ("quic://300.1.1.1:7843", "'300.1.1.1' is not a host name or an address"),
        ("quic://[::g]:7843", "'::g' is not an IPv6 address"),
        ("quic://-h:7843", "is not a host name or an address"),
        ("", "is not quic://host:port"),
    ],
)
def test_server_refuses(url: str, why: str) -> None:
    """What is no server is refused with the reason and, where there is one, the right spelling."""
    with pytest.raises(ValueError) as caught:
        parse_server(url)
    assert why in str(caught.value)


def test_listen() -> None:
    """A listen address has no scheme and may leave the port to the kernel."""
    assert ServerAddress("0.0.0.0", 7843) == parse_listen("0.0.0.0:7843")
    assert ServerAddress("::", 0) == parse_listen("[::]:0")


@pytest.mark.parametrize("text", ["quic://[::]:7843", ":::7843", "7843", "[::]", "a b:1"])
def test_listen_refuses(text: str) -> None:
    """What is no listen address is refused with an example."""
    with pytest.raises(ValueError, match=r"is not host:port: .*; write 0\.0\.0\.0:7843 or \[::\]:7843"):
        parse_listen(text)


def test_printed_address_reads_back() -> None:
    """An address prints as it is written, IPv6 in brackets."""
    for text in ("h:1", "[::1]:7843"):
        assert text == str(parse_listen(text))


@given(st.text(alphabet="quic:/[]h.1%@ \n-", max_size=30))
def test_nonsense_is_a_value_error(text: str) -> None:
    """No text makes the parsers raise anything but ValueError, and what they accept they accept again."""
    for parse, prefix in ((parse_server, "quic://"), (parse_listen, "")):
        try:
            address = parse(text)
        except ValueError:
            continue
        assert address == parse(f"{prefix}{address}")
