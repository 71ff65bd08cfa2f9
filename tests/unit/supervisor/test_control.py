"""The control socket's promises: one answer to each request, whoever asks and however slowly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ControlConfig
from kon_agent.control_protocol import (
    MAX_REQUEST_BYTES,
    TIMEOUT_S,
    Op,
    Request,
    Result,
    Stopping,
    encode_request,
)
from kon_agent.errors import ConfigError, ControlError
from kon_agent.supervisor import control
from kon_agent.supervisor.control import MAX_CONNECTIONS, ControlServer, Pending, WithFds

DEADLINE_S = 10.0
NOBODY = 65534
GROUP = 54321  # nobody's by default, so that only membership can explain a permission
STATUS = encode_request(Request(op=Op.STATUS))
SHUTDOWN = encode_request(Request(op=Op.SHUTDOWN))
ANSWER = b'{"ok":true,"result":{"stopping":true}}\n'


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: clients change their user")


class Loop:
    """A control server in a loop of the test's own, its clock in the test's hands."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control.sock")
        self.selector = selectors.DefaultSelector()
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Result | Pending | WithFds] = lambda request: Stopping()
        self.server = ControlServer(ControlConfig(socket=self.path, group="no such group"), self.selector, self.handle)
        self.now_ns = NS_PER_S

    def handle(self, request: Request) -> Result | Pending | WithFds:
        self.requests.append(request)
        return self.answer(request)

    def turn(self, timeout_s: float = 0.0) -> int:
        """Serve what there is, waiting at most `timeout_s` for it; return how many descriptors were ready."""
        events = self.selector.select(timeout_s)
        for key, _ in events:
            key.data()
        self.server.tick(self.now_ns)
        return len(events)

    def turn_until(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_done():
            assert time.monotonic() < deadline, "nothing came of it in time"
            self.turn(0.01)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(self.path)
        client.setblocking(False)
        return client

    def ask(self, line: bytes) -> bytes:
        """Send a line and return everything that comes back until the server closes."""
        with self.connect() as client:
            with contextlib.suppress(BrokenPipeError):
                client.sendall(line)
            return self.read_all(client)

    def read_all(self, client: socket.socket) -> bytes:
        answer = bytearray()
        ended = False

        def has_ended() -> bool:
            nonlocal ended
            with contextlib.suppress(BlockingIOError):
                while not ended:
                    try:
                        chunk = client.recv(1 << 16)
                    except ConnectionResetError:
                        chunk = b""
                    answer.extend(chunk)
                    ended = not chunk
            return ended

        self.turn_until(has_ended)
        return bytes(answer)

    def connections(self) -> int:
        """Return how many connections the server holds."""
        return len(self.server._connections)

    def close(self) -> None:
        self.server.close()
        self.selector.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    served = Loop(tmp_path)
    yield served
    served.close()


def error_of(answer: bytes) -> dict[str, Any]:
    """Return the error an answer carries."""
    error: dict[str, Any] = json.loads(answer)["error"]
    return error


# ── requests and answers ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_answered_and_the_connection_closed(loop: Loop) -> None:
    """One line in, one line out."""
    assert ANSWER == loop.ask(STATUS)
    assert [Request(op=Op.STATUS)] == loop.requests
    assert 0 == loop.connections()


def test_a_request_may_come_in_pieces(loop: Loop) -> None:
    """Nothing is answered before the line is complete, and it is answered once it is."""
    with loop.connect() as client:
        for byte in STATUS[:-1]:
            client.sendall(bytes([byte]))
            loop.turn(0.01)
        assert [] == loop.requests
        client.sendall(STATUS[-1:])
        assert ANSWER == loop.read_all(client)


def test_what_follows_the_line_is_not_looked_at(loop: Loop) -> None:
    """A connection carries one request."""
    loop.ask(STATUS + SHUTDOWN)
    assert [Request(op=Op.STATUS)] == loop.requests


def test_a_line_too_long_is_refused(loop: Loop) -> None:
    """The supervisor does not buffer without end, and says why."""
    with loop.connect() as client:
        endless = b"x" * (MAX_REQUEST_BYTES + 1)
        sent = 0
        while sent < len(endless):
            with contextlib.suppress(BlockingIOError):
                sent += client.send(endless[sent:])
            loop.turn()
        assert "bad_request" == error_of(loop.read_all(client))["code"]
    assert [] == loop.requests


def test_nonsense_is_answered_as_such(loop: Loop) -> None:
    """What is no request is told so."""
    assert "bad_request" == error_of(loop.ask(b"\xff\x00\n"))["code"]


@pytest.mark.parametrize("sent", [b"", b"{"])
def test_a_client_that_leaves_is_forgotten(loop: Loop, sent: bytes) -> None:
    """Hanging up before the line is complete costs nothing and is no event."""
    with loop.connect() as client:
        client.sendall(sent)
        loop.turn_until(lambda: loop.connections() == 1)
    loop.turn_until(lambda: loop.connections() == 0)
    assert [] == loop.requests


def test_a_client_that_leaves_before_its_answer_is_forgotten(loop: Loop) -> None:
    """Nobody to tell is no error."""
    with loop.connect() as client:
        client.sendall(STATUS)
    loop.turn_until(lambda: bool(loop.requests) and loop.connections() == 0)


def test_a_slow_reader_gets_all_of_a_long_answer(loop: Loop) -> None:
    """An answer longer than the socket's buffer leaves bit by bit, without stopping the loop."""
    hint = "x" * 2_000_000

    def refuse(request: Request) -> Result:
        raise ControlError("long", "a long story", hint)

    loop.answer = refuse
    assert hint == error_of(loop.ask(STATUS))["hint"]


def test_a_client_that_never_reads_is_closed(loop: Loop) -> None:
    """Its time is up, whatever is left to say."""

    def refuse(request: Request) -> Result:
        raise ControlError("long", "x" * 2_000_000)

    loop.answer = refuse
    with loop.connect() as client:
        client.sendall(STATUS)
        loop.turn_until(lambda: bool(loop.requests))
        assert 1 == loop.connections()
        loop.now_ns += int((TIMEOUT_S + 1) * NS_PER_S)
        loop.turn()
        assert 0 == loop.connections()


def test_a_silent_client_is_closed(loop: Loop) -> None:
    """A connection that asks nothing does not keep its place."""
    with loop.connect() as client:
        loop.turn_until(lambda: loop.connections() == 1)
        loop.now_ns += int((TIMEOUT_S + 1) * NS_PER_S)
        assert b"" == loop.read_all(client)


def test_an_idle_server_is_quiet(loop: Loop) -> None:
    """No descriptor stays ready once a connection has been served, refused or closed."""
    loop.ask(STATUS)
    loop.ask(b"nonsense\n")
    with loop.connect():
        loop.turn_until(lambda: loop.connections() == 1)
        assert 0 == loop.turn()


def test_no_more_than_so_many_connections(loop: Loop) -> None:
    """One too many is told so and closed; those before it are served."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(loop.connect()) for _ in range(MAX_CONNECTIONS)]
        loop.turn_until(lambda: loop.connections() == MAX_CONNECTIONS)
        assert "busy" == error_of(loop.ask(b""))["code"]
        clients[0].sendall(STATUS)
        assert ANSWER == loop.read_all(clients[0])


# ── handlers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_handlers_error_is_the_answer(loop: Loop) -> None:
    """Code, message and hint reach the client."""

    def refuse(request: Request) -> Result:
        raise ControlError("unknown_plugin", "there is no plugin 'x'", "did you mean 'y'?")

    loop.answer = refuse
    expected = {"code": "unknown_plugin", "message": "there is no plugin 'x'", "hint": "did you mean 'y'?"}
    assert expected == error_of(loop.ask(STATUS))


@pytest.mark.parametrize("error", [ConfigError("agent.yaml:1:1: no"), OSError("no descriptor is left")])
def test_any_error_of_ours_is_an_answer(loop: Loop, error: Exception) -> None:
    """An invalid configuration at a reload, or a want of descriptors, is told to who asked, and ends nothing."""

    def fail(request: Request) -> Result:
        raise error

    loop.answer = fail
    assert {"code": "failed", "message": str(error), "hint": ""} == error_of(loop.ask(STATUS))


def test_a_pending_answer_is_asked_for_until_it_is_there(loop: Loop) -> None:
    """Other clients are served meanwhile, and the answer comes once there is one."""
    answers: list[Result | None] = [None, None, None, Stopping()]
    loop.answer = lambda request: (lambda: answers.pop(0)) if request.op is Op.SHUTDOWN else Stopping()
    with loop.connect() as waiting:
        waiting.sendall(SHUTDOWN)
        loop.turn_until(lambda: len(answers) < 4)
        assert ANSWER == loop.ask(STATUS) or not answers
        assert ANSWER == loop.read_all(waiting)
    assert [] == answers


def test_descriptors_ride_along(loop: Loop) -> None:
    """They come with the answer as duplicates, which are the client's; ours stay ours."""
    reader, writer = os.pipe()
    loop.answer = lambda request: WithFds(Stopping(), (reader, writer))
    with loop.connect() as client:
        client.sendall(STATUS)
        loop.turn_until(lambda: loop.connections() == 0 and bool(loop.requests))
        answer, fds, _, _ = socket.recv_fds(client, 1 << 16, 10, socket.MSG_CMSG_CLOEXEC)
    assert ANSWER == answer
    assert 2 == len(fds)
    os.write(fds[1], b"through")
    assert b"through" == os.read(reader, 10)
    for fd in (*fds, reader, writer):
        os.close(fd)


def test_a_pending_answer_may_be_an_error(loop: Loop) -> None:
    """What fails later is told later."""

    def fail() -> Result | None:
        raise ControlError("too_late", "it is gone")

    loop.answer = lambda request: fail
    assert "too_late" == error_of(loop.ask(STATUS))["code"]


# ── who may ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_our_own_user_may_change(loop: Loop) -> None:
    """An agent that was started without root is stopped without root."""
    assert ANSWER == loop.ask(SHUTDOWN)


class PublicLoop(Loop):
    """A server on a socket that every user can reach, whose group is GROUP."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control, "_gid", lambda name: GROUP)
        self.folder = Path(tempfile.mkdtemp())
        self.folder.chmod(0o755)
        super().__init__(self.folder)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder)

    def ask_as(self, line: bytes, gid: int, groups: list[int]) -> bytes:
        """Send a line as another user and return the answer."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _ask_and_exit(self.path, line, gid, groups, writer)
        os.close(writer)
        os.set_blocking(reader, False)
        answer = bytearray()
        has_ended = False

        def has_answered() -> bool:
            nonlocal has_ended
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(reader, 1 << 16)
                answer.extend(chunk)
                has_ended = not chunk
            return has_ended

        try:
            self.turn_until(has_answered)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
        return bytes(answer)


def _ask_and_exit(path: str, line: bytes, gid: int, groups: list[int], report: int) -> None:
    """Be the client: become nobody, ask, report the answer, end."""
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(path)
            client.sendall(line)
            while chunk := client.recv(1 << 16):
                os.write(report, chunk)
    finally:
        os._exit(0)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[PublicLoop]:
    served = PublicLoop(monkeypatch)
    yield served
    served.close()


@pytest.mark.root
@needs_root
@pytest.mark.parametrize(
    ("gid", "groups"),
    [(GROUP, []), (NOBODY, [GROUP]), (NOBODY, [*range(1000, 1100), GROUP])],
    ids=["primary", "supplementary", "one of many"],
)
def test_members_of_the_group_may_change(public: PublicLoop, gid: int, groups: list[int]) -> None:
    """The kernel's word about the peer decides, whichever of its groups it is."""
    assert ANSWER == public.ask_as(SHUTDOWN, gid, groups)


@pytest.mark.root
@needs_root
def test_strangers_may_only_look(public: PublicLoop) -> None:
    """Everybody may ask for the status; changing takes membership, and the answer says which."""
    assert ANSWER == public.ask_as(STATUS, NOBODY, [])
    for line in (SHUTDOWN, encode_request(Request(op=Op.TAP))):  # a tap changes nothing, and shows everything
        refused = error_of(public.ask_as(line, NOBODY, [NOBODY]))
        assert "permission_denied" == refused["code"]
    assert [Request(op=Op.STATUS)] == public.requests


@pytest.mark.root
@needs_root
def test_a_peer_of_very_many_groups_harms_nobody(public: PublicLoop) -> None:
    """More groups than the kernel's answer has room for are no membership, and no error of ours."""
    assert ANSWER == public.ask_as(STATUS, NOBODY, list(range(1000, 3000)))


# ── the socket ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    """What a killed agent left behind does not keep the next one from starting."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    loop = Loop(tmp_path)
    assert ANSWER == loop.ask(STATUS)
    loop.close()


def test_a_second_server_is_refused(loop: Loop, tmp_path: Path) -> None:
    """Two agents on one socket is a mistake, told to the second; the first goes on."""
    with pytest.raises(ConfigError, match="another kon-agent answers"):
        Loop(tmp_path)
    assert ANSWER == loop.ask(STATUS)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A file that happens to have the socket's name is not removed."""
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        Loop(tmp_path)
    assert "precious" == path.read_text()


def test_a_path_too_long_is_said_so(tmp_path: Path) -> None:
    """The kernel's 108 bytes are explained, and no descriptor is left open."""
    config = ControlConfig(socket=str(tmp_path / ("x" * 100) / "s"))
    with selectors.DefaultSelector() as selector:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match="too long"):
            ControlServer(config, selector, lambda request: Stopping())
        assert before >= set(os.listdir("/proc/self/fd"))


def test_its_folder_is_made(tmp_path: Path) -> None:
    """/run/kon-agent need not exist."""
    loop = Loop(tmp_path / "run")
    assert ANSWER == loop.ask(STATUS)
    loop.close()


def test_the_socket_is_removed_at_the_end(tmp_path: Path) -> None:
    """Nothing is left for the next one to find, and connections are closed."""
    loop = Loop(tmp_path)
    with loop.connect() as client:
        loop.turn_until(lambda: loop.connections() == 1)
        loop.close()
        client.setblocking(True)
        assert b"" == client.recv(1)
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def no_descriptors_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_running_out_of_descriptors_harms_nobody(loop: Loop, no_descriptors_left: None) -> None:
    """A connection that cannot be accepted waits until it can be."""
    with loop.connect() as client:
        client.sendall(STATUS)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            os.open("/dev/null", os.O_RDONLY)
        loop.turn()
        assert [] == loop.requests
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert ANSWER == loop.read_all(client)


# ── another supervisor goes on with it ────────────────────────────────────────────────────────────────────────────


def hand_over(loop: Loop, question: Pending) -> None:
    """Put another server, as another supervisor would make it, in the place of the loop's."""
    old = loop.server
    asking = old.asking(question)
    connections = [msgspec.structs.replace(connection, fd=os.dup(connection.fd)) for connection in old.capture()]
    listener_fd = os.dup(old.fileno())
    asking_fd = None if asking is None else os.dup(asking)
    os.rename(loop.path, f"{loop.path}.kept")  # what an end would remove, a change of the code does not
    old.close()
    os.rename(f"{loop.path}.kept", loop.path)
    config = ControlConfig(socket=loop.path, group="no such group")
    loop.server = ControlServer(config, loop.selector, loop.handle, listener_fd)
    for connection in connections:
        loop.server.go_on(connection)
    if asking_fd is not None:
        loop.server.adopt(asking_fd, question)


def test_connections_survive_a_change_of_the_server(loop: Loop) -> None:
    """Half a request is completed, a question is answered, and who has just connected is served, by the next one."""
    answers: list[Result | None] = [None]

    def question() -> Result | None:
        return answers[0]

    with loop.connect() as slow, loop.connect() as asking:
        slow.sendall(STATUS[:5])
        loop.turn_until(lambda: any(each.received for each in loop.server._connections))
        loop.answer = lambda request: question
        asking.sendall(SHUTDOWN)
        loop.turn_until(lambda: loop.server.asking(question) is not None)
        with loop.connect() as new:
            assert loop.server.is_quiet(question)
            hand_over(loop, question)
            loop.answer = lambda request: Stopping()
            slow.sendall(STATUS[5:])
            assert ANSWER == loop.read_all(slow)
            new.sendall(STATUS)
            assert ANSWER == loop.read_all(new)
        answers[0] = Stopping()
        assert ANSWER == loop.read_all(asking)
    assert 0 == loop.connections()


def test_an_answer_only_the_old_server_has_is_waited_for(loop: Loop) -> None:
    """While somebody waits for another answer it is not quiet, and nobody else is handed over in its place."""
    loop.answer = lambda request: lambda: None
    with loop.connect() as asking:
        asking.sendall(SHUTDOWN)
        loop.turn_until(lambda: any(each.pending for each in loop.server._connections))
        assert not loop.server.is_quiet(lambda: None)
        assert [] == loop.server.capture()
