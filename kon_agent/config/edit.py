"""A change of one plugin's settings, made in the text of a configuration file. Pure.

The text is cut open where the change belongs and nowhere else: comments, order, quotes, indentation and line ends of
everything else stay as they are to the byte. Whoever writes a file loads the edited text and compares it with
`Change.applied` first (`persist`): a text written too strangely to be cut well is then refused, not spoilt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from kon_agent.config.naming import is_same
from kon_agent.config.outline import Piece, outline
from kon_agent.config.schema import BUILTIN_SECTIONS, Config, Duration, ForeignConfig, PluginConfig, PluginsConfig
from kon_agent.config.units import format_duration
from kon_agent.errors import ConfigError

DEFAULT_STEP = 2  # columns a level is indented by, in a file that shows none

Tree = Mapping[str, "str | Tree"]
"""What to write: keys to values as YAML writes them, or to further keys."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a plugin's section gets another value."""

    plugin: str
    key: str
    value: bool | Duration

    def applied(self, config: Config) -> Config:
        """Return the settings with the change.

        Raises:
            ConfigError: the plugin has no section in the file, and cannot do without.
        """
        section = config.plugins.by_name().get(self.plugin)
        if section is None:
            raise ConfigError(f"plugins.{self.plugin}: is not in the file; it was added without --persist")
        section = msgspec.structs.replace(section, **{self.key: self.value})
        if isinstance(section, ForeignConfig):  # keeps what its plugin is shown: the section as it is written
            written = self.value if isinstance(self.value, bool) else self.text
            section = msgspec.structs.replace(section, options={**section.options, self.key: written})
        return with_plugin(config, self.plugin, section)

    @property
    def text(self) -> str:
        """The value as the file writes it."""
        return json.dumps(self.value) if isinstance(self.value, bool) else format_duration(self.value)


@dataclass(frozen=True, slots=True)
class Addition:
    """A plugin of its own name.

    Attributes:
        section: its section, as loading makes it of the settings without examination.
        settings: key to value as the file writes it.
    """

    plugin: str
    section: PluginConfig
    settings: Mapping[str, str]

    def applied(self, config: Config) -> Config:
        """Return the settings with the plugin.

        Raises:
            ConfigError: the file has such a plugin already.
        """
        if any(is_same(name, self.plugin) for name in config.plugins.by_name()):
            raise ConfigError(
                f"plugins.{self.plugin}: is in the file already; 'kon-agent reload' makes it run, or, where a command "
                "has removed it, adding it without --persist"
            )
        return with_plugin(config, self.plugin, self.section)


@dataclass(frozen=True, slots=True)
class Removal:
    """A plugin that is not built in is no more."""

    plugin: str

    def applied(self, config: Config) -> Config:
        """Return the settings without the plugin."""
        return with_plugin(config, self.plugin, None)


Change = Setting | Addition | Removal


def edited(text: str, change: Change) -> str:
    """Return a valid configuration's text with a change made, as well as it can be: see above."""
    root = outline(text)
    file = _File(text, root)
    plugins = _find(root, "plugins")
    section = _find(plugins, change.plugin)
    match change:
        case Setting():
            if old := _find(section, change.key):
                return file.replaced(old, _quoted_like(old, change.text))
            if section is None:
                # What is off unless it is named would be on by being named.
                default = getattr(PluginsConfig(), change.plugin, None)
                is_off = change.key != "enable" and default is not None and not default.enable
                tree = {**({"enable": "false"} if is_off else {}), change.key: change.text}
                return file.inserted(["plugins", change.plugin], tree)
            return file.inserted(["plugins", change.plugin], {change.key: change.text})
        case Addition():
            return file.inserted(["plugins"], {change.plugin: change.settings})
        case Removal():
            return file.removed(plugins, change.plugin)


def with_plugin(config: Config, name: str, section: PluginConfig | None) -> Config:
    """Return a configuration with another section of a plugin, or without the plugin."""
    plugins, instances = config.plugins, dict(config.plugins.instances)
    if section is None:
        instances.pop(name, None)
    elif name in BUILTIN_SECTIONS and name not in instances:
        plugins = msgspec.structs.replace(plugins, **{name: section})
    else:
        instances[name] = section
    return msgspec.structs.replace(config, plugins=msgspec.structs.replace(plugins, instances=instances))


def _entry(mapping: Piece | None, key: str) -> tuple[Piece, Piece] | None:
    entries = mapping.entries if mapping else []
    return next((entry for entry in entries if is_same(entry[0].value, key)), None)


def _find(mapping: Piece | None, key: str) -> Piece | None:
    entry = _entry(mapping, key)
    return entry[1] if entry else None


def _quoted_like(old: Piece, text: str) -> str:
    return f"{old.style}{text}{old.style}" if old.style in ("'", '"') else text


class _File:
    """A text, and how to cut it.

    Args:
        text: the file's.
        root: its outline.
    """

    def __init__(self, text: str, root: Piece | None) -> None:
        self._text = text
        self._root = root
        self._newline = "\r\n" if "\r\n" in text else "\n"

    def replaced(self, piece: Piece, by: str) -> str:
        """Return the text with something else in the place of a piece."""
        return self._text[: piece.start] + by + self._text[piece.end :]

    def inserted(self, path: list[str], tree: Tree) -> str:
        """Return the text with a tree below a path of keys, which is made as far as it is not there."""
        trail, host, missing = self._descend(path)
        for name in reversed(missing):
            tree = {name: tree}
        above = [mapping for mapping, _ in trail]
        if host is not None and host.is_mapping:
            return self._into_flow(host, tree) if host.style == "flow" else self._into_block(host, tree, above)
        if host is None or not trail:  # the file says nothing at all
            return self._lines_at(len(self._text), _block(tree, 0, DEFAULT_STEP))
        mapping, key = trail[-1]
        if not host.is_unwritten:  # `null`, in words
            return self.replaced(host, _flow(tree, _is_json(mapping)))
        if mapping.style == "flow":
            colon = "" if self._text[key.end : host.end].strip() else ":"
            return self.replaced(host, f"{colon} {_flow(tree, _is_json(mapping))}")
        step = self._step(above)
        return self._lines_at(self._next_line(host.end), _block(tree, self._column(key.start) + step, step))

    def _descend(self, path: list[str]) -> tuple[list[tuple[Piece, Piece]], Piece | None, list[str]]:
        """Return the mappings and keys along a path, what stands at its end, and the keys that are not there."""
        trail: list[tuple[Piece, Piece]] = []
        host = self._root
        for depth, name in enumerate(path):
            entry = _entry(host, name)
            if host is None or entry is None:
                return trail, host, path[depth:]
            trail.append((host, entry[0]))
            host = entry[1]
        return trail, host, []

    def removed(self, mapping: Piece | None, key: str) -> str:
        """Return the text without an entry of a mapping."""
        entry = _entry(mapping, key)
        if mapping is None or entry is None:
            return self._text
        begin, end = entry[0].start, entry[1].last()
        if mapping.style == "block":
            inside = self._column(entry[1].children[0].start) if entry[1].style == "block" else self._column(begin) + 1
            return self._text[: self._line_start(begin)] + self._text[self._after(inside, end) :]
        entries = mapping.entries
        index = next(index for index, each in enumerate(entries) if each[0] is entry[0])
        if index + 1 < len(entries):
            end = entries[index + 1][0].start
        elif index:
            begin = entries[index - 1][1].last()
        return self._text[:begin] + self._text[end:]

    def _into_block(self, mapping: Piece, tree: Tree, above: list[Piece]) -> str:
        last_key, last_value = mapping.entries[-1]
        column = self._column(last_key.start)
        at = self._after(column + 1, max(last_value.last(), last_key.end))
        return self._lines_at(at, _block(tree, column, self._step([*above, mapping])))

    def _into_flow(self, mapping: Piece, tree: Tree) -> str:
        inner = _flow(tree, _is_json(mapping))[1:-1]
        if not mapping.entries:
            return self._text[: mapping.start + 1] + inner + self._text[mapping.start + 1 :]
        key, value = mapping.entries[-1]
        lead = self._text[self._line_start(key.start) : key.start]
        separator = ", " if lead.strip() else f",{self._newline}{lead}"
        if self._text[: value.last()].endswith(":"):  # `{deadline:, …` would be a key with a colon in it
            separator = f" {separator}"
        return self._text[: value.last()] + separator + inner + self._text[value.last() :]

    def _lines_at(self, at: int, lines: list[str]) -> str:
        """Return the text with lines inserted where one begins, or at the end."""
        before, after = self._text[:at], self._text[at:]
        if not before or before.endswith(("\n", "\r")):
            return before + "".join(line + self._newline for line in lines) + after
        return before + "".join(self._newline + line for line in lines)  # the last line had no end, and has none again

    def _after(self, column: int, end: int) -> int:
        """Return where what follows an entry that ends at `end` begins: behind comments from `column` on."""
        at = found = self._next_line(end)
        while at < len(self._text):
            line = self._text[at : self._next_line(at)]
            content = line.lstrip(" ")
            if content.startswith("#") and len(line) - len(content) >= column:
                found = self._next_line(at)
            elif content.strip():
                break
            at = self._next_line(at)
        return found

    def _step(self, above: list[Piece]) -> int:
        """Return by how much the file indents, looking at what is nearest first."""
        for mapping in [*reversed(above), *([self._root] if self._root else [])]:
            for key, value in mapping.entries if mapping.style == "block" else []:
                if value.is_mapping and value.style == "block":
                    return self._column(value.entries[0][0].start) - self._column(key.start)
        return DEFAULT_STEP

    def _line_start(self, at: int) -> int:
        return max(self._text.rfind("\n", 0, at), self._text.rfind("\r", 0, at)) + 1

    def _next_line(self, at: int) -> int:
        found = re.compile(r"\r\n|\n|\r").search(self._text, at)
        return found.end() if found else len(self._text)

    def _column(self, at: int) -> int:
        return at - self._line_start(at)


def _block(tree: Tree, column: int, step: int) -> list[str]:
    """Return the lines of a tree."""
    lines: list[str] = []
    for key, value in tree.items():
        if isinstance(value, str):
            lines.append(f"{' ' * column}{key}: {value}")
        else:
            lines += [f"{' ' * column}{key}:", *_block(value, column + step, step)]
    return lines


def _flow(tree: Tree, is_json: bool) -> str:
    """Return a tree in braces."""
    parts = []
    for key, value in tree.items():
        inner = _flow_scalar(value, is_json) if isinstance(value, str) else _flow(value, is_json)
        parts.append(f"{json.dumps(key) if is_json else key}: {inner}")
    return "{" + ", ".join(parts) + "}"


def _flow_scalar(text: str, is_json: bool) -> str:
    """Return a value as it may stand in braces: quoted where a comma or bracket of a plain text would end it."""
    if text.startswith(("[", "{", '"', "'")):
        return text
    if is_json:
        try:
            json.loads(text)
        except ValueError:
            return json.dumps(text)
        return text
    return json.dumps(text) if re.search(r"[,\[\]{}]", text) else text


def _is_json(mapping: Piece) -> bool:
    """Whether a mapping is written as JSON writes it."""
    return mapping.style == "flow" and bool(mapping.children) and mapping.children[0].style == '"'
