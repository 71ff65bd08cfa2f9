"""The spool's folder is made where it may be, and not taken where it is somebody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kon_agent.errors import SpoolError
from kon_agent.spool import place

UID, GID = os.getuid(), os.getgid()


def test_the_folder_is_made_for_us_alone(tmp_path: Path) -> None:
    """It and its parents are made, and nobody else may enter it; a second time it is the same."""
    path = tmp_path / "deep" / "spool"
    for _ in range(2):
        fd = place.prepare(str(path), UID, GID)
        assert os.path.samestat(os.fstat(fd), path.stat())
        os.close(fd)
    assert 0o700 == stat.S_IMODE(path.stat().st_mode)


def test_beside_the_originals_cache_file(tmp_path: Path) -> None:
    """Where the original left its cache as a file, the spool lives next to it and the file stays."""
    (tmp_path / "edge_agent.cache").write_text("old")
    fd = place.prepare(str(tmp_path / "edge_agent.cache"), UID, GID)
    os.close(fd)
    assert (tmp_path / "edge_agent.cache.spool").is_dir()
    assert "old" == (tmp_path / "edge_agent.cache").read_text()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A link somebody put in our place leads nowhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpoolError, match=r"cache\.path .*spool cannot be used"):
        place.prepare(str(tmp_path / "spool"), UID, GID)


@pytest.mark.root
@pytest.mark.skipif(UID != 0, reason="needs root: gives a folder to another user")
def test_a_strangers_folder_is_not_taken(tmp_path: Path) -> None:
    """A folder of a third user is refused; one of root's is handed over with the files in it."""
    path = tmp_path / "spool"
    path.mkdir()
    (path / "000000000001.seg").touch()
    os.chown(path, 12345, 12345)
    with pytest.raises(SpoolError, match=r"belongs to uid 12345; remove it or choose another"):
        place.prepare(str(path), 54321, 54321)
    os.chown(path, 0, 0)
    os.close(place.prepare(str(path), 54321, 54321))
    assert {54321} == {entry.stat().st_uid for entry in (path, *path.iterdir())}
