"""The command `kon-agent tap`: the records of a running agent as they pass.

Owns read-only mappings of the producers' areas, which the supervisor hands to root and the control group, and one
position in each (`tapping`). It looks at the rings by itself and asks the supervisor once a second which there are:
nobody on a record's path knows of it. Nothing printed can write to a terminal.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import click
import msgspec

from kon_agent import clock
from kon_agent.cli import client, target
from kon_agent.cli.tables import printable
from kon_agent.clock import NS_PER_S
from kon_agent.control_protocol import Op, Request, RingPlace, Tapping
from kon_agent.errors import ControlError, RingError
from kon_agent.linux.memory import map_memory, unmap_memory
from kon_agent.ring import Record, producer_bytes
from kon_agent.tapping import Tap

LOOK_INTERVAL_MS = 20  # a ring takes longer than this to be written once around, unless its plugin does nothing else
ASK_INTERVAL_NS = NS_PER_S  # a new worker's ring is read from its start, so that nothing passes unseen meanwhile
NICENESS = 10  # nice(2): where the processor is short, the agent comes first and we miss records
MAX_BURST = 1000  # records of one ring before the next one's turn

Ask = Callable[[list[int]], Tapping]
"""Asks the supervisor for the rings; takes the list for their descriptors."""

Note = Callable[[str], None]
"""Tells the user what is no record."""


class TappedRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One record, its fields named as `kon-receiver query --json` names them.

    Attributes:
        epoch: 16 hexadecimal digits.
        clock_unsynced: the clock had not been set since the machine started: `ts_ns` may be years off.
    """

    agent: str
    plugin: str
    epoch: str
    seq: int
    ts_ns: int
    name: str
    value: float
    labels: dict[str, str]
    clock_unsynced: bool = False


class TappedRing:
    """One ring's memory, mapped read-only, and the tap in it.

    Args:
        agent: whose it is.
        place: which it is.
        fd: its producer's area; may be closed afterwards.
        from_start: begin with the oldest record that is still there.

    Raises:
        RingError: it cannot be mapped.
    """

    def __init__(self, agent: str, place: RingPlace, fd: int, *, from_start: bool) -> None:
        self.place = place
        self._agent = agent
        try:
            self._memory = map_memory(fd, producer_bytes(place.size_bytes), writable=False, inherit=False)
        except OSError as err:
            raise RingError(f"the ring of {place.plugin} cannot be seen: {err}; tap fewer with --plugin") from err
        self._tap = Tap(self._memory, place.size_bytes, from_start=from_start)
        self._missed_told = 0
        self._is_nonsense_told = False

    def read(self, now_ns: int, note: Note) -> Iterator[TappedRecord]:
        """Yield what has come since, at most MAX_BURST; tell what was missed.

        Raises:
            RingError: it holds what no worker writes.
        """
        for _ in range(MAX_BURST):
            record = self._tap.read(now_ns)
            if self._tap.missed > self._missed_told:
                missed = self._tap.missed - self._missed_told
                self._missed_told = self._tap.missed
                note(f"missed {missed} records of {self.place.plugin}: they passed faster than they could be shown")
            if record is None:
                return
            if record.payload and (decoded := self._decode(record, note)):
                yield decoded

    def _decode(self, record: Record, note: Note) -> TappedRecord | None:
        from google.protobuf.message import DecodeError

        from kon_agent.wire import kon_agent_pb2 as pb

        try:
            (metric,) = pb.Segment.FromString(record.payload).metrics
        except (DecodeError, ValueError):
            if not self._is_nonsense_told:
                self._is_nonsense_told = True
                note(f"record {record.seq} of {self.place.plugin} is none; more of that kind are left out")
            return None
        return TappedRecord(
            agent=self._agent,
            plugin=self.place.plugin,
            epoch=f"{self.place.epoch:016x}",
            seq=record.seq,
            ts_ns=metric.timestamp,
            name=metric.name,
            value=metric.value,
            labels=dict(metric.labels),
            clock_unsynced=metric.clock_unsynced,
        )

    def close(self) -> None:
        """Let go of the memory."""
        self._tap.close()
        unmap_memory(self._memory)


class Taps:
    """The rings of an agent, found and left as its workers come and go.

    Args:
        ask: asks for them.
        note: tells the user what is no record.
        from_start: begin with what is still in the rings.
    """

    def __init__(self, ask: Ask, note: Note, *, from_start: bool = False) -> None:
        self._ask = ask
        self._note = note
        self._from_start = from_start
        self._rings: dict[tuple[str, int], TappedRing] = {}
        self._left: list[TappedRing] = []  # no longer listed: what is in them is read, then they are let go
        self._refused: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Take in the rings that are new, and let go of those that are gone.

        Raises:
            ControlError: there is no answer, or it makes no sense.
            RingError: a ring cannot be mapped.
        """
        fds: list[int] = []
        try:
            answer = self._ask(fds)
            if len(fds) != len(answer.rings):
                raise ControlError(
                    "bad_reply", f"{len(fds)} descriptors came for {len(answer.rings)} rings", "try `ulimit -n 1024`"
                )
            self._take_in(answer, fds)
        finally:
            for fd in fds:
                os.close(fd)
        self._from_start = True  # what comes from now on is new

    def _take_in(self, answer: Tapping, fds: list[int]) -> None:
        listed = {(place.plugin, place.epoch): (place, fd) for place, fd in zip(answer.rings, fds, strict=True)}
        for key in self._rings.keys() - listed.keys():
            self._left.append(self._rings.pop(key))
        for key in listed.keys() - self._rings.keys() - self._refused:
            place, fd = listed[key]
            self._rings[key] = TappedRing(answer.agent_id, place, fd, from_start=self._from_start)

    def read(self, now_ns: int) -> Iterator[TappedRecord]:
        """Yield what has passed since the last time, ring by ring."""
        for key, ring in list(self._rings.items()):
            try:
                yield from ring.read(now_ns, self._note)
            except RingError as err:
                self._note(f"the ring of {ring.place.plugin} is left alone: {err}")
                self._refused.add(key)
                self._rings.pop(key).close()
        left, self._left = self._left, []
        for ring in left:
            try:
                yield from ring.read(now_ns, self._note)
            except RingError as err:
                self._note(f"the ring of {ring.place.plugin} ended in nonsense: {err}")
            ring.close()

    def close(self) -> None:
        """Let go of every ring."""
        for ring in [*self._rings.values(), *self._left]:
            ring.close()
        self._rings, self._left = {}, []


@dataclass(slots=True)
class Stream:
    """Records on their way to the user.

    Args:
        taps: where they come from.
        out: where they go, flushed after each look.
        note: tells the user what is no record.
        glob: which names pass.
        as_json: objects instead of lines for people.
        count: end after so many; None: never.
        seconds: end after so long; None: never.
    """

    taps: Taps
    out: BinaryIO
    note: Note
    glob: str = "*"
    as_json: bool = False
    count: int | None = None
    seconds: float | None = None
    _is_unanswered: bool = field(default=False, init=False)

    def run(self) -> None:
        """Show records until it is enough, or nobody reads them any more.

        Raises:
            ControlError: the first question was not answered; later ones are asked again.
            BrokenPipeError: nobody reads.
        """
        now_ns = clock.now_ns()
        ends_ns = None if self.seconds is None else now_ns + int(self.seconds * NS_PER_S)
        self.taps.refresh()
        ask_ns = now_ns + ASK_INTERVAL_NS
        gone = select.poll()
        gone.register(self.out, 0)  # POLLERR and POLLHUP come unasked, poll(2): the reader of a pipe has left
        left = self.count
        while left != 0 and (ends_ns is None or now_ns < ends_ns):
            if gone.poll(LOOK_INTERVAL_MS):
                return
            now_ns = clock.now_ns()
            if now_ns >= ask_ns:
                ask_ns = now_ns + ASK_INTERVAL_NS
                self._ask_again()
            for record in self.taps.read(now_ns):
                if left != 0 and fnmatch.fnmatchcase(record.name, self.glob):
                    self.out.write(line(record, self.as_json))
                    left = None if left is None else left - 1
            self.out.flush()

    def _ask_again(self) -> None:
        try:
            self.taps.refresh()
        except ControlError as err:
            if not self._is_unanswered:
                self.note(f"no answer: {err}")
            self._is_unanswered = True
        else:
            self._is_unanswered = False


def yield_to_the_agent() -> None:
    """Have this process wait for the processor longer than the agent does."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)


def line(record: TappedRecord, as_json: bool) -> bytes:
    """Return a record's line: JSON, or time, plugin, name{labels} and value."""
    if as_json:
        return msgspec.json.encode(record) + b"\n"
    pairs = ",".join(f'{key}="{value}"' for key, value in sorted(record.labels.items()))
    series = f"{record.name}{{{pairs}}}" if pairs else record.name
    when = time_of_day(record.ts_ns) + ("?" if record.clock_unsynced else "")
    text = f"{when}  {record.plugin:<10}  {series}  {record.value:.15g}"
    return printable(text).encode(errors="replace") + b"\n"


def time_of_day(ts_ns: int) -> str:
    """Return a time stamp as local time, `15:04:05.678`."""
    try:
        moment = datetime.datetime.fromtimestamp(ts_ns // NS_PER_S)
    except (ValueError, OverflowError, OSError):
        return f"{ts_ns} ns"  # a plugin may say anything
    return f"{moment:%H:%M:%S}.{ts_ns % NS_PER_S // 1_000_000:03}"


@click.command()
@click.option("--plugin", metavar="P", help="Only this plugin's.")
@click.option("--name", "glob", metavar="GLOB", default="*", help="Only metrics of such a name, for instance 'cpu_*'.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N records.")
@click.option("--for", "seconds", type=target.Seconds(min=0), metavar="SECONDS", help="End then.")
@click.option("--from-start", is_flag=True, help="Begin with what is still in the rings.")
@target.control_options
def tap(
    plugin: str | None,
    glob: str,
    count: int | None,
    seconds: float | None,
    from_start: bool,
    socket_path: str | None,
    config_file: str | None,
    as_json: bool,
) -> None:
    """Show records as they pass, without touching them; needs root or the control group. Ctrl-C ends it."""
    path = target.socket_path(socket_path, config_file)

    def ask(fds: list[int]) -> Tapping:
        return client.call(path, Request(op=Op.TAP, plugin=plugin), Tapping, fds=fds)

    def note(text: str) -> None:
        click.echo(printable(text), err=True)

    yield_to_the_agent()
    taps = Taps(ask, note, from_start=from_start)
    try:
        Stream(taps, sys.stdout.buffer, note, glob, as_json, count, seconds).run()
    except KeyboardInterrupt:
        pass  # the usual way to end it
    except BrokenPipeError:  # `tap | head`; do not let the interpreter complain of it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        taps.close()
