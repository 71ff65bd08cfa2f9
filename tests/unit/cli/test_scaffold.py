"""`plugins new`: what is written works as it is."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kon_agent.cli.agent import main
from kon_agent.cli.scaffold import write
from kon_agent.errors import PluginError
from tests.support.program import environment_of


def pytest_in(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run plain pytest on what was written."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=folder,
        env=environment_of(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("is_package", [False, True])
def test_its_tests_are_green(tmp_path: Path, is_package: bool) -> None:
    """As they are written, with plain pytest, without an agent."""
    write("door-bell", tmp_path / "made", is_package)
    done = pytest_in(tmp_path / "made")
    assert 0 == done.returncode, done.stdout
    assert "2 passed" in done.stdout


def test_a_file_can_be_tried(tmp_path: Path) -> None:
    """In the plugin folder it is found, examined and collects."""
    write("door-bell", tmp_path / "plugins.d", False)
    config = tmp_path / "agent.yaml"
    config.write_text("plugin_dir: plugins.d\nplugins: {door-bell: {path: /etc/passwd}}\n")
    tried = CliRunner().invoke(main, ["plugins", "test", "door-bell", "-c", str(config), "--json"])
    assert 0 == tried.exit_code, tried.output
    assert '"name":"door_bell_lines"' in tried.stdout


def test_a_package_has_its_entry_point(tmp_path: Path) -> None:
    """In the group the agent looks into, under the plugin's name."""
    write("door-bell", tmp_path, True)
    text = (tmp_path / "pyproject.toml").read_text()
    assert '[project.entry-points."kon_agent.plugins"]\ndoor-bell = "kon_plugin_door_bell:DoorBell"\n' in text


def test_nobody_else_can_write_it(tmp_path: Path) -> None:
    """Or the agent would refuse it."""
    for file in write("door-bell", tmp_path, False):
        assert not file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Not even by half: what exists is named, and nothing is written."""
    (tmp_path / "test_door_bell.py").write_text("mine")
    with pytest.raises(PluginError, match=r"test_door_bell\.py: exists"):
        write("door-bell", tmp_path, False)
    assert ["test_door_bell.py"] == [file.name for file in tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["Bell", "cpu", "exec", "json", "test_bell", "../x", ""])
def test_a_name_that_would_not_work_is_refused(tmp_path: Path, name: str) -> None:
    """Built in, Python's own, pytest's own, or no name."""
    with pytest.raises(PluginError):
        write(name, tmp_path, False)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    """How to test, install and use it."""
    done = CliRunner().invoke(main, ["plugins", "new", "door-bell", "--dir", str(tmp_path)])
    assert 0 == done.exit_code, done.output
    assert all(word in done.output for word in ("test it: ", "install it: ", "use it: "))
    again = CliRunner().invoke(main, ["plugins", "new", "door-bell", "--dir", str(tmp_path)])
    assert (1, True) == (again.exit_code, "exists" in again.stderr)
