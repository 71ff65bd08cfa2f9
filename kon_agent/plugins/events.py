"""An event-style collector between two waits: `run(emit)`, a generator that yields what it waits for.

    yield             one period
    yield 0.5         so many seconds
    yield source      until the source (an open file, a socket: what has a fileno()) is readable, a period at most

Each yield is answered with whether the source was ready. To end a collector is to close its generator: GeneratorExit is
raised where it waits, and what stands in `finally` runs. Nothing here waits: that is the caller's part.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from kon_agent.errors import NoData, PluginError

MAX_SECONDS = 3650 * 86400.0  # the longest duration a configuration may name

Run = Callable[[], Generator[Any, bool, None]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a collector waits for.

    Attributes:
        seconds: how long; None: one period.
        fd: what becomes readable before that; None: nothing does.
    """

    seconds: float | None = None
    fd: int | None = None


class EventRun:
    """One collector's run.

    Args:
        run: begins it; called again where it ended for want of data.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._events: Generator[Any, bool, None] | None = None

    def resume(self, is_ready: bool) -> Wish:
        """Let it go on until it waits again, and return for what.

        Args:
            is_ready: whether what it last waited for has come.

        Raises:
            PluginError: it has ended by itself, or waits for what nobody can wait for.
        """
        try:
            if self._events is None:
                self._events = self._run()
                return _wish(next(self._events))
            return _wish(self._events.send(is_ready))
        except NoData:
            self._events = None
            return Wish()
        except StopIteration:
            raise PluginError("run() has ended by itself; it must go on until it is closed") from None

    def close(self) -> None:
        """End it."""
        if self._events is not None:
            self._events.close()


def _wish(wanted: Any) -> Wish:
    if wanted is None:
        return Wish()
    if isinstance(wanted, int | float) and not isinstance(wanted, bool) and 0 <= wanted <= MAX_SECONDS:
        return Wish(seconds=float(wanted))
    try:
        return Wish(fd=int(wanted.fileno()))
    except (AttributeError, TypeError, ValueError, OSError) as err:
        raise PluginError(
            f"run() waits for {wanted!r}; yield nothing, seconds, or something open with fileno()"
        ) from err
