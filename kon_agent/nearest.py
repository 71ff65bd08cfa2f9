"""The known word that was probably meant: what "did you mean" asks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_CHARS = 64  # nobody mistypes a longer word, and difflib takes quadratic time


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word nearest to `word`: first one of the same letters in another order; None if none is near."""
    if len(word) > MAX_CHARS:
        return None
    near = difflib.get_close_matches(word.lower(), sorted(known), n=3)
    return next((each for each in near if sorted(each) == sorted(word.lower())), near[0] if near else None)
