"""A mistake in a configuration file: where it is, what it is, and the nearest right word."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from kon_agent.nearest import nearest

MAX_SHOWN_CHARS = 60  # of one value; so that a mistake stays one readable line
MAX_LINE_CHARS = 8192  # a longest path, a long message; a key or an anchor may be as long as the file


class Place(msgspec.Struct, frozen=True):
    """A character of a file: line and column, both counted from 1; 0, 0 is the file as a whole."""

    line: int = 0
    column: int = 0


class Mistake(msgspec.Struct, frozen=True):
    """One thing wrong with a file.

    Attributes:
        file: the file as the user named it.
        line, column: where, from 1; 0 where the whole file is meant.
        path: the key's dotted path as written in the file (`plugins.cpu.period`, `server[1]`); may be empty.
        what: what is wrong and what to do.
    """

    file: str
    line: int
    column: int
    path: str
    what: str

    def __str__(self) -> str:
        """Return `file:line:column: path: what` as one printable line, without the parts that are unknown."""
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        line = ": ".join(part for part in (where, self.path, self.what) if part)
        line = line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"
        # Keys and anchors come from the file: nothing in them may move a terminal's cursor or break the line.
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word nearest to `word`, or nothing where none is near."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else ""


def shown(value: object) -> str:
    """Return a scalar as a message shows it: text in quotes, the rest as YAML writes it, long ones cut."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    text = text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
    return repr(text) if isinstance(value, str) else text
