"""A whole terminal for one live view: rows drawn over and over, keys and signals as they come.

Invariants: however it ends, by a key, a signal or an exception, the terminal is given back as it was: the screen
before, its cursor, its line discipline. Signal handlers write one byte, which `wait` returns. rich is imported on first
use, see `tables`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import tty
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kon_agent.cli.tables import printable

_STDIN = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line and its style in rich's words."""

    text: str
    style: str = ""


def clip(text: str, width: int, *, pad: bool = False) -> str:
    """Return `text` without control characters in at most `width` cells, an ellipsis where something is missing."""
    from rich.cells import set_cell_size

    text = printable(text)
    if width_of(text) > width:
        text = set_cell_size(text, max(0, width - 1)) + "…" if width > 0 else ""
    return set_cell_size(text, width) if pad else text


def width_of(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    from rich.cells import cell_len

    return cell_len(text)


def fit(rows: Sequence[Row], height: int) -> list[Row]:
    """Return rows that fit a screen; the last one says how many do not."""
    if len(rows) <= height:
        return list(rows)
    shown = max(0, height - 1)
    return [*rows[:shown], Row(f"… {len(rows) - shown} more lines", "dim")][:height]


class Screen:
    """The terminal while it is ours: the other screen, keys without Enter, signals as bytes; given back at the end."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        with contextlib.ExitStack() as stack:
            self._signals, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, self._signals)
            stack.callback(os.close, writer)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH):
                stack.callback(signal.signal, number, signal.signal(number, _nothing))  # the byte is the message
            self._keys = _keyboard(stack)
            self._console = Console(highlight=False, markup=False, emoji=False)
            live = Live(
                console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._live = stack.enter_context(live)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        return self._console.size

    def draw(self, rows: Sequence[Row]) -> None:
        """Show these rows and nothing else."""
        from rich.text import Text

        lines = [Text(row.text, style=row.style) for row in rows]
        self._live.update(Text("\n", no_wrap=True, overflow="crop").join(lines), refresh=True)

    def wait(self, seconds: float) -> int | None:
        """Wait for a key or a signal; return the signal it is, SIGINT for `q`; None once the time is over."""
        ready, _, _ = select.select([self._signals, *self._keys], [], [], max(0.0, seconds))
        if self._signals in ready:
            return os.read(self._signals, 1)[0]
        if ready:
            key = os.read(self._keys[0], 1)
            if not key:
                self._keys = []  # end of file: there will be no more
            elif key in b"qQ":
                return signal.SIGINT
            return signal.SIGWINCH  # any other key draws anew
        return None


def _nothing(*_: object) -> None:
    """Do nothing: the wakeup byte is the message."""


def _keyboard(stack: contextlib.ExitStack) -> list[int]:
    """Have keys come one by one and unseen, where there is a keyboard; return its descriptor."""
    if not os.isatty(_STDIN):
        return []
    stack.callback(termios.tcsetattr, _STDIN, termios.TCSADRAIN, termios.tcgetattr(_STDIN))
    tty.setcbreak(_STDIN)
    return [_STDIN]
