"""The section `plugins`: the built-in plugins, instances of them by `type`, and plugins that are not built in.

Invariant: what a plugin's own code says about its section decides about that section only. Where it is wrong, or cannot
be asked, that is a mistake at the section, except at boot: then the agent runs without this plugin and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kon_agent.catalog import Catalog, Origin
from kon_agent.config.document import Mapping, Node, Scalar, from_plain, plain
from kon_agent.config.foreign import Exhibit, Verdict
from kon_agent.config.mistake import Mistake, suggestion
from kon_agent.config.naming import canonical, is_same, name_complaint
from kon_agent.config.schema import (
    BUILTIN_SECTIONS,
    MAX_PLUGINS,
    SINGLE,
    TYPES,
    Config,
    ForeignConfig,
    PluginConfig,
    PluginsConfig,
)
from kon_agent.config.walk import Walker


class PluginSections:
    """Reads the section `plugins` of one file.

    Args:
        catalog: where plugins that are not built in are found.
        file: the file's name in mistakes.
        is_whole: whether the file has been read to its end.

    Attributes:
        exhibits: the sections that only a plugin's own code can judge.
    """

    def __init__(self, catalog: Catalog, file: str, is_whole: bool) -> None:
        self.exhibits: list[Exhibit] = []
        self._catalog = catalog
        self._file = file
        self._is_whole = is_whole

    def read(self, walker: Walker, node: Node, path: str) -> Any:
        """Return the plugins' sections as a PluginsConfig, or UNSET."""
        known: list[tuple[Node, Node]] = []
        instances: dict[str, PluginConfig] = {}
        if isinstance(node, Mapping):
            for key, value in node.entries:
                if not isinstance(key, Scalar) or (canonical(key.text) in BUILTIN_SECTIONS and not _type_of(value)):
                    known.append((key, value))
                elif (instance := self._instance(walker, key, value, f"{path}.{key.text}")) is not None:
                    if any(is_same(key.text, name) for name in (*instances, *_names(known))):
                        walker.report(key.place, f"{path}.{key.text}", "given twice; keep one of the two")
                    instances[key.text] = instance
            node = Mapping(node.place, known)
        plugins = walker.section(node, PluginsConfig, path)
        if len(instances) + len(BUILTIN_SECTIONS) > MAX_PLUGINS:
            walker.report(node.place, path, f"more than {MAX_PLUGINS} plugins; remove some")
        return plugins if plugins is msgspec.UNSET else msgspec.structs.replace(plugins, instances=instances)

    def _instance(self, walker: Walker, key: Scalar, node: Node, path: str) -> PluginConfig | None:
        """Return a section that has a `type`, or is of a plugin that is not built in; None where it is neither."""
        kind = _type_of(node) or key
        name, kind_path = canonical(kind.text), path if kind is key else f"{path}.type"
        origin = None if name in TYPES else self._catalog.find(name)
        if kind is not key and (what := name_complaint(key.text)):
            walker.report(key.place, path, what)
        elif name not in TYPES and origin is None:
            walker.report(kind.place, kind_path, f"unknown plugin{self._meant(kind.text)}")
        elif what := name_complaint(key.text):
            walker.report(key.place, path, what)
        elif kind is key and origin is None:
            walker.report(key.place, path, f"needs a name of its own, and 'type: {key.text}' beside its other keys")
        elif canonical(key.text) in BUILTIN_SECTIONS and canonical(key.text) != name:
            walker.report(kind.place, kind_path, f"'{key.text}' is a plugin; name this section otherwise")
        elif name in SINGLE and canonical(key.text) != name:
            walker.report(kind.place, kind_path, f"there can be one '{name}' only; remove this section")
        elif origin is not None:
            return self._foreign(walker, key, node, origin, path)
        else:
            section = walker.section(node, TYPES[name], path)
            return None if section is msgspec.UNSET else section
        return None

    def _foreign(self, walker: Walker, key: Scalar, node: Node, origin: Origin, path: str) -> PluginConfig | None:
        common = walker.section(node, PluginConfig, path, others_pass=True)
        if common is msgspec.UNSET:
            return None
        self.exhibits.append(Exhibit(key.text, origin, node, key.place, self._file, path, self._is_whole))
        return _foreign(common, origin, _options(node))

    def _meant(self, name: str) -> str:
        known = [*TYPES, *(found for found in self._catalog.names() if found not in TYPES)]
        spelled = _spelled(known, name)
        return suggestion(name, spelled) or f"; known are {', '.join(spelled)}"

    def judge(
        self, settings: Config | None, verdicts: Sequence[Verdict], is_boot: bool
    ) -> tuple[Config | None, list[Mistake]]:
        """Return the settings with what the examination of `exhibits` has shown, and the mistakes it found.

        Args:
            settings: the file's, as `read` left them; None where it has mistakes besides.
            verdicts: one for each exhibit.
            is_boot: whether the agent starts, which no plugin may keep it from.
        """
        sections = dict(settings.plugins.instances) if settings else {}
        mistakes: list[Mistake] = []
        for exhibit, verdict in zip(self.exhibits, verdicts, strict=True):
            section, found = _judge(exhibit, verdict, is_boot)
            mistakes += found
            sections[exhibit.name] = section
        if settings is None or mistakes:
            return None, mistakes
        plugins = msgspec.structs.replace(settings.plugins, instances=sections)
        return msgspec.structs.replace(settings, plugins=plugins), []


def _judge(exhibit: Exhibit, verdict: Verdict, is_boot: bool) -> tuple[ForeignConfig, list[Mistake]]:
    """Return an examined section, and its mistakes."""
    options = _options(exhibit.node)
    given = {canonical(key) for key in options}
    defaults = {key: value for key, value in verdict.defaults.items() if key not in given}
    walker = Walker(exhibit.file, "/", is_whole=True)
    walker.section(from_plain(defaults), PluginConfig, "", others_pass=True)
    failure = verdict.failure
    if walker.mistakes:  # a plugin's word is judged as a file's is
        failure, defaults = f"its own default of {walker.mistakes[0].path}: {walker.mistakes[0].what}", {}
    common = walker.section(from_plain(options | defaults), PluginConfig, "", others_pass=True)
    if common is msgspec.UNSET:
        common = PluginConfig()
    if failure:
        line, column = exhibit.place.line, exhibit.place.column
        mistakes = [Mistake(exhibit.file, line, column, exhibit.path, f"cannot be used: {failure}")]
        obstacle = failure
    else:
        mistakes = list(verdict.mistakes)
        obstacle = "; ".join(f"{mistake.path}: {mistake.what}" for mistake in mistakes)
    section = _foreign(common, exhibit.origin, options, verdict, obstacle)
    is_excused = is_boot or (failure and not section.enable)
    return section, [] if is_excused else mistakes


def _foreign(
    common: PluginConfig,
    origin: Origin,
    options: dict[str, Any],
    verdict: Verdict | None = None,
    obstacle: str = "",
) -> ForeignConfig:
    verdict = verdict or Verdict()
    return ForeignConfig(
        **{name: getattr(common, name) for name in PluginConfig.__struct_fields__},
        origin=origin,
        options=options,
        reads=verdict.reads,
        has_network=verdict.has_network,
        obstacle=obstacle,
    )


def _options(node: Node) -> dict[str, Any]:
    value = plain(node)
    return value if isinstance(value, dict) else {}


def _names(entries: list[tuple[Node, Node]]) -> list[str]:
    return [key.text for key, _ in entries if isinstance(key, Scalar)]


def _spelled(names: Sequence[str] | dict[str, type[PluginConfig]], like: str) -> list[str]:
    """Return names in the spelling of the question, with `-` or with `_`."""
    return [name.replace("_", "-") for name in names] if "-" in like else list(names)


def _type_of(node: Node) -> Scalar | None:
    """Return the value of a section's `type`, if it has one."""
    for key, value in node.entries if isinstance(node, Mapping) else []:
        if isinstance(key, Scalar) and key.text == "type" and isinstance(value, Scalar) and value.text:
            return value
    return None
