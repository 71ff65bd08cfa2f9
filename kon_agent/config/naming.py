"""Plugins' names: what they may look like, and when two of them are one. Pure."""

from __future__ import annotations

import re

MAX_NAME_CHARS = 32  # it is part of a process's title, a memory area's name and every record's identity
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def canonical(name: str) -> str:
    """Return `name` as names are compared: `-` and `_` are interchangeable in keys."""
    return name.replace("-", "_")


def is_same(name: str, other: str) -> bool:
    """Whether two names mean one plugin."""
    return canonical(name) == canonical(other)


def name_complaint(name: str) -> str | None:
    """Return what is wrong with a plugin's name, or None."""
    if len(name) > MAX_NAME_CHARS:
        return f"a plugin's name has {MAX_NAME_CHARS} characters at most"
    if not _NAME.fullmatch(name):
        return "a plugin's name is made of lower-case letters, digits, '-' and '_', and begins with a letter"
    return None
