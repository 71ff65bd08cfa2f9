"""From a command to a running supervisor: in a process of its own, or in the place of one that hands over."""

from __future__ import annotations

import logging
import os

from setproctitle import setproctitle

from kon_agent import credentials, logs
from kon_agent.config.schema import Config
from kon_agent.supervisor import handover
from kon_agent.supervisor.main import Supervisor

log = logging.getLogger(__name__)


def run(config: Config, config_path: str | None, given_fd: int | None = None) -> int:
    """Run the agent in the foreground until told to stop; return the process's exit code.

    Args:
        config: the validated configuration.
        config_path: where it came from, for reloads; None for the built-in defaults.
        given_fd: holds the `handover` of the supervisor this process was until now, to go on from.

    Raises:
        KonError: it cannot start.
    """
    _open_standard_streams()
    logs.dont_wait_for_readers()
    logs.setup("supervisor", config.log.level, config.log.format)
    setproctitle("kon-agent: supervisor")
    if given_fd is not None:
        return _take_over(config, config_path, handover.receive(given_fd))
    credentials.check(config.tls)
    supervisor = Supervisor(config, config_path)
    try:
        supervisor.open()
        return supervisor.run()
    finally:
        supervisor.close()


def _take_over(config: Config, config_path: str | None, taken: handover.Handover) -> int:
    """Go on with what another supervisor has handed over; where that cannot be, end its children and start afresh."""
    try:
        supervisor = Supervisor(config, config_path, taken)
        supervisor.open()
    except Exception:
        log.exception("what kon-agent %s has handed over cannot be taken over: the agent starts afresh", taken.version)
        handover.start_afresh(taken)
    try:
        return supervisor.run()
    finally:
        supervisor.close()


def _open_standard_streams() -> None:
    """Have something behind descriptors 0 to 2, or the next thing opened would be there, and every child has those."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
