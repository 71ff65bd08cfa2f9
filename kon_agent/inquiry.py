"""Questions to third-party code: each is put to a short-lived child that has given up every privilege.

A child answers with bytes through a pipe. Invariants: an answer is bounded; a child that has not answered in time is
aborted, with its stack in the log, and killed; none outlives `ask`. What the bytes mean, and whether to believe them,
is for whoever asked.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from kon_agent.linux import privileges
from kon_agent.linux.privileges import User
from kon_agent.process import Child, Exit, Profile, Role, describe_exit, spawn

MAX_AT_ONCE = 8  # processes of some ten megabytes each, on a machine that may have little memory
EXIT_GRACE_S = 0.5  # from the end of its answer to its own; the same from SIGABRT to SIGKILL
_READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Question:
    """What a child is to do.

    Attributes:
        title: what `ps` shows.
        body: `package.module:function`.
        prepare: makes the body's argument, in the child before the drop; takes the descriptor to answer into.
        profile: what the child may do.
    """

    title: str
    body: str
    prepare: Callable[[int], object]
    profile: Profile


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; `failure`, unless empty, says why the data is worth nothing."""

    data: bytes = b""
    failure: str = ""


def children_user(name: str) -> User | None:
    """Return whom children become; None where the process may not choose.

    Raises:
        PrivilegeError: there is no user for them.
    """
    return privileges.resolve_user(name) if os.geteuid() == 0 else None


def ask(questions: Sequence[Question], user: User | None, deadline_s: float, max_bytes: int) -> list[Reply]:
    """Put the questions, several at a time, and return a reply to each.

    Args:
        questions: what to ask.
        user: whom the children become.
        deadline_s: seconds each may take.
        max_bytes: how long an answer may be.

    Raises:
        PrivilegeError: a child would run as root.
    """
    replies: list[Reply] = []
    for first in range(0, len(questions), MAX_AT_ONCE):
        with _children(questions[first : first + MAX_AT_ONCE], user) as asked:
            _listen(asked, deadline_s, max_bytes)
            replies += [one.conclude() for one in asked]
    return replies


@dataclass(slots=True)
class _Asked:
    """A child that is being asked; `fd` is the end of the pipe to read, -1 once it is closed."""

    fd: int = -1
    child: Child | None = None
    data: bytearray = field(default_factory=bytearray)
    failure: str = ""
    exit: Exit | None = None

    def hear(self, max_bytes: int) -> None:
        """Take what it has said."""
        chunk = os.read(self.fd, _READ_BYTES)
        self.data += chunk
        if len(self.data) > max_bytes:
            self.failure = f"its answer is longer than {max_bytes} bytes"
        if not chunk or self.failure:
            self.hang_up()

    def hang_up(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def conclude(self) -> Reply:
        """See it end, by force if need be, and return its reply."""
        self.hang_up()
        if self.child is not None:
            child, self.child = self.child, None
            has_ended = child.pidfd.wait(0.0 if self.failure else EXIT_GRACE_S)
            for signum in (signal.SIGABRT, signal.SIGKILL):
                if not has_ended:
                    child.pidfd.send(signum)
                    has_ended = child.pidfd.wait(EXIT_GRACE_S)
            child.pidfd.close()
            with suppress(ProcessLookupError):  # it ended before it led a group
                os.killpg(child.pid, signal.SIGKILL)  # what it has started; not reaped yet, so the number is its own
            self._conclude(child.pid, has_ended)
        return Reply(bytes(self.data), self.failure)

    def _conclude(self, pid: int, has_ended: bool) -> None:
        # One that even SIGKILL does not end waits for a disk; it is reaped when that answers, or with our own end.
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if status is None or not has_ended:
            self.failure = self.failure or "its process cannot be ended"
            return
        is_code = status.si_code == os.CLD_EXITED
        ended = Exit(pid, code=status.si_status) if is_code else Exit(pid, signum=status.si_status)
        if not self.failure and ended.code != os.EX_OK:
            self.failure = f"its process {describe_exit(ended)}"


@contextmanager
def _children(questions: Sequence[Question], user: User | None) -> Iterator[list[_Asked]]:
    asked: list[_Asked] = []
    try:
        for question in questions:
            one = _Asked()
            asked.append(one)
            try:
                _spawn(question, user, one)
            except OSError as err:
                one.failure = f"no process can be started: {err.strerror}"
        yield asked
    finally:
        for one in asked:
            one.conclude()


def _spawn(question: Question, user: User | None, one: _Asked) -> None:
    one.fd, answer_fd = os.pipe2(os.O_CLOEXEC)
    try:
        role = Role(question.title, question.body, (answer_fd,), user, question.profile)
        one.child = spawn(role, prepare=lambda: question.prepare(answer_fd))
    finally:
        os.close(answer_fd)


def _listen(asked: Sequence[_Asked], deadline_s: float, max_bytes: int) -> None:
    by_fd = {one.fd: one for one in asked if one.fd >= 0 and not one.failure}
    ends_s = time.monotonic() + deadline_s
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while by_fd and (left_s := ends_s - time.monotonic()) > 0:
        for fd, _ in poll.poll(left_s * 1000):
            by_fd[fd].hear(max_bytes)
            if by_fd[fd].fd < 0:
                poll.unregister(fd)
                del by_fd[fd]
    for one in by_fd.values():
        one.failure = f"hung: no answer within {deadline_s:g} s"
