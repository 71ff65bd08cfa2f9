"""Configuration files: from a path to a checked, frozen `Config` or `ReceiverConfig`, or to every mistake.

Owns the file's bounds (readable, MAX_CONFIG_BYTES, UTF-8) and the order of work: read, compose (`document`),
walk (`walk`). A file is either wholly valid or not used at all.
"""

from __future__ import annotations

import os.path

from kon_agent.config.document import compose
from kon_agent.config.mistake import Mistake
from kon_agent.config.receiver import ReceiverConfig
from kon_agent.config.schema import Config
from kon_agent.config.walk import Section, walk
from kon_agent.errors import ConfigError

MAX_CONFIG_BYTES = 1024 * 1024  # every key with comments is 5 KB; parsing takes seconds per MiB


def load(path: str) -> Config:
    """Return the agent's configuration in the file `path`, its relative paths made absolute.

    Raises:
        ConfigError: the file is unusable; the message holds one `file:line:column: path: what` per mistake.
    """
    return _load(path, Config)


def load_receiver(path: str) -> ReceiverConfig:
    """Return the receiver's configuration in the file `path`, its relative paths made absolute.

    Raises:
        ConfigError: as for `load`.
    """
    return _load(path, ReceiverConfig)


def check(path: str) -> tuple[Config | None, list[Mistake]]:
    """Return the agent's configuration and no mistake, or None and every mistake in order."""
    return _check(path, Config)


def check_receiver(path: str) -> tuple[ReceiverConfig | None, list[Mistake]]:
    """Return the receiver's configuration and no mistake, or None and every mistake."""
    return _check(path, ReceiverConfig)


def _load(path: str, section: type[Section]) -> Section:
    settings, mistakes = _check(path, section)
    if settings is None:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    return settings


def _check(path: str, section: type[Section]) -> tuple[Section | None, list[Mistake]]:
    text = _read(path)
    if isinstance(text, Mistake):
        return None, [text]
    return walk(compose(text, path), section, path, os.path.dirname(os.path.abspath(path)))


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
