"""Logs: one line per event on stderr, as text or JSON, stamped with the process that speaks.

Under systemd (JOURNAL_STREAM set) the text form leaves out the time, which the journal keeps itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import traceback
from typing import TextIO

import msgspec

_TEXT = "%(asctime)s %(levelname)-7s %(process_name)s: %(message)s"


class _JsonFormatter(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._process_name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return msgspec.json.encode(line).decode()


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to stderr, and never waits nor fails for it: a reader that has stopped or gone costs log lines only."""

    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.lost:
            lost, self.lost = self.lost, 0
            text = f"{lost} log lines could not be written here"
            super().emit(logging.LogRecord(record.name, logging.WARNING, "", 0, text, None, None))
            if self.lost:  # nor could that
                self.lost += lost - 1
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            self.lost += 1
        else:
            super().handleError(record)


def dont_wait_for_readers() -> None:
    """Make writing to stderr return at once where it is a pipe nobody reads, for this process and all it forks.

    The pipe is opened anew: the flag belongs to the opening, which others (a shell) may share.
    """
    if stat.S_ISFIFO(os.fstat(2).st_mode):
        with contextlib.suppress(OSError):  # a pipe we may not open by name: then it blocks, as it always has
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.dup2(fd, 2)
            os.close(fd)


def setup(process_name: str, level: str = "info", form: str = "text") -> None:
    """Send this process's log to stderr, replacing what a parent had set up.

    Args:
        process_name: "supervisor", "worker cpu", "sender".
        level: debug, info, warning or error.
        form: text or json.
    """
    handler = _Stderr(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter(process_name))
    else:
        text = _TEXT.removeprefix("%(asctime)s ") if "JOURNAL_STREAM" in os.environ else _TEXT
        handler.setFormatter(logging.Formatter(text.replace("%(process_name)s", process_name)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
