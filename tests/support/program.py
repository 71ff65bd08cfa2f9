"""A program under test: one process we start, and all those it starts itself.

Whatever a program forks inherits its standard error, which is its log file, locked. The lock belongs to that open file
and lives as long as any process holds it: the log can be locked anew exactly when nothing of the program is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.support.waiting import DEADLINE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


def environment_of(**more: str) -> dict[str, str]:
    """Return our environment and more, with this repository among what Python imports, installed or not."""
    path = [more.get("PYTHONPATH", ""), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(filter(None, path))}


class Program:
    """A program, started and ended any number of times; as a context manager, with nothing left behind.

    Args:
        name: what messages call it.
        folder: where it keeps its files; its name should be short, for sockets live there.
        prefix: what to put before its command, for instance `ip netns exec NAME`.
        environment: what to add to ours.
    """

    def __init__(
        self, name: str, folder: Path, prefix: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.folder = folder
        self.log_path = folder / f"{name}.log"
        self._prefix = prefix
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        """Return what follows `python -m`."""
        raise NotImplementedError

    # Its life.

    def start(self) -> None:
        """Start it and wait until it says that it is ready (sd_notify(3))."""
        assert not self.is_running, f"{self.name} runs already"
        with self._locked_log() as log, self._notifications() as ready:
            self._process = self.launch(log, NOTIFY_SOCKET=ready.getsockname())
            pidfd = os.pidfd_open(self._process.pid)
            try:
                told, _, _ = select.select([ready.fileno(), pidfd], [], [], DEADLINE_S)
            finally:
                os.close(pidfd)
            assert ready.fileno() in told and ready.recv(100) == b"READY=1", f"{self.name} did not start:\n{self.log()}"

    def launch(self, output: IO[bytes] | int, **environment: str) -> subprocess.Popen[bytes]:
        """Start its command, with `output` for what it says, and wait for nothing."""
        return subprocess.Popen(
            [*self._prefix, sys.executable, "-m", *self.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_of(**self._environment, **environment),
            cwd=self.folder,
        )

    @property
    def is_running(self) -> bool:
        """Whether the process itself has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The id of the process started last."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self.is_running, f"{self.name} does not run"
        os.kill(self.pid, number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait until the process has ended and return its exit code, negative for a signal."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.wait(deadline_s)

    def stop(self) -> int:
        """End it as an operator would and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill the process; those it has started may live on for a moment."""
        self.signal(signal.SIGKILL)
        self.wait()

    # What is left of it.

    def is_gone(self) -> bool:
        """Whether no process of it is left, children of dead parents included."""
        try:
            with self._locked_log():
                return True
        except BlockingIOError:
            return False

    def log(self) -> str:
        """Return all it has said, over all its starts."""
        return self.log_path.read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.clear()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                if self.is_running:
                    assert 0 == self.stop(), f"{self.name} did not end in order"
                wait_for(self.is_gone, f"all processes of {self.name} have ended")
        finally:
            self.clear()

    def clear(self) -> None:
        """Kill what is left of it, and show its log: pytest prints that where the test has failed."""
        for pid in self._survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self.log_path.exists():
            print(f"── log of {self.name} ──\n{self.log()}")

    def _survivors(self) -> Iterator[int]:
        """Yield its processes as far as the kernel shows us their files: to root, all of them."""
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
            with contextlib.suppress(OSError):
                if os.path.samefile(f"/proc/{pid}/fd/2", self.log_path):
                    yield pid

    @contextlib.contextmanager
    def _locked_log(self) -> Iterator[IO[bytes]]:
        with self.log_path.open("ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield log

    @contextlib.contextmanager
    def _notifications(self) -> Iterator[socket.socket]:
        path = self.folder / f"{self.name}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
            try:
                yield sock
            finally:
                path.unlink()
