"""How mistakes speak of values: a type in words, with its bounds, and how to write what was probably meant. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from kon_agent.config.mistake import suggestion
from kon_agent.config.schema import Duration, Share, Size

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Duration: "a duration such as 5s",
    Size: "a size such as 64KiB",
    Share: "a share of a core such as 2%",
}
"""The types a single value may have, in words."""

_YES = {"yes", "on", "y", "true", "t", "1", "enable", "enabled"}
_NO = {"no", "off", "n", "false", "f", "0", "disable", "disabled"}


def hint(value: object, type_: Any) -> str:
    """Return how to write what was probably meant."""
    if get_origin(type_) is Literal:
        return suggestion(str(value), get_args(type_))
    if type_ is bool:
        word = str(value).lower()
        return "; write true" if word in _YES else "; write false" if word in _NO else ""
    is_text = get_args(type_)[:1] == (str,) or type_ is str
    return "; put it in quotes" if is_text and not isinstance(value, str) else ""


def describe(type_: Any) -> str:
    """Return what a leaf of `type_` is, in words, with its bounds."""
    if get_origin(type_) is Literal:
        return f"one of {', '.join(get_args(type_))}"
    if get_origin(type_) is Annotated:
        base, meta = get_args(type_)
        return describe(base) + _bounds(meta)
    return WORDS[type_]


def _bounds(meta: msgspec.Meta) -> str:
    """Return the bounds in words; more than those of a range or a length is said by nobody but msgspec."""
    unit = "" if meta.min_length is None and meta.max_length is None else " characters"
    low, high = (meta.min_length, meta.max_length) if unit else (meta.ge, meta.le)
    if low is None:
        return f" of at most {high}{unit}" if high is not None else ""
    return f" from {low} to {high}{unit}" if high is not None else f" of at least {low}{unit}"
