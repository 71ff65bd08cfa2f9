"""A plugin to begin with: a collector that works, and its tests, as a file for the plugin folder or as a package.

Invariants: what is written runs and its tests pass as they are; nothing that exists is overwritten; no file can be
written by its group or others, which the agent would refuse.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kon_agent.config.naming import canonical, name_complaint
from kon_agent.config.schema import TYPES
from kon_agent.errors import PluginError

_MODE = 0o644

_PLUGIN = '''\
"""The plugin NAME: how many lines a file has. Replace this by what yours measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from kon_agent.plugins import Context, Metric, NoData, PluginConfig, plugin


class CLASSConfig(PluginConfig, frozen=True, kw_only=True):
    """The keys of the plugin's section, besides those that every plugin has."""

    path: str = "/etc/hostname"
    max_bytes: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000


@plugin("NAME", config=CLASSConfig, reads=lambda config: [config.path])
class CLASS:
    """Count the lines of a file."""

    def __init__(self, config: CLASSConfig, context: Context) -> None:
        self._config = config
        self._path = context.path(config.path)

    def collect(self) -> Iterable[Metric]:
        """Return one cycle's metrics; called once each period."""
        try:
            with open(self._path, "rb") as file:
                content = file.read(self._config.max_bytes)
        except FileNotFoundError as err:
            raise NoData(f"{self._config.path} does not exist") from err
        return [Metric("PREFIX_lines", content.count(b"\\n"), {"path": self._config.path})]
'''

_TEST = '''\
"""The plugin NAME, tested without an agent: what it reads is in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from kon_agent.plugins import Context, Metric, NoData

from MODULE import CLASS, CLASSConfig


def test_lines_are_counted(tmp_path: Path) -> None:
    """Each line of the file counts."""
    (tmp_path / "log").write_text("one\\ntwo\\n")
    collector = CLASS(CLASSConfig(path="/log"), Context(root=str(tmp_path)))
    assert [Metric("PREFIX_lines", 2.0, {"path": "/log"})] == list(collector.collect())


def test_no_file_is_no_data(tmp_path: Path) -> None:
    """Where there is no file there is nothing to report, which is no failure."""
    collector = CLASS(CLASSConfig(path="/log"), Context(root=str(tmp_path)))
    with pytest.raises(NoData, match="/log does not exist"):
        collector.collect()
'''

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "kon-plugin-DASHED"
version = "0.1.0"
description = "A plugin of Kon-Agent: how many lines a file has"
requires-python = ">=3.11"
# Kon-Agent itself is no dependency: the plugin is installed beside it, and it must not be replaced by that.
dependencies = []

[project.entry-points."kon_agent.plugins"]
NAME = "MODULE:CLASS"

[tool.setuptools]
py-modules = ["MODULE"]

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def write(name: str, folder: Path | None, is_package: bool) -> list[Path]:
    """Write a plugin called `name`, and return the files, the plugin's own first.

    Args:
        name: the plugin's name.
        folder: where to; None: here, a package into a folder of its own.
        is_package: whether it is to be installed with pip; otherwise it is one file for the plugin folder.

    Raises:
        PluginError: the name cannot be used, or a file is there already or cannot be written.
    """
    if what := name_complaint(name):
        raise PluginError(f"{name!r}: {what}")
    key = canonical(name)
    if key in TYPES:
        raise PluginError(f"{name!r} is built in, and would be used instead; choose another name")
    if key.startswith("test_") or (not is_package and key in sys.stdlib_module_names):
        raise PluginError(f"{key!r} is a name Python or pytest uses itself; choose another one")
    module = f"kon_plugin_{key}" if is_package else key
    words = {
        "MODULE": module,
        "CLASS": "".join(part.capitalize() for part in key.split("_")),
        "PREFIX": key,
        "DASHED": key.replace("_", "-"),
        "NAME": name,
    }
    if is_package:
        home = folder or Path(f"kon-plugin-{words['DASHED']}")
        texts = {f"{module}.py": _PLUGIN, f"tests/test_{key}.py": _TEST, "pyproject.toml": _PYPROJECT}
    else:
        home = folder or Path()
        texts = {f"{module}.py": _PLUGIN, f"test_{module}.py": _TEST}
    files = {home / file: _filled(text, words) for file, text in texts.items()}
    if there := [str(file) for file in files if file.exists()]:
        raise PluginError(f"{', '.join(there)}: exists; remove it, or choose another name or --dir")
    for file, text in files.items():
        _write(file, text)
    return list(files)


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        with open(fd, "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as err:
        raise PluginError(f"{file} cannot be written: {err.strerror}") from err
