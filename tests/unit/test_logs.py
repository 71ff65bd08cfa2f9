"""The logs' promises: one line per event, in the form asked for, and a lost reader harms nobody."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator

import pytest

from kon_agent import logs

log = logging.getLogger("kon_agent.test")


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_tells_when_how_bad_who_and_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with time, level, process and message."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.setup("worker cpu")
    log.warning("%d things", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ WARNING worker cpu: 3 things\n", capsys.readouterr().err)


def test_the_journal_keeps_its_own_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under systemd the line begins with the level."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    logs.setup("sender")
    log.info("hello")
    assert "INFO    sender: hello\n" == capsys.readouterr().err


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Newlines and quotes of a message stay inside its string; a traceback comes along."""
    logs.setup("sender", form="json")
    log.error('two\n"lines"')
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert ("error", "sender", 'two\n"lines"') == (first["level"], first["process"], first["message"])
    assert "traceback" not in first
    assert "ValueError: why" in second["traceback"]


def test_what_is_below_the_level_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Quiet when healthy."""
    logs.setup("sender", level="warning")
    log.info("all is well")
    assert "" == capsys.readouterr().err


def test_a_child_replaces_what_its_parent_had_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Each event is said once, in the name of the process that says it."""
    logs.setup("supervisor", form="json")
    logs.setup("worker cpu", form="json")
    log.info("once")
    [line] = capsys.readouterr().err.splitlines()
    assert "worker cpu" == json.loads(line)["process"]


class Gone(io.StringIO):
    """A stream whose reader has closed its end."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_reader_that_has_gone_harms_nobody(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Where stderr is a closed pipe, logging fails in silence."""
    monkeypatch.setattr(sys, "stderr", Gone())
    logs.setup("supervisor", form=form)
    log.error("nobody hears this")


def test_a_reader_that_stops_costs_lines_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pipe neither blocks nor raises; once there is room again, the log says how much is missing."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    with open(write_fd, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        logs.setup("sender")
        for _ in range(3000):
            log.info("x" * 100)
        while True:
            try:
                os.read(read_fd, 1 << 20)
            except BlockingIOError:
                break
        log.info("after")
        said = os.read(read_fd, 1 << 20).decode()
    os.close(read_fd)
    assert re.search(r"\d+ log lines could not be written here", said)
    assert said.endswith("INFO    sender: after\n")
