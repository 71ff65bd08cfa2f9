"""Logs: one line per event on stderr, as text or JSON, stamped with the process that speaks.

Under systemd (JOURNAL_STREAM set) the text form leaves out the time, which the journal keeps itself.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

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


def setup(process_name: str, level: str = "info", form: str = "text") -> None:
    """Send this process's log to stderr, replacing what a parent had set up.

    Args:
        process_name: "supervisor", "worker cpu", "sender".
        level: debug, info, warning or error.
        form: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter(process_name))
    else:
        text = _TEXT.removeprefix("%(asctime)s ") if "JOURNAL_STREAM" in os.environ else _TEXT
        handler.setFormatter(logging.Formatter(text.replace("%(process_name)s", process_name)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
