"""A plugin's section given key by key, as the control socket is given it, checked as a file would be."""

from __future__ import annotations

import json
from collections.abc import Mapping

from kon_agent.config import document
from kon_agent.config.document import compose
from kon_agent.config.foreign import Examine
from kon_agent.config.load import check_text
from kon_agent.config.mistake import Mistake
from kon_agent.config.schema import Config, PluginConfig
from kon_agent.errors import ConfigError


def parse_section(
    plugin: str, settings: Mapping[str, str], around: Config, examine: Examine | None = None
) -> PluginConfig:
    """Return the section of a plugin of its own name.

    Args:
        plugin: its name.
        settings: key to value, each value on one line as the file would write it.
        around: the configuration it is to be part of: where plugins are found, whom they run as.
        examine: what asks plugins that are not built in about their sections.

    Raises:
        ConfigError: something is wrong; the message holds a line per mistake, each with its key.
    """
    mistakes = [mistake for key, value in settings.items() for mistake in _outside(key, value)]
    if not mistakes:
        lines = "".join(f"    {key}: {value}\n" for key, value in settings.items())
        head = f"plugin_dir: {json.dumps(around.plugin_dir)}\nuser: {json.dumps(around.user)}\n"
        config, mistakes = check_text(f"{head}plugins:\n  {json.dumps(plugin)}:\n{lines}", "", examine)
        if config is not None:
            return config.plugins.by_name()[plugin]
    raise ConfigError("\n".join(": ".join(part for part in (m.path or plugin, m.what) if part) for m in mistakes))


def _outside(key: str, value: str) -> list[Mistake]:
    """Return why a key and its value cannot stand on a line of their own."""
    if not key.isidentifier() and not key.replace("-", "_").isidentifier():
        return [Mistake("", 0, 0, key, "is not a key")]
    if not value.isprintable():
        return [Mistake("", 0, 0, key, "a value is one line without control characters")]
    composed = compose(value, "")
    if composed.mistakes:
        return [Mistake("", 0, 0, key, mistake.what) for mistake in composed.mistakes]
    if isinstance(composed.root, document.Scalar) and "#" in value and "#" not in composed.root.text:
        return [Mistake("", 0, 0, key, "holds a comment; put the value in quotes")]
    return []
