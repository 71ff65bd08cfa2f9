"""From nodes to settings: walk a composed file against a schema and collect every mistake on the way. Pure.

The schema is a tree of frozen msgspec structs; nothing here knows its keys. What is valid becomes a value,
what is not becomes a `Mistake` at its place and `msgspec.UNSET`, and the walk goes on. A section that follows rules of
its own, such as `plugins`, has a reader (`plugin_sections`), which the caller brings.
"""

from __future__ import annotations

import os.path
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from kon_agent.config import rules
from kon_agent.config.document import Document, Mapping, Node, Refused, Scalar, Sequence, plain
from kon_agent.config.mistake import Mistake, Place, shown, suggestion
from kon_agent.config.schema import Duration, Share, Size
from kon_agent.config.units import parse_duration, parse_share, parse_size
from kon_agent.config.words import WORDS, describe, hint

Section = TypeVar("Section", bound=msgspec.Struct)

_UNITS = {Duration: parse_duration, Size: parse_size, Share: parse_share}


Reader = Callable[["Walker", Node, str], Any]
"""Reads a section of one type: takes the walk, the section's node and its dotted path."""


def walk(
    document: Document, section: type[Section], file: str, folder: str, readers: dict[type, Reader] | None = None
) -> tuple[Section | None, list[Mistake]]:
    """Return the document as a `section`, and everything wrong with it, in the order of the file.

    Args:
        document: the composed file.
        section: the schema's root.
        file: the file's name in the mistakes.
        folder: absolute folder that relative paths in the file are relative to.
        readers: for types of sections that follow rules of their own.

    Returns:
        The settings and no mistake, or None and the mistakes.
    """
    walker = Walker(file, folder, document.is_whole, readers)
    settings = walker.section(document.root or Mapping(Place(1, 1), []), section, "")
    mistakes = in_order(document.mistakes + walker.mistakes)
    return (None if mistakes else settings), mistakes


def in_order(mistakes: list[Mistake]) -> list[Mistake]:
    """Return mistakes in the order of the file."""
    return sorted(mistakes, key=lambda mistake: (mistake.line, mistake.column))


class Walker:
    """One walk over one file.

    Invariant: a method that returns `msgspec.UNSET` has reported why, unless the document has already.

    Args:
        file, folder, readers: as for `walk`.
        is_whole: whether the file has been read to its end, so that what is absent is missing.
    """

    def __init__(self, file: str, folder: str, is_whole: bool, readers: dict[type, Reader] | None = None) -> None:
        self.mistakes: list[Mistake] = []
        self._file = file
        self._folder = folder
        self._is_whole = is_whole
        self._readers = readers or {}

    def section(self, node: Node, section: type[Section], path: str, others_pass: bool = False) -> Any:
        """Return the settings of a section, in which what is absent or wrong has its default; or UNSET.

        Args:
            node: where it is written.
            section: its type.
            path: its dotted path.
            others_pass: whether keys the section does not have are left to somebody else to judge.
        """
        if isinstance(node, Scalar) and node.value is None:
            node = Mapping(node.place, [])  # `plugins:` with nothing below
        if not isinstance(node, Mapping):
            self.expected(node, "a section of keys and values", path)
            return msgspec.UNSET
        fields = [field for field in msgspec.structs.fields(section) if (section, field.name) not in rules.NO_KEYS]
        types_by_key = {field.name: field.type for field in fields}
        values: dict[str, Any] = {}
        places: dict[str, tuple[Place, str]] = {}
        for key_node, value_node in node.entries:
            if others_pass and (not isinstance(key_node, Scalar) or _key_name(key_node) not in types_by_key):
                continue
            key = self._key(key_node, section, list(types_by_key), places, path)
            if key is not None:
                value_path = places[key][1]
                values[key] = self._value(value_node, types_by_key[key], section, key, value_path)
        if self._is_whole:
            self._check_together(section, values, places)
            self._check_present(section, values, node.place, path)
        given = {key: value for key, value in values.items() if value is not msgspec.UNSET}
        if any(field.required and field.name not in given for field in fields):
            return msgspec.UNSET
        try:
            return section(**given)
        except (TypeError, ValueError) as err:  # its own __post_init__; ours have none
            if len(given) == len(values):
                self.report(node.place, path, str(err))
            return msgspec.UNSET

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
            self.report(node.place, path, "a key must be a single word")
            return None
        key = _key_name(node)
        key_path = f"{path}.{node.text}" if path else node.text
        if key not in known:
            # Answer in the spelling of the question: `client-idd` meant `client-id`.
            spelled = [name.replace("_", "-") for name in known] if "-" in node.text else known
            near = suggestion(node.text, spelled)
            what = near or f"; known are {', '.join(spelled)}"
            self.report(node.place, key_path, f"unknown {rules.noun(section)}{what}")
            return None
        if key in places:
            line, first = places[key][0].line, places[key][1].rpartition(".")[2]
            alias = "" if first == node.text else f" as '{first}'"
            self.report(node.place, key_path, f"given twice, first{alias} on line {line}; keep one of the two")
        places.setdefault(key, (node.place, key_path))
        return key

    def _check_together(self, section: type, values: dict[str, Any], places: dict[str, tuple[Place, str]]) -> None:
        pair = rules.together(section) or ()
        for given, missing in zip(pair, reversed(pair), strict=True):
            if values.get(given) is not None and values.get(missing) is None:
                place, path = places[given]
                self.report(place, path, f"needs '{missing}' beside it; give both or neither")

    def _check_present(self, section: type, values: dict[str, Any], place: Place, path: str) -> None:
        for field in msgspec.structs.fields(section):
            if field.required and field.name not in values:
                self.report(place, path, f"needs '{field.name}'")

    def _value(self, node: Node, type_: Any, section: type, key: str, path: str) -> Any:
        """Return a key's value as the schema's `type_`, or UNSET."""
        options = _options(type_)
        if isinstance(node, Refused):
            return msgspec.UNSET
        is_nothing = isinstance(node, Scalar) and node.value is None
        if is_nothing and type(None) in options:
            return None
        sections = [option for option in options if _is_section(option)]
        if sections:
            reader = self._readers.get(sections[0])
            return reader(self, node, path) if reader else self.section(node, sections[0], path)
        if is_nothing:
            self.report(node.place, path, "has no value; write one, or remove the key to have its default")
            return msgspec.UNSET
        if not all(map(_is_ours, options)):
            return self._converted(node, type_, path)
        list_type = next((option for option in options if get_origin(option) is list), None)
        if list_type is not None and isinstance(node, Sequence):
            return self._list(node, get_args(list_type)[0], section, key, path)
        if get_origin(options[0]) is dict:
            return self._texts(node, path)
        leaf_type = next((option for option in options if option not in (list_type, type(None))), None)
        if leaf_type is None or not isinstance(node, Scalar):
            self.expected(node, describe(leaf_type) if leaf_type else "a list", path)
            return msgspec.UNSET
        return self._leaf(node, leaf_type, section, key, path)

    def _converted(self, node: Node, type_: Any, path: str) -> Any:
        """Return a value of a type only a plugin's own configuration has, in msgspec's terms, or UNSET."""
        try:
            return msgspec.convert(plain(node), type_, strict=True, dec_hook=_parse_unit)
        except (msgspec.ValidationError, ValueError) as err:
            self.report(node.place, path, str(err))
            return msgspec.UNSET

    def _list(self, node: Sequence, item_type: Any, section: type, key: str, path: str) -> Any:
        items = [
            self._value(item, item_type, section, key, f"{path}[{index}]") for index, item in enumerate(node.items)
        ]
        if what := rules.complaint(section, key, items):
            self.report(node.place, path, what)
            return msgspec.UNSET
        return msgspec.UNSET if msgspec.UNSET in items else items

    def _texts(self, node: Node, path: str) -> Any:
        """Return a mapping of texts, or UNSET."""
        if not isinstance(node, Mapping):
            self.expected(node, "keys and texts", path)
            return msgspec.UNSET
        texts: dict[str, str] = {}
        for key, value in node.entries:
            if isinstance(key, Scalar) and isinstance(value, Scalar) and isinstance(value.value, str):
                texts[key.text] = value.value
            else:
                name = key.text if isinstance(key, Scalar) else ""
                self.expected(value, "text", f"{path}.{name}", "; put it in quotes")
        return texts

    def _leaf(self, node: Scalar, type_: Any, section: type, key: str, path: str) -> Any:
        """Return a scalar as `type_`, in range and with its path made absolute, or UNSET."""
        value: Any
        if parse := _UNITS.get(type_):
            try:
                value = parse(node.value)
            except ValueError as err:
                self.report(node.place, path, str(err))
                return msgspec.UNSET
        else:
            try:
                value = msgspec.convert(node.value, type_, strict=True)
            except msgspec.ValidationError:
                self.expected(node, describe(type_), path, hint(node.value, type_))
                return msgspec.UNSET
        if rules.is_path(section, key):
            value = os.path.normpath(os.path.join(self._folder, value))
        if what := rules.complaint(section, key, value):
            self.report(node.place, path, what)
            return msgspec.UNSET
        return value

    def expected(self, node: Node, wanted: str, path: str, hint: str = "") -> None:
        """Report that something else stands where `wanted` should."""
        if isinstance(node, Refused):
            return
        if isinstance(node, Scalar):
            got = shown(node.value)
        else:
            got = "a list" if isinstance(node, Sequence) else "a section of keys and values"
        self.report(node.place, path, f"expected {wanted}, got {got}{hint}")

    def report(self, place: Place, path: str, what: str) -> None:
        """Note a mistake."""
        self.mistakes.append(Mistake(self._file, place.line, place.column, path, what))


def _options(type_: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)


def _key_name(key: Scalar) -> str:
    return key.text.replace("-", "_")


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _is_ours(type_: Any) -> bool:
    """Whether the schema's own types include this one, so that its mistakes are told in our words."""
    if get_origin(type_) is Annotated:
        type_ = get_args(type_)[0]
    if get_origin(type_) is list:
        item = get_args(type_)[0]
        return _is_section(item) or all(map(_is_ours, _options(item)))
    return get_origin(type_) is Literal or type_ in (type(None), dict[str, str]) or type_ in WORDS


def _parse_unit(type_: type, value: Any) -> Any:
    if parse := _UNITS.get(type_):
        return parse(value)
    raise NotImplementedError(f"the type {type_.__name__} is none a configuration can have")
