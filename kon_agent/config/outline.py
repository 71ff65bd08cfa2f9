"""Where things stand in a YAML text: its nodes with their offsets, for whoever changes the text in place.

Invariant: `text[piece.start : piece.end]` is what the file writes for a piece, without what follows it; of a block
collection, which has no end of its own, only `start` counts. For valid configurations: there are no anchors, no tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COLON = re.compile(r"\s*:")


@dataclass(slots=True)
class Piece:
    """A node.

    Attributes:
        start, end: offsets into the text.
        style: of a scalar `'`, `"`, `|`, `>` or nothing; of a collection `flow` or `block`.
        value: what a scalar says.
        children: of a collection; a mapping's keys and values alternate.
        is_mapping: whether it is one.
    """

    start: int
    end: int
    style: str
    value: str = ""
    children: list[Piece] = field(default_factory=list)
    is_mapping: bool = False

    @property
    def entries(self) -> list[tuple[Piece, Piece]]:
        """A mapping's keys and values."""
        return list(zip(self.children[::2], self.children[1::2], strict=True)) if self.is_mapping else []

    @property
    def is_collection(self) -> bool:
        """Whether it is a mapping or a sequence."""
        return self.style in ("flow", "block")

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing stands there: the value of `cpu:`."""
        return self.start == self.end and not self.is_collection

    def last(self) -> int:
        """Return the end of what it writes."""
        if self.style == "block":
            return self.children[-1].last()
        return self.end


def outline(text: str) -> Piece | None:
    """Return a valid YAML text's root; None where it holds nothing.

    Raises:
        YAMLError: the text is not valid.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml import events as ev

    stack = [Piece(0, 0, "block")]  # the stream itself
    for event in YAML(typ="safe", pure=True).parse(text):
        start, end = event.start_mark.index, event.end_mark.index
        if isinstance(event, ev.ScalarEvent):
            written = text[start:end].rstrip() if event.style in ("|", ">") else text[start:end]
            scalar = Piece(start, start + len(written), event.style or "", event.value)
            _add(stack[-1], scalar, text)
        elif isinstance(event, ev.CollectionStartEvent):
            style = "flow" if event.flow_style else "block"
            stack.append(Piece(start, end, style, is_mapping=isinstance(event, ev.MappingStartEvent)))
        elif isinstance(event, ev.CollectionEndEvent):
            done = stack.pop()
            done.end = end
            _add(stack[-1], done, text)
    return next(iter(stack[0].children), None)


def _add(parent: Piece, piece: Piece, text: str) -> None:
    # ruamel places what is not written at the next key: it belongs behind its own, and that key's colon if it has one
    if piece.is_unwritten and parent.is_mapping and len(parent.children) % 2:
        key = parent.children[-1]
        colon = _COLON.match(text, key.end)
        piece.start = piece.end = colon.end() if colon else key.end
    parent.children.append(piece)
