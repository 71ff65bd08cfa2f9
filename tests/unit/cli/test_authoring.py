"""`plugins available`: what can be configured, and from where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kon_agent.cli.agent import main
from kon_agent.config.schema import TYPES


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration beside a plugin folder."""
    folder = tmp_path / "plugins.d"
    folder.mkdir(mode=0o755)
    for name in ("greeting", "cpu", "spoilt"):
        (folder / f"{name}.py").write_text("raise SystemExit('it was run')")
        (folder / f"{name}.py").chmod(0o644)
    (folder / "spoilt.py").chmod(0o666)
    file = tmp_path / "agent.yaml"
    file.write_text(
        "plugin_dir: plugins.d\nplugins: {hello: {type: greeting}, load: {}, off: {type: load, enable: false}}"
    )
    return file


def test_what_is_available(config: Path) -> None:
    """Everything built in, every file, with the sections that use it, and why one cannot be used; none of it is run."""
    done = CliRunner().invoke(main, ["plugins", "available", "-c", str(config), "--json"])
    assert 0 == done.exit_code, done.output
    listed = json.loads(done.stdout)
    assert [*TYPES, "cpu", "greeting", "spoilt"] == [each["name"] for each in listed]
    found = {(each["name"], each["origin"]): each for each in listed}
    assert ["load"] == found["load", "built in"]["configured"]
    assert [] == found["time", "built in"]["configured"]
    assert (["hello"], "") == (found["greeting", "file"]["configured"], found["greeting", "file"]["refusal"])
    assert str(config.parent / "plugins.d/greeting.py") == found["greeting", "file"]["where"]
    assert "a built-in plugin has this name" == found["cpu", "file"]["refusal"]
    assert "chmod go-w" in found["spoilt", "file"]["refusal"]


def test_a_wrong_file_is_no_reason_not_to_list(config: Path) -> None:
    """It is said, and the rest is listed."""
    config.write_text("plugins: 7")
    done = CliRunner().invoke(main, ["plugins", "available", "-c", str(config)])
    assert (0, True) == (done.exit_code, "has mistakes" in done.stderr)
    assert "built in" in done.stdout
