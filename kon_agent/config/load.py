"""Configuration files: from a path to a checked, frozen `Config` or `ReceiverConfig`, or to every mistake.

Owns the file's bounds (readable, MAX_CONFIG_BYTES, UTF-8) and the order of work: read, compose (`document`),
walk (`walk`), have plugins that are not built in examined (`foreign`). A file is either wholly valid or not used at
all.
"""

from __future__ import annotations

import os.path
from typing import TypeVar

from kon_agent.catalog import Catalog
from kon_agent.config.document import Document, Mapping, Scalar, compose
from kon_agent.config.foreign import Examine
from kon_agent.config.mistake import Mistake
from kon_agent.config.plugin_sections import PluginSections
from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.schema import Config, PluginsConfig
from kon_agent.config.walk import in_order, walk
from kon_agent.errors import ConfigError

Settings = TypeVar("Settings", Config, ReceiverConfig)

MAX_CONFIG_BYTES = 1024 * 1024  # every key with comments is 5 KB; parsing takes seconds per MiB


def load(path: str, examine: Examine | None = None, is_boot: bool = False) -> Config:
    """Return the agent's configuration in the file `path`, its relative paths made absolute.

    Args:
        path: the file.
        examine: what asks plugins that are not built in about their sections; without it these are taken as written.
        is_boot: whether the agent starts: one of these plugins that cannot be used is then no mistake, but an obstacle.

    Raises:
        ConfigError: the file is unusable; the message holds one `file:line:column: path: what` per mistake.
    """
    return _settings(*check(path, examine, is_boot))


def load_receiver(path: str) -> ReceiverConfig:
    """Return the receiver's configuration in the file `path`, its relative paths made absolute.

    Raises:
        ConfigError: as for `load`.
    """
    return _settings(*check_receiver(path))


def check(path: str, examine: Examine | None = None, is_boot: bool = False) -> tuple[Config | None, list[Mistake]]:
    """Return the agent's configuration and no mistake, or None and every mistake in order; see `load`."""
    text = _read(path)
    if isinstance(text, Mistake):
        return None, [text]
    return check_text(text, path, examine, is_boot)


def check_text(
    text: str, path: str, examine: Examine | None = None, is_boot: bool = False
) -> tuple[Config | None, list[Mistake]]:
    """Return what `check` would if the file `path` held `text`."""
    document, folder = compose(text, path), _folder(path)
    plugins = PluginSections(Catalog(_plugin_dir(document, folder)), path, document.is_whole)
    settings, mistakes = walk(document, Config, path, folder, {PluginsConfig: plugins.read})
    if examine is not None and plugins.exhibits:
        verdicts = examine(plugins.exhibits, (settings or Config()).user)
        settings, found = plugins.judge(settings, verdicts, is_boot)
        # Its code has walked the common keys as well: what both find wrong is said once.
        mistakes = in_order(list(dict.fromkeys(mistakes + found)))
    return settings, mistakes


def check_receiver(path: str) -> tuple[ReceiverConfig | None, list[Mistake]]:
    """Return the receiver's configuration and no mistake, or None and every mistake."""
    document = _compose(path)
    if isinstance(document, Mistake):
        return None, [document]
    return walk(document, ReceiverConfig, path, _folder(path))


def _settings(settings: Settings | None, mistakes: list[Mistake]) -> Settings:
    if settings is None:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    return settings


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def _plugin_dir(document: Document, folder: str) -> str:
    """Return the plugin folder, which must be known before the plugins are read; if it is wrong that is said later."""
    entries = document.root.entries if isinstance(document.root, Mapping) else []
    named = [value for key, value in entries if isinstance(key, Scalar) and key.text in ("plugin_dir", "plugin-dir")]
    value = named[0].value if named and isinstance(named[0], Scalar) else None
    return os.path.join(folder, value if isinstance(value, str) else Config().plugin_dir)


def _compose(path: str) -> Document | Mistake:
    text = _read(path)
    return text if isinstance(text, Mistake) else compose(text, path)


def _read(path: str) -> str | Mistake:
    """Return the file's text, or why there is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        return Mistake(path, 0, 0, "", _why_unreadable(err))
    if len(content) > MAX_CONFIG_BYTES:
        return Mistake(path, 0, 0, "", f"is larger than {MAX_CONFIG_BYTES} bytes; this is not a configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        before = content[: err.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8-sig")) + 1
        what = f"is not UTF-8 text (byte 0x{content[err.start]:02x}); save the file as UTF-8"
        return Mistake(path, before.count(b"\n") + 1, column, "", what)


def _why_unreadable(err: OSError) -> str:
    if isinstance(err, FileNotFoundError):
        return "does not exist; name an existing file with -c, or start from etc/agent.yaml"
    if isinstance(err, IsADirectoryError):
        return "is a directory; name the file in it"
    if isinstance(err, PermissionError):
        return "may not be read by this user; run as root, or change the file's permissions"
    return f"cannot be read: {err.strerror or err}; name a readable file with -c"
