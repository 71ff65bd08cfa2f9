"""The `exec` collector: any program that prints metrics, in the Prometheus text format or InfluxDB's line protocol.

    oneshot     each cycle runs the program to its end, within the timeout, and reads all it has printed
    stream      the program runs all the time; each cycle takes the lines that have come since the last one

Besides the program's own metrics it reports on the program:
    exec_success                1: it did what it should; a stream: it runs
    exec_duration_seconds       how long the run took; a stream: how long it has been running
    exec_exit_code              of a run that has ended; the negative number of the signal that ended it
    exec_rejected_lines_total   lines that could not be read, since this worker started
    exec_skipped_fields_total   fields that are text, since this worker started (InfluxDB's line protocol only)
    exec_breaker_open           1: it failed too often in a row and rests

Invariants:
* Nothing the program does or prints raises here, and nothing it prints is unbounded: neither output, series, lines in
  the log, nor time.
* At most one run exists, and between two oneshot runs none of its processes is left.
* A program that fails is reported when that begins and when it is over, not in every cycle.

What the program may do is `supervisor.profiles`' and `linux.seccomp`'s business.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable

from kon_agent.backoff import Backoff
from kon_agent.breaker import Breaker
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import ExecConfig
from kon_agent.errors import KonError
from kon_agent.linux import landlock
from kon_agent.linux.executable import SEARCH_PATH
from kon_agent.metric import Metric
from kon_agent.plugins import exposition, lineprotocol
from kon_agent.plugins.context import Context
from kon_agent.plugins.printed import Printed, printable
from kon_agent.plugins.program import Program

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 1024 * 1024  # of one run, or of a stream in one cycle: MAX_SERIES lines of 500 bytes
MAX_READS = 64  # of a stream in one cycle, each up to 64 KiB: it may print, on either output, faster than we read
MAX_ERROR_LINES = 10  # of its standard error in the log, each ERROR_WINDOW_S
ERROR_WINDOW_S = 60.0
MAX_ERROR_CHARACTERS = 300
ORPHAN_CHECK_S = 0.5  # how soon the supervisor's death is noticed while the program runs
STREAM_BACKOFF_BASE_S = 1.0
STREAM_BACKOFF_MAX_S = 60.0
STREAM_STEADY_S = 60.0  # a stream that has run so long, and printed something, is well again

_PARSERS = {"prometheus": exposition.parse, "influx": lineprotocol.parse}


class Exec:
    """Run `config.command` and report what it prints."""

    def __init__(self, config: ExecConfig, context: Context) -> None:
        self._config = config
        self._now_ns = context.now_ns
        self._parse = _PARSERS[config.format]
        self._environment = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", **config.environment}
        self._timeout_s = float(config.timeout or config.period)
        self._name = config.command[0]
        self._parent_pid = os.getppid()
        self._breaker = Breaker(self._name)
        self._backoff = Backoff(STREAM_BACKOFF_BASE_S, STREAM_BACKOFF_MAX_S, random.random)
        self._program: Program | None = None
        self._started_ns = 0
        self._retry_at_ns = 0
        self._has_started_once = False
        self._is_steady = False
        self._lines = 0  # printed by this run so far
        self._rejected = 0
        self._skipped = 0
        self._trouble = ""
        self._has_complained = False
        self._errors_until_ns = 0
        self._errors_left = 0
        self._errors_unsaid = 0

    def start(self) -> None:
        """Say what this kernel cannot confine."""
        if landlock.supported_abi() == 0:
            log.warning(
                "this kernel has no Landlock: %s may run any other program and read what its user may", self._name
            )

    def stop(self) -> None:
        """End the program."""
        if self._program is not None:
            self._program.end()
            self._program = None

    def collect(self) -> Iterable[Metric]:
        """Return what the program has printed, and how it fares.

        Raises:
            KonError: the program's file was replaced; a new worker may run it.
        """
        return self._run_once() if self._config.mode == "oneshot" else self._take_stream()

    # One run in each cycle.

    def _run_once(self) -> list[Metric]:
        if not self._breaker.allows(self._now_ns()):
            return self._report({"exec_success": 0})
        trouble, printed, code = "", Printed(), None
        if self._start():
            trouble = self._await_end()
            printed, code = self._finish()
            trouble = trouble or _exit_trouble(code) or _output_trouble(printed)
        else:
            trouble = self._trouble
        duration_s = (self._now_ns() - self._started_ns) / NS_PER_S
        self._judge(trouble)
        own = {"exec_success": float(not trouble), "exec_duration_seconds": duration_s}
        if code is not None:
            own["exec_exit_code"] = code
        return [*printed.metrics, *self._report(own)]

    def _await_end(self) -> str:
        """Wait until the program has ended; return why it has to be killed, or nothing."""
        assert self._program is not None
        deadline_ns = self._started_ns + int(self._timeout_s * NS_PER_S)
        while not self._program.has_ended or self._program.is_full:
            left_s = (deadline_ns - self._now_ns()) / NS_PER_S
            if self._program.is_full:
                return f"printed more than {MAX_OUTPUT_BYTES} bytes and was killed"
            if left_s <= 0:
                return f"took longer than {self._timeout_s:g} s and was killed"
            if os.getppid() != self._parent_pid:
                return "was killed, as the supervisor is gone"
            self._program.listen(min(left_s, ORPHAN_CHECK_S))
        return ""

    # One run for ever.

    def _take_stream(self) -> list[Metric]:
        if self._program is None and not self._restart_stream():
            return self._report({"exec_success": 0})
        assert self._program is not None
        for _ in range(MAX_READS):
            if not self._program.listen(0) or self._program.has_ended or self._program.is_full:
                break
        own = {"exec_duration_seconds": (self._now_ns() - self._started_ns) / NS_PER_S}
        if self._program.has_ended:
            printed, code = self._finish()
            own |= {"exec_success": 0, "exec_exit_code": code}
            self._judge(_exit_trouble(code) or "ended, as a stream should not")
            self._retry_at_ns = self._now_ns() + int(self._backoff.next_s() * NS_PER_S)
        else:
            printed = self._read_lines()
            own["exec_success"] = 1
            if printed.metrics and not self._is_steady and own["exec_duration_seconds"] >= STREAM_STEADY_S:
                self._is_steady = True
                self._backoff.reset()
                self._judge("")
        return [*printed.metrics, *self._report(own)]

    def _restart_stream(self) -> bool:
        """Start the program if it is due and return whether it runs."""
        now_ns = self._now_ns()
        if now_ns < self._retry_at_ns or not self._breaker.allows(now_ns):
            return False
        self._is_steady = False
        if self._start():
            return True
        self._judge(self._trouble)
        self._retry_at_ns = now_ns + int(self._backoff.next_s() * NS_PER_S)
        return False

    # Both.

    def _start(self) -> bool:
        """Start the program and return whether that could be done; else `_trouble` says why not."""
        self._lines = 0
        self._started_ns = self._now_ns()
        try:
            self._program = Program(self._config.command, self._environment, MAX_OUTPUT_BYTES)
        except OSError as err:
            if isinstance(err, PermissionError) and self._has_started_once:
                # Landlock's rules are for the files of the time they were made.
                raise KonError(
                    f"{self._name} can no longer be run: {err}; if an upgrade has replaced it or its interpreter, "
                    "the next worker may"
                ) from err
            hint = "; the agent's `user` must be able to reach and run it" if isinstance(err, PermissionError) else ""
            self._note(f"could not be started: {err}{hint}")
            return False
        self._has_started_once = True
        return True

    def _finish(self) -> tuple[Printed, int]:
        """End the program; return what it had printed last, and its exit code."""
        assert self._program is not None
        code = self._program.end()
        printed = self._read_lines(with_unfinished=code == 0)
        self._program = None
        return printed, code

    def _read_lines(self, *, with_unfinished: bool = False) -> Printed:
        assert self._program is not None
        lines = self._program.take_lines(with_unfinished=with_unfinished)
        printed = self._parse(lines, self._lines + 1)
        self._lines += len(lines)
        self._rejected += printed.rejected
        self._skipped += printed.skipped
        if printed.complaint and not self._has_complained:
            log.warning("%s: %d lines rejected: %s", self._name, printed.rejected, printed.complaint)
        if lines:
            self._has_complained = bool(printed.complaint)
        self._log_errors(*self._program.take_errors())
        return printed

    def _judge(self, trouble: str) -> None:
        if trouble:
            self._breaker.failed(self._now_ns())
        else:
            self._breaker.succeeded()
        self._note(trouble)

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("%s %s", self._name, trouble)
        elif self._trouble and not trouble:
            log.info("%s works again", self._name)
        self._trouble = trouble

    def _log_errors(self, text: bytes, lost: int) -> None:
        """Pass on what the program has written to its standard error, within the allowance."""
        now_ns = self._now_ns()
        if now_ns >= self._errors_until_ns:
            if self._errors_unsaid:
                log.warning("%s wrote %d more lines to its standard error", self._name, self._errors_unsaid)
            self._errors_until_ns = now_ns + int(ERROR_WINDOW_S * NS_PER_S)
            self._errors_left, self._errors_unsaid = MAX_ERROR_LINES, 0
        self._errors_unsaid += lost
        for line in text.splitlines():
            if self._errors_left:
                self._errors_left -= 1
                log.warning("%s: %s", self._name, printable(line, MAX_ERROR_CHARACTERS))
            else:
                self._errors_unsaid += 1

    def _report(self, own: dict[str, float]) -> list[Metric]:
        own |= {"exec_rejected_lines_total": self._rejected, "exec_breaker_open": float(self._breaker.is_open)}
        if self._config.format == "influx":
            own["exec_skipped_fields_total"] = self._skipped
        return [Metric(name, float(value)) for name, value in own.items()]


def _exit_trouble(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    return f"exited with {code}" if code else ""


def _output_trouble(printed: Printed) -> str:
    if printed.rejected and not printed.metrics:
        return "printed nothing that can be read"
    return ""
