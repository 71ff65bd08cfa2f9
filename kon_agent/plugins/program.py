"""One run of a program: started, listened to, and ended together with all that it has started.

Owns the process and the two pipes it writes to. Its input is /dev/null and it inherits nothing else. What it prints is
kept until taken, and no more is read once `max_output_bytes` wait: then the program itself waits, or is ended.

How it is made to end depends on what the seccomp filter lets this process do (`seccomp.installed`):
* `signals`: kill(-1). Landlock confines it to what this worker has started; nothing of that can slip away meanwhile.
* a filter without it, before Landlock ABI 6: the program is in our own group, which alone can be signalled. First a
  hangup that we ignore; what ignores it, too, is killed together with this worker, and the supervisor starts another.
* no filter, in a trial or on a machine that has none: the program has a group of its own, which is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence

from kon_agent.linux import seccomp
from kon_agent.linux.pidfd import PidFd
from kon_agent.plugins.printed import MAX_LINE_BYTES

log = logging.getLogger(__name__)

MAX_ERRORS_BYTES = 16 * 1024  # of its standard error, between two looks; the rest is read and thrown away
PIPE_BYTES = 256 * 1024  # what a stream may print between two cycles without having to wait
HANGUP_GRACE_S = 1.0
_READ_BYTES = 64 * 1024


class Program:
    """A program that runs, or has run.

    Args:
        command: its file and its arguments.
        environment: all of its environment.
        max_output_bytes: how much may wait to be taken.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], max_output_bytes: int) -> None:
        self._errors = bytearray()
        self._lost_error_lines = 0
        self.has_ended = False
        self._output = bytearray()
        self._max_output_bytes = max_output_bytes
        self._allowed = seccomp.installed()
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environment,
            process_group=0 if self._allowed is None else None,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._stdout, self._stderr = self._process.stdout.fileno(), self._process.stderr.fileno()
        with contextlib.suppress(OSError):  # the user's share of pipe buffers is used up: then it waits earlier
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._poll = select.poll()
        try:
            self._pidfd = PidFd(self._process.pid)
        except OSError:
            self._kill_group()
            self._process.wait()
            raise
        for fd in (self._stdout, self._stderr, self._pidfd.fileno()):
            self._poll.register(fd, select.POLLIN)

    @property
    def is_full(self) -> bool:
        """Whether more waits to be taken than may."""
        return len(self._output) > self._max_output_bytes

    def listen(self, timeout_s: float) -> bool:
        """Take in what has been printed, or wait for it; return whether there was anything, its end included.

        Once it has ended, all that it has printed is taken in.
        """
        ready = {fd for fd, _ in self._poll.poll(timeout_s * 1000)}
        if self._pidfd.fileno() in ready:
            self._poll.unregister(self._pidfd.fileno())
            # So many reads take what it has left in its pipes; what it has started may go on filling them for ever.
            for _ in range(PIPE_BYTES // _READ_BYTES + 1):
                self._read({fd for fd, _ in self._poll.poll(0)})
            self.has_ended = True
            return True
        return self._read(ready)

    def _read(self, ready: set[int]) -> bool:
        """Read once from each pipe that is ready and return whether there was anything."""
        has_read = False
        for fd in ready & {self._stdout, self._stderr}:
            data = os.read(fd, _READ_BYTES)
            if not data:
                self._poll.unregister(fd)
            elif fd == self._stdout:
                self._output += data
            else:
                room = MAX_ERRORS_BYTES - len(self._errors)
                self._errors += data[:room]
                self._lost_error_lines += data[room:].count(b"\n")
            has_read = has_read or bool(data)
        return has_read

    def take_lines(self, *, with_unfinished: bool = False) -> list[bytes]:
        """Take the complete lines and, if wanted, a last one without its newline, which may have been cut short."""
        *lines, rest = bytes(self._output).split(b"\n")
        if with_unfinished and rest:
            lines.append(rest)
            rest = b""
        self._output[:] = rest[: MAX_LINE_BYTES + 1]  # of a line that is too long the rest is not needed to see that
        return lines

    def take_errors(self) -> tuple[bytes, int]:
        """Take what it has written to its standard error, and how many more lines were thrown away."""
        errors, lost = bytes(self._errors), self._lost_error_lines
        if lost and not errors.endswith(b"\n"):
            lost -= 1  # the rest of the line that is cut
        self._errors.clear()
        self._lost_error_lines = 0
        return errors, lost

    def end(self) -> int:
        """Kill what is left of it and return its exit code, negative for the signal that ended it."""
        if self._allowed is None:
            self._kill_group()
        elif "signals" in self._allowed:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left, or nothing of ours
                os.kill(-1, signal.SIGKILL)
        else:
            self._hang_up()
        code = self._process.wait()
        self._pidfd.close()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not reaped yet: the number is still its own

    def _hang_up(self) -> None:
        ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.kill(0, signal.SIGHUP)
        signal.signal(signal.SIGHUP, ours)
        if not self._pidfd.wait(HANGUP_GRACE_S):
            log.error(
                "%s does not end and, before Landlock ABI 6 (Linux 6.12), cannot be killed alone: "
                "this worker is killed with it",
                self._process.args,
            )
            os.kill(0, signal.SIGKILL)
