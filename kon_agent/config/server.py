"""Addresses: where the agent sends (`quic://host:port`), where the receiver listens (`host:port`). Pure."""

from __future__ import annotations

import ipaddress
import re

import msgspec

from kon_agent.config.mistake import shown

DEFAULT_PORT = 7843  # the original's
MAX_PORT = 65535
MAX_HOST_CHARS = 253  # RFC 1035 §2.3.4, without the root's dot

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST_PORT = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*):([0-9]{1,5})")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")  # RFC 1123 §2.1, and the underscore of local names
_DOTTED_DIGITS = re.compile(r"[0-9.]+")


class ServerAddress(msgspec.Struct, frozen=True):
    """A UDP endpoint.

    Attributes:
        host: a name or an address; an IPv6 address without brackets.
        port: 1 to 65535; 0 only to listen on a port the kernel picks.
    """

    host: str
    port: int

    def __str__(self) -> str:
        """Return `host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_server(url: str) -> ServerAddress:
    """Return the address in `quic://host:port`; an IPv6 host stands in brackets.

    Raises:
        ValueError: anything else, with what to write instead.
    """
    scheme = _SCHEME.match(url)
    rest = url[scheme.end() :] if scheme else url
    if scheme is None or scheme[1].lower() != "quic":
        raise ValueError(f"{shown(url)} is not quic://host:port{_meant(rest)}")
    try:
        address = _parse_host_port(rest)
    except ValueError as err:
        raise ValueError(f"{shown(url)} is not quic://host:port: {err}{_meant(rest)}") from None
    if address.port == 0:
        raise ValueError(f"{shown(url)} is not quic://host:port: the port must be from 1 to {MAX_PORT}")
    return address


def parse_listen(text: str) -> ServerAddress:
    """Return the address in `0.0.0.0:7843` or `[::]:7843`; port 0 lets the kernel pick one.

    Raises:
        ValueError: anything else, with what to write instead.
    """
    try:
        return _parse_host_port(text)
    except ValueError as err:
        raise ValueError(f"{shown(text)} is not host:port: {err}; write 0.0.0.0:7843 or [::]:7843") from None


def _parse_host_port(text: str) -> ServerAddress:
    match = _HOST_PORT.fullmatch(text)
    if match is None:
        if _is_ipv6(text.strip("[]")) or (text.count(":") > 1 and not text.startswith("[")):
            raise ValueError("an IPv6 address stands in brackets and a port follows")
        if re.search(r"[/?#@\s]", text):
            raise ValueError("only a host and a port are allowed")
        if ":" not in text or text.endswith("]"):
            raise ValueError("the port is missing")
        raise ValueError(f"the port must be a number from 1 to {MAX_PORT}")
    host, port = match[1], int(match[2])
    if port > MAX_PORT:
        raise ValueError(f"the port must be from 1 to {MAX_PORT}")
    if host.startswith("["):
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ValueError(f"{shown(host)} is not an IPv6 address")
    elif not _is_host(host):
        raise ValueError(f"{shown(host)} is not a host name or an address" if host else "the host is missing")
    return ServerAddress(host, port)


def _meant(rest: str) -> str:
    """Return a suggestion made of what follows the scheme, where completing it gives a valid address."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    for guess in (host, f"{host}:{DEFAULT_PORT}", f"[{host.strip('[]')}]:{DEFAULT_PORT}"):
        try:
            address = _parse_host_port(guess)
        except ValueError:
            continue
        if address.port:
            return f"; did you mean 'quic://{address}'?"
    return ""


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return text.isprintable() and " " not in text  # a zone id may hold anything (RFC 4007 §11)


def _is_host(text: str) -> bool:
    if _DOTTED_DIGITS.fullmatch(text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            return False
        return True
    labels = text.removesuffix(".").split(".")
    return len(text) <= MAX_HOST_CHARS and all(_LABEL.fullmatch(label) for label in labels)
