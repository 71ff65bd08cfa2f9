"""The catalogue: what is found where, what is refused, and that nothing found is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kon_agent.catalog import MAX_SOURCE_BYTES, Catalog, Origin, read_source
from kon_agent.errors import PluginError

BOMB = "raise SystemExit('imported')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a plugin folder with one plugin."""
    made = tmp_path / "plugins.d"
    made.mkdir(mode=0o755)
    put(made, "greeting")
    return made


def put(folder: Path, name: str, text: str = BOMB) -> Path:
    """Put a file into a plugin folder."""
    file = folder / f"{name}.py"
    file.write_text(text)
    file.chmod(0o644)
    return file


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on sys.path with a distribution that has an entry point."""
    info = tmp_path / "site" / "acme_tools-2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tools\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(
        "[kon_agent.plugins]\nups = acme_ups.main:Ups\ngreeting = acme:Greeting\nodd = no class\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    return info.parent


def test_a_file_is_found_by_its_name(folder: Path) -> None:
    """NAME.py is the plugin NAME, whichever of `-` and `_` is written; nothing of it is run."""
    file = put(folder, "disk_lamps")
    found = Catalog(str(folder)).find("disk-lamps")
    assert found is not None
    assert ("disk_lamps", "file", str(file), "") == (found.name, found.kind, found.target, found.refusal)


def test_an_entry_point_is_found_by_its_name(folder: Path, installed: Path) -> None:
    """An installed package's plugin is known with its package; nothing of it is imported."""
    found = Catalog(str(folder)).find("ups")
    assert Origin("ups", "package", "acme_ups.main:Ups", "acme-tools 2.1") == found
    assert "acme_ups" not in sys.modules


def test_a_file_goes_before_a_package(folder: Path, installed: Path) -> None:
    """Where both have the name, the file is used."""
    found = Catalog(str(folder)).find("greeting")
    assert found is not None
    assert "file" == found.kind


def test_an_entry_point_that_names_no_class_is_refused(folder: Path, installed: Path) -> None:
    """It is found, and said to be wrong."""
    found = Catalog(str(folder)).find("odd")
    assert found is not None
    assert "'no class' is not module:Class" == found.refusal


def test_everything_is_listed(folder: Path, installed: Path) -> None:
    """All names there are, in order; tests, hidden and private files are none."""
    for name in ("test_greeting", "_common", ".hidden"):
        put(folder, name)
    (folder / "notes.txt").write_text("")
    assert {"greeting", "odd", "ups"} <= set(Catalog(str(folder)).names())
    assert not {"test_greeting", "_common", ".hidden", "notes"} & set(Catalog(str(folder)).names())


def test_no_folder_is_no_plugins(tmp_path: Path) -> None:
    """Most machines have none."""
    assert Catalog(str(tmp_path / "none")).find("greeting") is None


def test_the_version_changes_with_the_code(folder: Path) -> None:
    """So that a reload can tell; an untouched file stays the same."""
    first = Catalog(str(folder)).find("greeting")
    assert first == Catalog(str(folder)).find("greeting")
    put(folder, "greeting", "x = 1\n")
    assert first != Catalog(str(folder)).find("greeting")


def _writable(file: Path) -> None:
    file.chmod(0o664)


def _folder_writable(file: Path) -> None:
    file.parent.chmod(0o777)


def _link(file: Path) -> None:
    file.rename(file.with_suffix(".other"))
    file.symlink_to(file.with_suffix(".other"))


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o644)


def _huge(file: Path) -> None:
    os.truncate(file, MAX_SOURCE_BYTES + 1)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_writable, "its group or others may write it; run chmod go-w"),
        (_folder_writable, "its group or others may write it; run chmod go-w"),
        (_link, "it is a symbolic link"),
        (_fifo, "it is no file"),
        (_huge, "it is larger than"),
    ],
)
def test_what_others_could_have_written_is_refused(folder: Path, spoil, what: str) -> None:
    """When it is found, and again when it is read."""
    origin = Catalog(str(folder)).find("greeting")
    assert origin is not None
    spoil(folder / "greeting.py")
    found = Catalog(str(folder)).find("greeting")
    assert found is not None
    assert what in found.refusal
    with pytest.raises(PluginError, match=r"refused|cannot be read"):
        read_source(origin)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file away")
def test_what_belongs_to_others_is_refused(folder: Path) -> None:
    """A file of another user, who could change it."""
    os.chown(folder / "greeting.py", 65534, 65534)
    found = Catalog(str(folder)).find("greeting")
    assert found is not None
    assert "it belongs to uid 65534" in found.refusal


def test_the_source_is_read(folder: Path) -> None:
    """As it is."""
    origin = Catalog(str(folder)).find("greeting")
    assert origin is not None
    assert BOMB.encode() == read_source(origin)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    """It may have been removed since it was found."""
    origin = Catalog(str(folder)).find("greeting")
    assert origin is not None
    (folder / "greeting.py").unlink()
    with pytest.raises(PluginError, match=r"greeting\.py cannot be read: No such file"):
        read_source(origin)
