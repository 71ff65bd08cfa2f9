"""What a supervisor hands to the code that takes its place: the state of everything, and the descriptors it lives by.

An upgrade executes the installed code in this very process (docs/adr/0012). The process id stays, and with it the
children; descriptors stay where they are told to. Everything else is memory, and goes through this module:

    old code ── Handover ──▶ sealed memory, one descriptor ── execve(…, --take-over FD) ──▶ Handover ── new code

Invariants:
* Only what cannot be found out anew is here. What follows from the configuration file is read from it again.
* A reader ignores fields it does not know, and every field added later has a default, so that either side may be the
  newer one. FORMAT is raised where that is not enough: also when the layout of memory that an old child shares with
  the new supervisor changes (`ring`, `page`, `linkreport`, `spoolreport`, `spec.encode_orders`).
* Descriptors are inherited by exactly one execve, and only if they are named here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from kon_agent import linkreport, spoolreport
from kon_agent.bpf.handover import Counters
from kon_agent.config.schema import Config
from kon_agent.control_protocol import encode_error
from kon_agent.errors import ControlError, KonError
from kon_agent.lifecycle import State
from kon_agent.linux.memory import create_memfd

FORMAT = 2
MAX_HANDOVER_BYTES = 16 * 1024 * 1024  # 48 plugins with 9 rings each and 1000 interfaces take some 500 KiB
OPTION = "--take-over"  # of `kon-agent run`; one that does not know it ends with a usage error and does nothing
REHEARSE = "--rehearse"


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """A supervised process: `Supervised`, and its `Lifecycle`.

    What rests after a death is handed over as stopped, and deaths are not: the new code may well be the cure.
    """

    pid: int | None
    state: State
    restarts: int = 0
    last_exit: str | None = None
    deaths: list[tuple[int, str]] = []
    started_ns: int = 0
    kill_at_ns: int | None = None
    kill_reason: str = ""


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """A `SharedRing`; its two areas are open for reading and writing."""

    number: int
    plugin: str
    size_bytes: int
    epoch: int
    is_closed: bool
    producer_fd: int
    consumer_fd: int


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """A `Unit`.

    Attributes:
        kind: the plugin it is an instance of.
        is_wanted, period_s: as things are; `was_enabled` and `was_period_s` as the configuration has had it. What has
            been changed by hand stays so, unless the configuration has changed as well. What the governor has done is
            undone: the new one begins afresh.
        rings: the oldest first; `has_current`: the last one is that of the present worker.
    """

    name: str
    kind: str
    life: Life
    is_wanted: bool
    was_enabled: bool
    period_s: float
    was_period_s: float
    orders_fd: int
    rings: list[Ring] = []
    has_current: bool = False
    totals: dict[str, int] = {}
    missed_ticks: int = 0
    stderr_fd: int | None = None


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """The `Courier`: its channel, the pages the sender reports in, and how long those reports are."""

    life: Life
    orders_fd: int | None
    link_page_fd: int
    link_bytes: int
    spool_page_fd: int
    spool_bytes: int
    gone_wall_ns: int


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A control connection whose request has not arrived whole."""

    fd: int
    received: bytes = b""


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Everything.

    Attributes:
        format: FORMAT of the code that wrote it.
        version: of the agent that hands over.
        slots: names that have a slot in the spool's report, in order.
        leaving: plugins that have been removed and are not gone yet.
        kept: settings that a running agent cannot change, and what they are.
        asking_fd: the control connection that wants to know how this ends; None where nobody does.
        connections: the other ones.
    """

    format: int
    version: str
    started_ns: int
    next_ring: int
    doorbell_fd: int
    listener_fd: int
    asking_fd: int | None = None
    connections: list[Connection] = []
    slots: list[str] = []
    plugins: list[Plugin] = []
    leaving: list[Plugin] = []
    sender: Sender
    counters: Counters | None = None
    kept: dict[str, str] = {}

    def descriptors(self) -> Iterator[int]:
        """Yield every descriptor the new code takes over."""
        yield from (self.doorbell_fd, self.listener_fd, self.sender.link_page_fd, self.sender.spool_page_fd)
        yield from (fd for fd in (self.asking_fd, self.sender.orders_fd) if fd is not None)
        yield from (connection.fd for connection in self.connections)
        for plugin in (*self.plugins, *self.leaving):
            yield plugin.orders_fd
            if plugin.stderr_fd is not None:
                yield plugin.stderr_fd
            for ring in plugin.rings:
                yield from (ring.producer_fd, ring.consumer_fd)
        if self.counters is not None:
            yield from self.counters.descriptors()


def kept_settings(config: Config) -> dict[str, str]:
    """Return the settings that an upgrade cannot change: what is handed over was made by them."""
    return {"cache.path": config.cache.path, "control.socket": config.control.socket, "user": config.user}


def store(handover: Handover) -> int:
    """Write it into sealed memory and return the descriptor.

    Raises:
        OSError: no memory or no descriptor left.
    """
    data = msgspec.json.encode(handover)
    fd = create_memfd("kon-handover", len(data))
    os.pwrite(fd, data, 0)  # a memory file takes all of it at once
    return fd


def load(fd: int) -> Handover:
    """Read what `store` wrote; `fd` stays open.

    Raises:
        KonError: it is nothing this code understands.
    """
    try:
        data = os.pread(fd, MAX_HANDOVER_BYTES, 0)
        head = msgspec.json.decode(data, type=_Head)
        if head.format != FORMAT:
            raise KonError(
                f"kon-agent {head.version} hands over in format {head.format}, this version understands {FORMAT}; "
                "restart the agent instead"
            )
        return msgspec.json.decode(data, type=Handover)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise KonError(
            f"what is handed over in descriptor {fd} makes no sense: {err}; restart the agent instead"
        ) from err


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    version: str = ""


def check(handover: Handover, config: Config) -> None:
    """See that this code, with this configuration, can go on from there.

    Raises:
        KonError: it cannot; the message says why.
    """
    now = kept_settings(config)
    changed = [f"{key} ({was} -> {now[key]})" for key, was in handover.kept.items() if now.get(key, was) != was]
    if changed:
        raise KonError(f"{', '.join(changed)} has changed, which takes a restart of the agent")
    if (handover.sender.link_bytes, handover.sender.spool_bytes) != (linkreport.REPORT_BYTES, spoolreport.REPORT_BYTES):
        raise KonError("the sender's reports have another form in this version, which takes a restart of the agent")


def command(fd: int | None = None, *, is_rehearsal: bool = False) -> list[str]:
    """Return the command line that starts the installed code as this process was started.

    Args:
        fd: the handover it is to go on from; None: it starts from nothing.
        is_rehearsal: it is to see whether it could, and no more.
    """
    # An upgraded process was itself started with these options. They come last.
    before = sys.orig_argv[1 : sys.orig_argv.index(OPTION)] if OPTION in sys.orig_argv else sys.orig_argv[1:]
    # By its full name: the interpreter finds its environment by it (docs.python.org/3/library/venv.html).
    took = [] if fd is None else [OPTION, str(fd), *([REHEARSE] if is_rehearsal else [])]
    return [sys.executable, *before, *took]


def execute(handover: Handover) -> NoReturn:
    """Become the installed code, which goes on from `handover`.

    Raises:
        OSError: that cannot be; nothing has changed.
    """
    fd = store(handover)
    try:
        with inheritable([fd, *handover.descriptors()]):
            argv = command(fd)
            os.execve(argv[0], argv, os.environ)  # noqa: S606 - no shell is wanted
    finally:
        os.close(fd)


def start_afresh(taken: Handover) -> NoReturn:
    """Become the installed code with nothing handed over: every descriptor but the standard streams is closed.

    The workers are killed. The sender finds its channel closed, writes what is in the rings to the spool, and ends.

    Raises:
        OSError: that cannot be.
    """
    for plugin in (*taken.plugins, *taken.leaving):
        if plugin.life.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # reaped by us already
                os.kill(plugin.life.pid, signal.SIGKILL)
    if taken.asking_fd is not None:
        error = ControlError("failed", "the new code could not take over and starts afresh", "look at the agent's log")
        with contextlib.suppress(OSError):  # who asked has gone
            os.write(taken.asking_fd, encode_error(error))
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(fd, False)
    argv = command()
    os.execve(argv[0], argv, os.environ)  # noqa: S606 - no shell is wanted


@contextlib.contextmanager
def inheritable(fds: list[int]) -> Iterator[None]:
    """Let what is executed meanwhile have these descriptors."""
    try:
        for fd in fds:
            os.set_inheritable(fd, True)
        yield
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


def receive(fd: int) -> Handover:
    """Take over: return what `execute` was given, its descriptors ours alone again.

    Raises:
        KonError: it is nothing this code understands.
    """
    handover = load(fd)
    for inherited in handover.descriptors():
        os.set_inheritable(inherited, False)
    os.close(fd)
    return handover
