"""Questions to third-party code: each is put to a short-lived child that has given up every privilege.

A child answers with bytes through a pipe. Invariants: an answer is bounded; a child that has not answered in time is
aborted, with its stack in the log, and killed; those asked at once end at once, however many resist; none outlives
`ask`. What the bytes mean, and whether to believe them, is for whoever asked.
"""

from __future__ import annotations

import math
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
from kon_agent.stderrpipe import StderrPipe

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


def ask(
    questions: Sequence[Question], user: User | None, deadline_s: float, max_bytes: int, after_hang_s: float = math.inf
) -> list[Reply]:
    """Put the questions, several at a time, and return a reply to each.

    Args:
        questions: what to ask.
        user: whom the children become.
        deadline_s: seconds each may take.
        max_bytes: how long an answer may be.
        after_hang_s: seconds that all those have together which are put after one has hung.

    Raises:
        PrivilegeError: a child would run as root.
    """
    replies: list[Reply] = []
    ends_s = math.inf
    for first in range(0, len(questions), MAX_AT_ONCE):
        batch = questions[first : first + MAX_AT_ONCE]
        left_s = min(deadline_s, ends_s - time.monotonic())
        if left_s <= 0:
            replies += [Reply(failure="not asked: those before it hung")] * len(batch)
            continue
        with _children(batch, user) as asked:
            _listen(asked, left_s, max_bytes)
            _end(asked)
            replies += [Reply(bytes(one.data), one.failure) for one in asked]
            if ends_s == math.inf and any(one.has_hung for one in asked):
                ends_s = time.monotonic() + after_hang_s
    return replies


@dataclass(slots=True)
class _Asked:
    """A child that is being asked: `fd` gives its answer, -1 once that is closed, `said` its standard error."""

    fd: int = -1
    said: StderrPipe | None = None
    child: Child | None = None
    data: bytearray = field(default_factory=bytearray)
    failure: str = ""
    has_hung: bool = False
    has_ended: bool = False

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

    def conclude(self, child: Child) -> None:
        """Reap it."""
        self.child = None
        child.pidfd.close()
        with suppress(ProcessLookupError):  # it ended before it led a group
            os.killpg(child.pid, signal.SIGKILL)  # what it has started; not reaped yet, so the number is its own
        # One that even SIGKILL does not end waits for a disk; it is reaped when that answers, or with our own end.
        status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG)
        if status is None or not self.has_ended:
            self.failure = self.failure or "its process cannot be ended"
            return
        is_code = status.si_code == os.CLD_EXITED
        ended = Exit(child.pid, code=status.si_status) if is_code else Exit(child.pid, signum=status.si_status)
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
        _end(asked)


def _spawn(question: Question, user: User | None, one: _Asked) -> None:
    one.fd, answer_fd = os.pipe2(os.O_CLOEXEC)
    try:
        one.said = said = StderrPipe(question.title)
        role = Role(question.title, question.body, (answer_fd,), user, question.profile, said.write_fd)
        one.child = spawn(role, prepare=lambda: question.prepare(answer_fd))
        said.handed_out()
    finally:
        os.close(answer_fd)


def _end(asked: Sequence[_Asked]) -> None:
    """See them all end, by force if need be; in the same time whether one resists or each does."""
    for one in asked:
        one.hang_up()
    alive = [(one, one.child) for one in asked if one.child is not None]
    _outlast([(one, child) for one, child in alive if not one.failure])
    for signum in (signal.SIGABRT, signal.SIGKILL):
        left = [(one, child) for one, child in alive if not one.has_ended]
        for _, child in left:
            child.pidfd.send(signum)
        _outlast(left)
    for one, child in alive:
        one.conclude(child)
    for one in asked:
        if one.said is not None:
            one.said.close()
            one.said = None


def _outlast(waited_for: Sequence[tuple[_Asked, Child]]) -> None:
    """Wait for the end of each, EXIT_GRACE_S for all of them together."""
    ends_s = time.monotonic() + EXIT_GRACE_S
    for one, child in waited_for:
        one.has_ended = child.pidfd.wait(max(0.0, ends_s - time.monotonic()))


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
        one.has_hung = True
        one.failure = f"hung: no answer within {deadline_s:.2g} s"
