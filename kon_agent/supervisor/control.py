"""The control socket: accepts connections, reads one request each, writes one answer. Owned by the supervisor's loop.

Who may change things is decided by the kernel's word about the peer (SO_PEERCRED, SO_PEERGROUPS): root and the
members of the socket's group; anyone who reaches the socket may look. An answer may take a while (a worker has to end
first), so a handler can return a question that the loop asks again until it is answered.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from kon_agent import control_protocol as protocol
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ControlConfig
from kon_agent.control_protocol import Request, Result
from kon_agent.errors import ConfigError, ControlError, KonError
from kon_agent.supervisor import handover

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # a person and some scripts; one more is turned away at once
SO_PEERGROUPS = 59  # linux/asm-generic/socket.h; Python does not name it
_MAX_GROUPS = 256  # Python takes no more than 1024 bytes of a socket option
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

Pending = Callable[[], Result | None]
"""A question asked again until it has an answer."""


@dataclass(frozen=True, slots=True)
class WithFds:
    """A result that descriptors ride along with; they stay their owner's, and are sent at once or not at all."""

    result: Result
    fds: tuple[int, ...]


Handler = Callable[[Request], Result | Pending | WithFds]
"""Carries out a request; raises ControlError where it cannot."""


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    may_change: bool
    expires_ns: int
    received: bytearray = field(default_factory=bytearray)
    reply: bytes = b""
    pending: Pending | None = None


class ControlServer:
    """The socket and its connections.

    Args:
        config: where the socket is, and whose group may change things.
        selector: the loop's; every descriptor is registered with a callback as its data.
        handler: carries out requests.
        listener_fd: the socket, where another supervisor has handed it over.

    Raises:
        ConfigError: another agent answers on the socket, or it cannot be made there.
    """

    def __init__(
        self,
        config: ControlConfig,
        selector: selectors.BaseSelector,
        handler: Handler,
        listener_fd: int | None = None,
    ) -> None:
        self.path = config.socket
        self._selector = selector
        self._handler = handler
        self._gid = _gid(config.group)
        self._connections: set[_Connection] = set()
        if listener_fd is None:
            self._listener = _listen(self.path, self._gid)
        else:
            self._listener = socket.socket(fileno=listener_fd)
            self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def fileno(self) -> int:
        """Return the listening socket's descriptor."""
        return self._listener.fileno()

    def asking(self, question: Pending) -> int | None:
        """Return the descriptor of the connection that waits for the answer to `question`; None: nobody does."""
        return next((each.sock.fileno() for each in self._connections if each.pending == question), None)

    def is_quiet(self, question: Pending) -> bool:
        """Whether nobody waits for an answer that only we have; that to `question` is another's to give."""
        return not any(each.reply or each.pending not in (None, question) for each in self._connections)

    def capture(self) -> list[handover.Connection]:
        """Return the connections that have not asked yet, for who goes on to serve them."""
        return [
            handover.Connection(fd=each.sock.fileno(), received=bytes(each.received))
            for each in self._connections
            if each.pending is None and not each.reply
        ]

    def adopt(self, fd: int, question: Pending) -> None:
        """Have a connection that another supervisor has handed over wait for the answer to `question`."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        self._connections.add(_Connection(sock, True, 0, pending=question))

    def go_on(self, taken: handover.Connection) -> None:
        """Serve a connection that another supervisor has handed over."""
        sock = socket.socket(fileno=taken.fd)
        sock.setblocking(False)
        self._serve(sock, taken.received)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as err:  # the client has gone again, or no descriptor is left
            log.warning("a control connection could not be accepted: %s", err)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            _turn_away(sock)
            return
        sock.setblocking(False)
        self._serve(sock)

    def _serve(self, sock: socket.socket, received: bytes = b"") -> None:
        # The deadline starts with the first look of `tick`: the loop's clock is not ours to read.
        connection = _Connection(sock, self._may_change(sock), 0, bytearray(received))
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._receive(connection))

    def _may_change(self, sock: socket.socket) -> bool:
        _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid in (0, os.getuid()):
            return True
        if self._gid is None:
            return False
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MAX_GROUPS)
        except OSError:  # ERANGE: a member of more groups than that; only its first one counts then
            raw = b""
        return self._gid in (gid, *struct.unpack(f"={len(raw) // 4}I", raw))

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(protocol.MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        connection.received += data
        if b"\n" in connection.received or len(connection.received) > protocol.MAX_REQUEST_BYTES:
            self._selector.unregister(connection.sock)
            self._answer(connection, bytes(connection.received).partition(b"\n")[0])
        elif not data:
            self._close(connection)

    def _answer(self, connection: _Connection, line: bytes) -> None:
        try:
            request = protocol.decode_request(line)
            if request.op not in protocol.READ_ONLY and not connection.may_change:
                raise ControlError(
                    "permission_denied",
                    f"only root and the group of {self.path} may use {request.op.value}",
                    "run it with sudo, or join that group",
                )
            result = self._handler(request)
        except ControlError as err:
            self._reply(connection, protocol.encode_error(err))
            return
        except (KonError, OSError) as err:  # no memory or descriptor is left: what has been done so far stays
            self._reply(connection, protocol.encode_error(ControlError("failed", str(err))))
            return
        if isinstance(result, WithFds):
            self._reply(connection, protocol.encode_result(result.result), result.fds)
        elif callable(result):
            connection.pending = result
            self._ask(connection)
        else:
            self._reply(connection, protocol.encode_result(result))

    def _ask(self, connection: _Connection) -> None:
        assert connection.pending is not None
        try:
            result = connection.pending()
        except ControlError as err:
            connection.pending = None
            self._reply(connection, protocol.encode_error(err))
            return
        if result is not None:
            connection.pending = None
            self._reply(connection, protocol.encode_result(result))

    def tick(self, now_ns: int) -> None:
        """Ask pending questions again; close connections that have lasted too long."""
        for connection in list(self._connections):
            if not connection.expires_ns:
                connection.expires_ns = now_ns + int(protocol.TIMEOUT_S * NS_PER_S)
            if connection.pending is not None:
                self._ask(connection)
            elif now_ns > connection.expires_ns:
                self._close(connection)

    def _reply(self, connection: _Connection, data: bytes, fds: tuple[int, ...] = ()) -> None:
        connection.reply = data
        if self._send(connection, fds):
            self._selector.register(connection.sock, selectors.EVENT_WRITE, lambda: self._send_more(connection))

    def _send(self, connection: _Connection, fds: tuple[int, ...] = ()) -> bool:
        """Send what the socket takes, descriptors with the first byte; return whether there is more."""
        try:
            if fds:
                sent = socket.send_fds(connection.sock, [connection.reply], fds)
            else:
                sent = connection.sock.send(connection.reply)
        except BlockingIOError:
            if fds:  # never with an empty queue; later these numbers may be other files, so not later
                self._close(connection)
            return not fds
        except OSError:
            sent = len(connection.reply)  # the client has gone: nobody to tell
        connection.reply = connection.reply[sent:]
        if not connection.reply:
            self._close(connection)
        return bool(connection.reply)

    def _send_more(self, connection: _Connection) -> None:
        self._send(connection)

    def _close(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.sock)
        connection.sock.close()

    def close(self) -> None:
        """Close everything and remove the socket."""
        for connection in list(self._connections):
            self._close(connection)
        self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _turn_away(sock: socket.socket) -> None:
    """Say that there are too many; the few bytes fit the empty queue of a new connection."""
    busy = ControlError("busy", f"{MAX_CONNECTIONS} requests are being answered, which is the most", "try again")
    with sock, contextlib.suppress(OSError):  # it has gone again
        sock.setblocking(False)
        sock.send(protocol.encode_error(busy))


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None  # root alone then


def _listen(path: str, gid: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        _remove_stale(path)
        listener.bind(path)
        # Anyone may connect and look: each connection's rights are checked by its credentials.
        os.chmod(path, 0o666)  # noqa: S103
        if gid is not None and os.getuid() == 0 and os.stat(path).st_gid != gid:
            with contextlib.suppress(PermissionError):  # without CAP_CHOWN; rights are checked by `_may_change` anyway
                os.chown(path, -1, gid)
        listener.listen(MAX_CONNECTIONS)
    except OSError as err:
        listener.close()
        why = "its path is too long for a unix socket" if "too long" in str(err) else str(err)
        raise ConfigError(f"control.socket: cannot listen on {path}: {why}; choose another path") from err
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket nobody answers on any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"control.socket: {path} exists and is no socket; remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise ConfigError(f"control.socket: another kon-agent answers on {path}; stop it, or choose another socket")
    os.unlink(path)
