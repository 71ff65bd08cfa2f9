"""The decorator `plugin`: what a plugin may say of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kon_agent.errors import PluginError
from kon_agent.plugins import PluginConfig, plugin
from kon_agent.plugins.declaration import MAX_READS, Declaration, declaration_of


class Collecting:
    def collect(self) -> list[Any]:
        return []


class Following:
    def run(self, emit: Any) -> Iterator[None]:
        yield


class Returning:
    def run(self, emit: Any) -> None:
        return None


class Both(Collecting, Following):
    pass


class Neither:
    pass


def test_what_is_declared_is_found() -> None:
    """On the class itself; one that derives from it has declared nothing."""

    class Declared(Collecting):
        pass

    class Derived(Declared):
        pass

    assert Declared is plugin("a-b", config=PluginConfig, reads=("/x",), network=True)(Declared)
    assert Declaration("a-b", PluginConfig, ("/x",), True) == declaration_of(Declared)
    assert declaration_of(plugin("other")(Derived)) != declaration_of(Declared)
    assert declaration_of(Collecting) is None
    assert declaration_of("text") is None


@pytest.mark.parametrize(
    ("name", "options", "cls", "what"),
    [
        ("Upper", {}, Collecting, "lower-case letters"),
        ("a", {"config": dict}, Collecting, "must be a class derived from PluginConfig"),
        ("a", {"reads": "/x"}, Collecting, r"write \('/x',\)"),
        ("a", {}, Neither, "must have one of the methods"),
        ("a", {}, Both, "must have one of the methods"),
        ("a", {}, Returning, "must be a generator"),
    ],
)
def test_a_wrong_declaration_is_told(name: str, options: dict[str, Any], cls: type, what: str) -> None:
    """Where the class is defined, so that its author's first test shows it."""
    with pytest.raises(PluginError, match=what):
        plugin(name, **options)(cls)


def test_places_may_follow_the_configuration() -> None:
    """A function of the configuration, or always the same."""
    assert ("/a",) == Declaration("p", PluginConfig, ("/a",), False).places(PluginConfig())
    follows = Declaration("p", PluginConfig, lambda config: [f"/{config.priority}"], False)
    assert ("/7",) == follows.places(PluginConfig(priority=7))


@pytest.mark.parametrize("reads", [("a",), (1,), ("/a",) * (MAX_READS + 1)])
def test_places_are_absolute_and_few(reads: tuple[Any, ...]) -> None:
    """Anything else is the plugin's mistake."""
    with pytest.raises(PluginError, match="reads"):
        Declaration("p", PluginConfig, reads, False).places(PluginConfig())
