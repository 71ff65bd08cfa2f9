"""A YAML file's text as a tree of located nodes; besides `outline` the only module that knows ruamel.yaml.

Owns what of YAML a configuration may use: one document of mappings, sequences and scalars. Anchors, aliases
(a few bytes of them grow to gigabytes when walked), tags and deep nesting are mistakes. Plain scalars follow
the core schema of YAML 1.2 (§10.3.2) whatever a %YAML directive says: `yes` and `on` are text, `010` is ten.

Invariant: `compose` never raises. What stands before a syntax error is kept: its mistakes are found as well.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from kon_agent.config.mistake import Mistake, Place

if TYPE_CHECKING:
    from ruamel.yaml.events import Event

MAX_DEPTH = 16  # the schema needs four levels; bounds recursion for whoever walks the tree
MAX_INT_CHARS = 40  # a longer number is read as a float: int() takes quadratic time, and refuses 4300 digits

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {
    word: value
    for value, words in ((True, ("true", "True", "TRUE")), (False, ("false", "False", "FALSE")))
    for word in words
}
_INT = re.compile(rf"[-+]?[0-9]{{1,{MAX_INT_CHARS}}}")
_HEX_OR_OCTAL = re.compile(rf"0x[0-9a-fA-F]{{1,{MAX_INT_CHARS}}}|0o[0-7]{{1,{MAX_INT_CHARS}}}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Scalar(msgspec.Struct, frozen=True):
    """A single value; `text` is how the file writes it, `value` what it means."""

    place: Place
    value: str | int | float | bool | None
    text: str


class Sequence(msgspec.Struct, frozen=True):
    """A list of nodes."""

    place: Place
    items: list[Node]


class Mapping(msgspec.Struct, frozen=True):
    """Keys and values in the order of the file; a key may occur twice."""

    place: Place
    entries: list[tuple[Node, Node]]


class Refused(msgspec.Struct, frozen=True):
    """Stands where something not allowed stood; its mistake is already reported."""

    place: Place


Node = Scalar | Sequence | Mapping | Refused


def plain(node: Node) -> Any:
    """Return what a node means, without where it stands: texts, numbers, booleans, None, lists, dicts of these.

    A key is the text it is written as; of one that is given twice the last counts.
    """
    match node:
        case Scalar():
            return node.value
        case Sequence():
            return [plain(item) for item in node.items]
        case Mapping():
            return {key.text: plain(value) for key, value in node.entries if isinstance(key, Scalar)}
    return None


def from_plain(value: Any) -> Node:
    """Return a node that means `value`, and stands nowhere."""
    if isinstance(value, dict):
        return Mapping(Place(), [(Scalar(Place(), key, key), from_plain(item)) for key, item in value.items()])
    if isinstance(value, list):
        return Sequence(Place(), [from_plain(item) for item in value])
    return Scalar(Place(), value, "" if value is None else str(value))


class Document(msgspec.Struct, frozen=True):
    """A composed file.

    Attributes:
        root: the whole tree; None for an empty file.
        mistakes: what is wrong with the file as YAML.
        is_whole: False where composing stopped early, so that absent keys mean nothing.
    """

    root: Node | None
    mistakes: list[Mistake]
    is_whole: bool


def compose(text: str, file: str) -> Document:
    """Return `text` as a tree, together with everything wrong with it as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    composer = _Composer(file)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            composer.take(event)
    except _Stopped:
        pass
    except MarkedYAMLError as err:
        what = ": ".join(part for part in (err.context, err.problem) if part)
        hint = "; indent with spaces, not with tabs" if "'\\t'" in what else ""
        composer.report(_place(err.problem_mark or err.context_mark), f"not valid YAML: {what}{hint}")
    except ReaderError as err:
        before = text[: err.position]
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
        composer.report(place, f"the character U+{err.character:04X} is not allowed in YAML; remove it")
    except (ValueError, OverflowError):  # an escape such as "\UFFFFFFFF" reaches chr() unchecked
        composer.report(composer.last_place, "not valid YAML: what follows holds an impossible character escape")
    else:
        return Document(composer.root(), composer.mistakes, is_whole=True)
    return Document(composer.root(), composer.mistakes, is_whole=False)


class _Stopped(Exception):
    """The rest of the file is not worth reading."""


class _Frame(msgspec.Struct):
    """A collection that is still open; a mapping's keys and values alternate in `children`."""

    place: Place
    is_mapping: bool
    children: list[Node] = []

    def close(self) -> Node:
        if not self.is_mapping:
            return Sequence(self.place, self.children)
        # A key whose value never came (a syntax error stopped us) is dropped.
        pairs = zip(self.children[::2], self.children[1::2], strict=False)
        return Mapping(self.place, [(key, _at_key(key, value)) for key, value in pairs])


class _Composer:
    """Build the tree from ruamel's events, without recursion; see `compose`."""

    def __init__(self, file: str) -> None:
        self.mistakes: list[Mistake] = []
        self.last_place = Place(1, 1)
        self._file = file
        self._documents = 0
        self._frames = [_Frame(Place(1, 1), is_mapping=False)]  # the stream itself: a sequence of one root

    def report(self, place: Place, what: str) -> None:
        self.mistakes.append(Mistake(self._file, place.line, place.column, "", what))

    def root(self) -> Node | None:
        """Return the tree, closing what a syntax error left open: of a list cut off nothing can be said."""
        while len(self._frames) > 1:
            frame = self._frames.pop()
            self._add(frame.close() if frame.is_mapping else Refused(frame.place))
        return next(iter(self._frames[0].children), None)

    def take(self, event: Event) -> None:
        from ruamel.yaml import events as ev

        self.last_place = place = _place(event.start_mark)
        if isinstance(event, ev.NodeEvent):
            self._refuse_extras(event, place)
        if isinstance(event, ev.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._stop(place, "a second document starts here; keep one document per file")
        elif isinstance(event, ev.AliasEvent):
            self._add(Refused(place))
        elif isinstance(event, ev.ScalarEvent):
            is_plain = event.implicit[0] and not event.style
            self._add(Scalar(place, _resolve(event.value) if is_plain else event.value, event.value))
        elif isinstance(event, ev.CollectionStartEvent):
            if len(self._frames) > MAX_DEPTH:
                self._stop(place, f"nested deeper than {MAX_DEPTH} levels; no setting is")
            self._frames.append(_Frame(place, isinstance(event, ev.MappingStartEvent)))
        elif isinstance(event, ev.CollectionEndEvent):
            self._add(self._frames.pop().close())

    def _refuse_extras(self, event: Any, place: Place) -> None:
        if event.anchor is not None:
            sign = "&" if hasattr(event, "ctag") else "*"
            noun = "anchors" if sign == "&" else "aliases"
            self.report(place, f"{noun} are not allowed; write the value out instead of '{sign}{event.anchor}'")
        if getattr(event, "tag", None) is not None:
            self.report(place, f"tags are not allowed; remove '{event.tag}'")

    def _stop(self, place: Place, what: str) -> None:
        self.report(place, what)
        raise _Stopped

    def _add(self, node: Node) -> None:
        self._frames[-1].children.append(node)


def _at_key(key: Node, value: Node) -> Node:
    """Return `value` moved to its key where it is not written at all: ruamel places it at the next key."""
    if isinstance(value, Scalar) and value.value is None and not value.text:
        return Scalar(key.place, None, "")
    return value


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)


def _resolve(text: str) -> str | int | float | bool | None:
    """Return what a plain scalar means by the core schema of YAML 1.2 (§10.3.2)."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX_OR_OCTAL.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
