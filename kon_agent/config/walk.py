"""From nodes to settings: walk a composed file against a schema and collect every mistake on the way. Pure.

The schema is a tree of frozen msgspec structs; nothing here knows its keys. What is valid becomes a value,
what is not becomes a `Mistake` at its place and `msgspec.UNSET`, and the walk goes on.
"""

from __future__ import annotations

import os.path
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from kon_agent.config import rules
from kon_agent.config.document import Document, Mapping, Node, Refused, Scalar, Sequence
from kon_agent.config.mistake import Mistake, Place, shown, suggestion
from kon_agent.config.schema import Duration, Share, Size
from kon_agent.config.units import parse_duration, parse_share, parse_size

Section = TypeVar("Section", bound=msgspec.Struct)

_UNITS = {Duration: parse_duration, Size: parse_size, Share: parse_share}
_YES = {"yes", "on", "y", "true", "t", "1", "enable", "enabled"}
_NO = {"no", "off", "n", "false", "f", "0", "disable", "disabled"}


def walk(document: Document, section: type[Section], file: str, folder: str) -> tuple[Section | None, list[Mistake]]:
    """Return the document as a `section`, and everything wrong with it, in the order of the file.

    Args:
        document: the composed file.
        section: the schema's root.
        file: the file's name in the mistakes.
        folder: absolute folder that relative paths in the file are relative to.

    Returns:
        The settings and no mistake, or None and the mistakes.
    """
    walker = _Walker(file, folder, document.is_whole)
    settings = section() if document.root is None else walker.section(document.root, section, "")
    mistakes = sorted(document.mistakes + walker.mistakes, key=lambda m: (m.line, m.column))
    return (None if mistakes else settings), mistakes


class _Walker:
    """One walk over one file.

    Invariant: a method that returns `msgspec.UNSET` has reported why, unless the document has already.
    """

    def __init__(self, file: str, folder: str, is_whole: bool) -> None:
        self.mistakes: list[Mistake] = []
        self._file = file
        self._folder = folder
        self._is_whole = is_whole

    def section(self, node: Node, section: type[Section], path: str) -> Section:
        """Return the settings of a section; what is absent or wrong keeps its default."""
        if isinstance(node, Scalar) and node.value is None:
            return section()  # `plugins:` with nothing below
        if not isinstance(node, Mapping):
            self._expected(node, "a section of keys and values", path)
            return section()
        types_by_key = {field.name: field.type for field in msgspec.structs.fields(section)}
        values: dict[str, Any] = {}
        places: dict[str, tuple[Place, str]] = {}
        for key_node, value_node in node.entries:
            key = self._key(key_node, section, list(types_by_key), places, path)
            if key is not None:
                value_path = places[key][1]
                values[key] = self._value(value_node, types_by_key[key], section, key, value_path)
        if self._is_whole:
            self._check_together(section, values, places)
        return section(**{key: value for key, value in values.items() if value is not msgspec.UNSET})

    def _key(
        self,
        node: Node,
        section: type,
        known: list[str],
        places: dict[str, tuple[Place, str]],
        path: str,
    ) -> str | None:
        """Return the schema's name of a key and note its place, or None where there is no such key."""
        if isinstance(node, Refused):
            return None
        if not isinstance(node, Scalar):
            self._report(node.place, path, "a key must be a single word")
            return None
        key = node.text.replace("-", "_")
        key_path = f"{path}.{node.text}" if path else node.text
        if key not in known:
            # Answer in the spelling of the question: `client-idd` meant `client-id`.
            spelled = [name.replace("_", "-") for name in known] if "-" in node.text else known
            near = suggestion(node.text, spelled)
            what = near or f"; known are {', '.join(spelled)}"
            self._report(node.place, key_path, f"unknown {rules.noun(section)}{what}")
            return None
        if key in places:
            line, first = places[key][0].line, places[key][1].rpartition(".")[2]
            alias = "" if first == node.text else f" as '{first}'"
            self._report(node.place, key_path, f"given twice, first{alias} on line {line}; keep one of the two")
        places.setdefault(key, (node.place, key_path))
        return key

    def _check_together(self, section: type, values: dict[str, Any], places: dict[str, tuple[Place, str]]) -> None:
        pair = rules.together(section) or ()
        for given, missing in zip(pair, reversed(pair), strict=True):
            if values.get(given) is not None and values.get(missing) is None:
                place, path = places[given]
                self._report(place, path, f"needs '{missing}' beside it; give both or neither")

    def _value(self, node: Node, type_: Any, section: type, key: str, path: str) -> Any:
        """Return a key's value as the schema's `type_`, or UNSET."""
        options = _options(type_)
        if isinstance(node, Refused):
            return msgspec.UNSET
        if len(options) == 1 and _is_section(options[0]):
            return self.section(node, options[0], path)
        if isinstance(node, Scalar) and node.value is None:
            if type(None) in options:
                return None
            self._report(node.place, path, "has no value; write one, or remove the key to have its default")
            return msgspec.UNSET
        list_type = next((option for option in options if get_origin(option) is list), None)
        if list_type is not None and isinstance(node, Sequence):
            return self._list(node, get_args(list_type)[0], section, key, path)
        leaf_type = next((option for option in options if option not in (list_type, type(None))), None)
        if leaf_type is None or not isinstance(node, Scalar):
            self._expected(node, _describe(leaf_type) if leaf_type else "a list", path)
            return msgspec.UNSET
        return self._leaf(node, leaf_type, section, key, path)

    def _list(self, node: Sequence, item_type: Any, section: type, key: str, path: str) -> Any:
        items = [
            self._value(item, item_type, section, key, f"{path}[{index}]") for index, item in enumerate(node.items)
        ]
        if what := rules.complaint(section, key, items):
            self._report(node.place, path, what)
            return msgspec.UNSET
        return msgspec.UNSET if msgspec.UNSET in items else items

    def _leaf(self, node: Scalar, type_: Any, section: type, key: str, path: str) -> Any:
        """Return a scalar as `type_`, in range and with its path made absolute, or UNSET."""
        value: Any
        if parse := _UNITS.get(type_):
            try:
                value = parse(node.value)
            except ValueError as err:
                self._report(node.place, path, str(err))
                return msgspec.UNSET
        else:
            try:
                value = msgspec.convert(node.value, type_, strict=True)
            except msgspec.ValidationError:
                self._expected(node, _describe(type_), path, _hint(node.value, type_))
                return msgspec.UNSET
        if rules.is_path(section, key):
            value = os.path.normpath(os.path.join(self._folder, value))
        if what := rules.complaint(section, key, value):
            self._report(node.place, path, what)
            return msgspec.UNSET
        return value

    def _expected(self, node: Node, wanted: str, path: str, hint: str = "") -> None:
        if isinstance(node, Refused):
            return
        if isinstance(node, Scalar):
            got = shown(node.value)
        else:
            got = "a list" if isinstance(node, Sequence) else "a section of keys and values"
        self._report(node.place, path, f"expected {wanted}, got {got}{hint}")

    def _report(self, place: Place, path: str, what: str) -> None:
        self.mistakes.append(Mistake(self._file, place.line, place.column, path, what))


def _options(type_: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _hint(value: object, type_: Any) -> str:
    """Return how to write what was probably meant."""
    if get_origin(type_) is Literal:
        return suggestion(str(value), get_args(type_))
    if type_ is bool:
        word = str(value).lower()
        return "; write true" if word in _YES else "; write false" if word in _NO else ""
    is_text = get_args(type_)[:1] == (str,) or type_ is str
    return "; put it in quotes" if is_text and not isinstance(value, str) else ""


def _describe(type_: Any) -> str:
    """Return what a leaf of `type_` is, in words, with its bounds."""
    if get_origin(type_) is Literal:
        return f"one of {', '.join(get_args(type_))}"
    if get_origin(type_) is Annotated:
        base, meta = get_args(type_)
        return _describe(base) + _bounds(meta)
    words = {bool: "true or false", int: "a whole number", str: "text"}
    units = {
        Duration: "a duration such as 5s",
        Size: "a size such as 64KiB",
        Share: "a share of a core such as 2%",
    }
    return (words | units)[type_]


def _bounds(meta: msgspec.Meta) -> str:
    unit = "" if meta.min_length is None else " characters"
    low = meta.ge if meta.min_length is None else meta.min_length
    high = meta.le if meta.max_length is None else meta.max_length
    return f" from {low} to {high}{unit}" if high is not None else f" of at least {low}{unit}"
