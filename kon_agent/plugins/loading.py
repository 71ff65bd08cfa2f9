"""Third-party code, loaded: from where it is found to a configured collector.

Runs what it loads: only a child that has given up every privilege calls this, or its author's own tests.
"""

from __future__ import annotations

import importlib
import linecache
import sys
import traceback
from types import ModuleType
from typing import Any

import msgspec

from kon_agent.catalog import Origin
from kon_agent.config.document import from_plain
from kon_agent.config.naming import canonical, is_same
from kon_agent.config.schema import ForeignConfig, PluginConfig, Size
from kon_agent.config.walk import Walker
from kon_agent.errors import PluginError
from kon_agent.plugins.context import Context
from kon_agent.plugins.declaration import Declaration, declaration_of

MAX_WORDS_CHARS = 500  # of an exception's message; a line or two, not a file


def load(origin: Origin, source: bytes) -> tuple[type[Any], Declaration]:
    """Return a plugin's class and what it declares.

    Args:
        origin: where it is.
        source: its code, where it is a file.

    Raises:
        PluginError: its code fails, or holds no plugin of that name.
    """
    try:
        cls = _execute(origin, source) if origin.kind == "file" else _import(origin.target)
    except PluginError:
        raise
    except (Exception, SystemExit) as err:
        raise PluginError(words_of(err)) from err
    declaration = declaration_of(cls)
    if cls is None or declaration is None:
        raise PluginError(f"{origin.target} has no class with @plugin({origin.name!r}, …)")
    if not is_same(declaration.name, origin.name):
        raise PluginError(f"{origin.target} is found as {origin.name!r} and calls itself {declaration.name!r}")
    return cls, declaration


def make(config: ForeignConfig, source: bytes, context: Context) -> Any:
    """Return a plugin's collector, with a configuration of its own type.

    Raises:
        PluginError: it cannot be loaded, or does not accept its section.
    """
    cls, declaration = load(config.origin, source)
    walker = Walker("", "/", is_whole=True)
    typed = walker.section(from_plain(config.options), declaration.config, f"plugins.{declaration.name}")
    if walker.mistakes:
        raise PluginError("; ".join(map(str, walker.mistakes)))
    return cls(typed, context)


def common_defaults(config: type[PluginConfig]) -> dict[str, Any]:
    """Return the keys common to all plugins for which `config` has defaults of its own."""
    ours = {field.name: field.default for field in msgspec.structs.fields(PluginConfig)}
    theirs = {field.name: field.default for field in msgspec.structs.fields(config) if field.name in ours}
    return {name: _bare(value) for name, value in theirs.items() if value != ours[name]}


def words_of(err: BaseException) -> str:
    """Return an exception in one line, with where it was raised."""
    said = str(err).partition("\n")[0][:MAX_WORDS_CHARS]
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if not frame.filename.startswith("<")]
    theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(err).__name__}: {said}{place}"


_OURS = __file__.rpartition("/plugins/")[0]


def _execute(origin: Origin, source: bytes) -> type[Any] | None:
    name = f"kon_plugin_{canonical(origin.name)}"
    module = ModuleType(name)
    module.__file__ = origin.target
    # A traceback shows the lines, although the file itself may be out of reach by now.
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[origin.target] = (len(source), None, lines, origin.target)
    sys.modules[name] = module  # as an import would: a class is looked up by its module's name
    exec(compile(source, origin.target, "exec", dont_inherit=True), vars(module))  # noqa: S102 - what a plugin is for
    declared = [value for value in vars(module).values() if declaration_of(value) and value.__module__ == name]
    named = [cls for cls in declared if is_same(_name_of(cls), origin.name)]
    return next(iter(named or declared), None)


def _import(target: str) -> Any:
    module_name, _, path = target.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _bare(value: Any) -> Any:
    """Return a duration as its seconds, a size as its bytes."""
    return float(value) if isinstance(value, float) else int(value) if isinstance(value, Size) else value


def _name_of(cls: type[Any]) -> str:
    declaration = declaration_of(cls)
    return declaration.name if declaration else ""
