"""What a plugin says of itself: its name, its configuration, what it needs. Made by the decorator `plugin`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from kon_agent.config.naming import name_complaint
from kon_agent.config.schema import PluginConfig
from kon_agent.errors import PluginError

MAX_READS = 32  # places; one that needs more needs the folder above them
_MARK = "__kon_plugin__"

C = TypeVar("C", bound=type)
Reads = tuple[str, ...] | Callable[[Any], Iterable[str]]


class Declaration(msgspec.Struct, frozen=True):
    """A plugin's words.

    Attributes:
        name: its name.
        config: its section's type.
        reads: files and folders it reads; or what returns them, given its configuration.
        network: whether it uses the network.
    """

    name: str
    config: type[PluginConfig]
    reads: Reads
    network: bool

    def places(self, config: PluginConfig) -> tuple[str, ...]:
        """Return the files and folders it reads when it is configured so.

        Raises:
            PluginError: they are no absolute paths, or too many.
        """
        places = tuple(self.reads(config) if callable(self.reads) else self.reads)
        for place in places:
            if not isinstance(place, str) or not place.startswith("/"):
                raise PluginError(f"plugin {self.name!r}: reads {place!r}, which is not an absolute path")
        if len(places) > MAX_READS:
            raise PluginError(f"plugin {self.name!r}: reads {len(places)} places, more than {MAX_READS}")
        return places


def plugin(
    name: str,
    *,
    config: type[PluginConfig] = PluginConfig,
    reads: Reads = (),
    network: bool = False,
) -> Callable[[C], C]:
    """Make a class a plugin of Kon-Agent.

    The class is constructed with its configuration and a `Context`, and has one of two methods: `collect()`, which
    returns one cycle's metrics, or `run(emit)`, a generator that emits them as they come and yields to wait; where it
    needs them, also `start()` and `stop()`.

    Args:
        name: lower-case letters, digits, `-` and `_`; what its section under `plugins` is called, and its file.
        config: the type of that section, derived from PluginConfig.
        reads: absolute paths of files and folders to read besides /proc, /sys, /etc and Python's own; or a function
            that returns them, given the configuration.
        network: whether it needs sockets.

    Raises:
        PluginError: the class or an argument is not what it must be.
    """

    def declare(cls: C) -> C:
        if what := name_complaint(name):
            raise PluginError(f"plugin {name!r}: {what}")
        if not (isinstance(config, type) and issubclass(config, PluginConfig)):
            raise PluginError(f"plugin {name!r}: config must be a class derived from PluginConfig, not {config!r}")
        has_collect, run = hasattr(cls, "collect"), getattr(cls, "run", None)
        if has_collect == (run is not None):
            raise PluginError(f"plugin {name!r}: {cls.__name__} must have one of the methods collect() and run(emit)")
        if run is not None and not inspect.isgeneratorfunction(run):
            raise PluginError(f"plugin {name!r}: run(emit) must be a generator: where it waits, it yields")
        if isinstance(reads, str):
            raise PluginError(f"plugin {name!r}: reads must be a tuple of paths; write ({reads!r},)")
        setattr(cls, _MARK, Declaration(name, config, reads if callable(reads) else tuple(reads), network))
        return cls

    return declare


def declaration_of(cls: object) -> Declaration | None:
    """Return what a class has declared with `plugin`; None where it has not."""
    found = vars(cls).get(_MARK) if isinstance(cls, type) else None
    return found if isinstance(found, Declaration) else None
