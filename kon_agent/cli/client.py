"""The control client: one question to a running agent over its unix socket.

Owns the translation of what can go wrong on the way into words a person can act on.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TypeVar

from kon_agent.control_protocol import (
    MAX_RESPONSE_BYTES,
    TIMEOUT_S,
    Request,
    decode_response,
    encode_request,
)
from kon_agent.errors import ControlError

_CHUNK_BYTES = 64 * 1024
_MAX_FDS = 253  # SCM_MAX_FD, linux/net/scm.h: more never come with one answer
_QUEUE_INTERVAL_S = 0.02  # the supervisor takes in what waits at every turn of its loop

T = TypeVar("T")


def call(
    socket_path: str,
    request: Request,
    result: type[T],
    timeout_s: float = TIMEOUT_S,
    fds: list[int] | None = None,
) -> T:
    """Ask the agent behind `socket_path` and return its answer as a `result`.

    Args:
        timeout_s: seconds for the whole exchange.
        fds: takes the descriptors that ride along with the answer; they are the caller's to close, even after an error.

    Raises:
        ControlError: the agent's own error, or one of `not_running`, `permission_denied`, `timeout`,
            `bad_reply`, `bad_socket`.
    """
    line, deadline = encode_request(request), time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _connect(connection, socket_path, deadline)
            answer = _exchange(connection, line, deadline, fds)
    except OSError as err:
        raise _explain(err, socket_path) from err
    if not answer:
        raise ControlError(
            "bad_reply", f"kon-agent on {socket_path} hung up without an answer", "look at the agent's log"
        )
    return decode_response(answer, result)


def _connect(connection: socket.socket, path: str, deadline: float) -> None:
    while True:
        connection.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            connection.connect(path)
        except BlockingIOError as err:  # EAGAIN: as many as may wait to be accepted do (connect(2)); nothing tells when
            if time.monotonic() >= deadline:
                raise TimeoutError from err
            time.sleep(_QUEUE_INTERVAL_S)
        else:
            return


def _exchange(connection: socket.socket, line: bytes, deadline: float, fds: list[int] | None) -> bytes:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused unread: the reason may wait
        connection.sendall(line)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        try:
            chunk = _receive(connection, fds)
        except ConnectionResetError:
            break  # what came before the reset is the answer
        if not chunk:
            break
        answer += chunk
        if len(answer) > MAX_RESPONSE_BYTES:
            raise ControlError("bad_reply", f"the answer is longer than {MAX_RESPONSE_BYTES} bytes")
    return bytes(answer)


def _receive(connection: socket.socket, fds: list[int] | None) -> bytes:
    if fds is None:
        return connection.recv(_CHUNK_BYTES)
    chunk, received, _, _ = socket.recv_fds(connection, _CHUNK_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    fds += received
    return chunk


def _explain(err: OSError, path: str) -> ControlError:
    if isinstance(err, FileNotFoundError | ConnectionRefusedError):
        return ControlError(
            "not_running", f"no kon-agent answers on {path}", "is it running? start it with 'kon-agent run'"
        )
    if isinstance(err, PermissionError):
        return ControlError(
            "permission_denied",
            f"you may not talk to kon-agent on {path}: {err.strerror}",
            "use sudo, or become a member of the group the configuration names in control.group",
        )
    if isinstance(err, TimeoutError):
        return ControlError(
            "timeout",
            f"kon-agent on {path} did not answer in time",
            "is it stopped? look at its log; a change that was asked for may still be made",
        )
    return ControlError("bad_socket", f"cannot talk to kon-agent on {path}: {err}", "check --socket")
