"""An upgrade of the running agent, up to the moment the installed code takes over (docs/adr/0012).

    Rehearsal   the installed code, run beside us with a copy of what it would be given, says whether it could go on;
                where it could not, nothing has changed
    ── execve: same process, new code, `handover` ──
    Renewal     the new code replaces the children, which still run the old code (`renewal`)

Invariant: nothing runs with privileges in a rehearsal but the supervisor's own code; what the children will import is
imported by a child of it that has dropped all of them.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from kon_agent import __version__, credentials
from kon_agent.clock import NS_PER_S
from kon_agent.config.schema import Config
from kon_agent.errors import ControlError, KonError
from kon_agent.linux import notify, privileges
from kon_agent.linux.memory import create_memfd
from kon_agent.plugins import BUILTIN
from kon_agent.process import Exit, Profile, Role, describe_exit, launch, spawn
from kon_agent.supervisor import handover
from kon_agent.supervisor.handover import Handover
from kon_agent.supervisor.renewal import LOOK_INTERVAL_S, Renewal

log = logging.getLogger(__name__)

REHEARSAL_MAX_S = 60.0  # starting Python and importing everything, on a slow SD card
QUIET_MAX_S = 2.0  # what other control connections get to be answered before the change
OUTPUT_BYTES = 64 * 1024  # of a rehearsal: a few tracebacks
REHEARSAL_INTERVAL_S = 0.1  # how often to look while the installed code rehearses
REASON_LINES = 6
REASON_CHARS = 600


class Promise(msgspec.Struct, frozen=True):
    """A rehearsal's last line where all went well."""

    version: str


class Rehearsal:
    """The installed code trying on what it would be given.

    Args:
        given: what that is.
        now_ns: the scheduling clock.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, given: Handover, now_ns: int) -> None:
        self.refusal: ControlError | None = None
        self.version: str | None = None
        self._deadline_ns = now_ns + int(REHEARSAL_MAX_S * NS_PER_S)
        self._passed_ns = 0
        self._output_fd = create_memfd("kon-rehearsal", OUTPUT_BYTES)
        try:
            given_fd = handover.store(given)
            try:
                self._child = launch(handover.command(given_fd, is_rehearsal=True), [given_fd], self._output_fd)
            finally:
                os.close(given_fd)
        except OSError:
            os.close(self._output_fd)
            raise
        log.info("upgrade: the installed code tries whether it can take over, pid %d", self._child.pid)

    def outcome(self) -> None:
        """Say nothing as long as it may succeed; the answer to that comes from the new code.

        Raises:
            ControlError: it has failed.
        """
        if self.refusal is not None:
            raise self.refusal

    def look(self, now_ns: int) -> None:
        """End it where it takes too long."""
        if self.version is None and self.refusal is None and now_ns > self._deadline_ns:
            self._child.pidfd.send(signal.SIGKILL)

    def gone(self, ended: Exit, now_ns: int) -> bool:
        """Hear of a child that has ended; return whether it was this one."""
        if ended.pid != self._child.pid:
            return False
        self._child.pidfd.close()
        said = os.pread(self._output_fd, OUTPUT_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")
        os.close(self._output_fd)
        lines = [line for line in said.splitlines() if line.strip()]
        try:
            if ended.code != os.EX_OK:
                raise ValueError
            self.version = msgspec.json.decode(lines[-1], type=Promise).version
            self._passed_ns = now_ns
        except (ValueError, IndexError, msgspec.MsgspecError):
            overdue = f" after {REHEARSAL_MAX_S:g} s" if now_ns > self._deadline_ns else ""
            self.refuse(f"{describe_exit(ended)}{overdue}: {_summary(lines)}")
        return True

    def refuse(self, reason: str) -> None:
        """Call it off."""
        self.refusal = ControlError(
            "refused",
            f"the installed code cannot take over: {reason}",
            "nothing has changed; the agent goes on as it was",
        )

    def is_time(self, now_ns: int, is_quiet: bool) -> bool:
        """Whether to let the installed code take over now.

        Args:
            is_quiet: nobody waits for another answer, which would be lost.
        """
        if self.version is None or self.refusal is not None:
            return False
        return is_quiet or now_ns - self._passed_ns > QUIET_MAX_S * NS_PER_S


def _summary(lines: list[str]) -> str:
    text = " | ".join(line.strip() for line in lines[-REASON_LINES:]) or "it said nothing"
    return "".join(char if char.isprintable() else " " for char in text)[-REASON_CHARS:]


class Predecessor(Protocol):
    """What an upgrade needs of the supervisor that is to be replaced."""

    def capture(self, question: Callable[[], None] | None) -> Handover:
        """Return what the new code is given; it is to answer `question`."""

    def is_asked_for_nothing_but(self, question: Callable[[], None]) -> bool:
        """Whether no control connection waits for anything else."""

    @property
    def is_ending(self) -> bool:
        """Whether the agent is about to stop."""

    def take_signals(self) -> None:
        """Do what the signals that have come ask for."""


class Succession:
    """The upgrade that is under way, if there is one: before the change the old code's part, after it the new one's.

    Args:
        supervisor: who is to be replaced.
        signals: what it has handlers for.
    """

    def __init__(self, supervisor: Predecessor, signals: Iterable[signal.Signals]) -> None:
        self._supervisor = supervisor
        self._signals = tuple(signals)
        self._rehearsal: Rehearsal | None = None
        self._renewal: Renewal | None = None

    @property
    def interval_s(self) -> float:
        """How often to look at it, seconds."""
        if self._renewal is not None:
            return LOOK_INTERVAL_S
        return REHEARSAL_INTERVAL_S if self._rehearsal is not None else math.inf

    def begin(self, now_ns: int) -> Callable[[], None]:
        """Have the installed code rehearse; return the question how that goes.

        Raises:
            ControlError: there is an upgrade under way, the agent is about to stop, or it cannot be tried.
        """
        if self._rehearsal is not None or self._renewal is not None:
            raise ControlError("busy", "an upgrade is under way", "wait until it is over")
        if self._supervisor.is_ending:
            raise ControlError("stopping", "the agent is about to stop")
        try:
            self._rehearsal = Rehearsal(self._supervisor.capture(None), now_ns)
        except Exception as err:  # whatever is wrong with an upgrade, the agent goes on
            log.exception("the installed code cannot be tried")
            raise ControlError("refused", f"the installed code cannot be tried: {err}", "see the agent's log") from err
        return self._rehearsal.outcome

    def go_on(self, renewal: Renewal) -> None:
        """Be the new code: what remains to be done."""
        self._renewal = renewal

    def gone(self, ended: Exit, now_ns: int) -> None:
        """Hear of a child that has ended and is nobody else's."""
        if self._rehearsal is not None:
            self._rehearsal.gone(ended, now_ns)

    def advance(self, now_ns: int) -> None:
        """Do what is to be done now; does not return where that is the change."""
        if self._supervisor.is_ending:
            self._renewal = None  # the old code's processes end like the new one's
        if self._renewal is not None:
            self._renewal.advance(now_ns)
            if self._renewal.is_over:
                self._renewal = None
        rehearsal = self._rehearsal
        if rehearsal is None:
            return
        rehearsal.look(now_ns)
        if rehearsal.is_time(now_ns, self._supervisor.is_asked_for_nothing_but(rehearsal.outcome)):
            self._hand_over(rehearsal)
        if rehearsal.refusal is not None:
            log.error("upgrade: %s", rehearsal.refusal)
            self._rehearsal = None  # whoever asked still has the question

    def _hand_over(self, rehearsal: Rehearsal) -> None:
        """Become the installed code; come back only where that cannot be."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)  # until there are handlers again: none is lost
        try:
            self._supervisor.take_signals()
            if self._supervisor.is_ending:
                rehearsal.refuse("the agent is about to stop")
                return
            log.info("upgrade: kon-agent %s hands over to %s", __version__, rehearsal.version)
            # systemd wants to know since when (sd_notify(3)); it counts by CLOCK_MONOTONIC.
            notify.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            handover.execute(self._supervisor.capture(rehearsal.outcome))
        except Exception as err:  # whatever is wrong with an upgrade, the agent goes on
            log.exception("the installed code cannot be executed")
            rehearsal.refuse(f"it cannot be executed: {err}")
            notify.notify("READY=1")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)


# ── in the rehearsal ──────────────────────────────────────────────────────────────────────────────────────────────


def rehearse(config: Config, given_fd: int) -> int:
    """See whether this code, with this configuration, could take over; promise it on standard output if so.

    Raises:
        KonError: it could not; the message says why.
    """
    given = handover.load(given_fd)
    handover.check(given, config)
    credentials.check(config.tls)
    kinds = {section.type or name for name, section in config.plugins.by_name().items() if section.enable}
    collectors = [BUILTIN[kind].partition(":")[0] for kind in sorted(kinds & BUILTIN.keys())]
    role = Role(
        title="kon-agent: rehearsal",
        body="kon_agent.process:import_all",
        user=privileges.resolve_user(config.user) if os.getuid() == 0 else None,
        profile=Profile(allow=frozenset({"network"}), nofile=256),
    )
    child = spawn(role, ["kon_agent.worker", *collectors, "kon_agent.sender.main"])
    _, status = os.waitpid(child.pid, 0)
    if status != 0:
        raise KonError("what the workers and the sender run cannot be imported")
    print(msgspec.json.encode(Promise(__version__)).decode(), flush=True)
    return os.EX_OK
