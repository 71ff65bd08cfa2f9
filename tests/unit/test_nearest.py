"""kon_agent.nearest: what was probably meant."""

from __future__ import annotations

import pytest

from kon_agent.nearest import MAX_CHARS, nearest

KNOWN = ["cpu", "tcp", "memory", "disk"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [("memry", "memory"), ("CPU", "cpu"), ("cup", "cpu"), ("tpc", "tcp"), ("xyz", None), ("", None)],
)
def test_the_nearest_is_named(word: str, meant: str | None) -> None:
    """Letters in another order go before letters that differ; what is far from all is near to none."""
    assert meant == nearest(word, KNOWN)


def test_a_long_word_is_not_compared() -> None:
    """What no one typed by mistake costs no time."""
    assert None is nearest("cpu" * MAX_CHARS, KNOWN)
