"""The commands of kon-agent spool."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kon_agent.cli import spool as commands
from kon_agent.errors import SpoolError
from kon_agent.spool.disk import Folder
from kon_agent.spool.frame import Entry
from kon_agent.spool.limits import Limits
from kon_agent.spool.log import Spool

Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run `kon-agent spool` with these arguments, on a machine without an installed configuration."""
    monkeypatch.setattr(commands, "DEFAULT_CONFIG", str(tmp_path / "absent.yaml"))
    return lambda *arguments: CliRunner().invoke(commands.spool, arguments)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A folder whose spool is in use, with one finished segment and one being written."""
    path = tmp_path / "spool"
    path.mkdir()
    folder = Folder(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    folder.lock()
    spool = Spool(folder, Limits(1_000_000, 1e6, 0))
    spool.open(time.time())
    spool.store([Entry("cpu", 1, seq, b"payload") for seq in range(10)], time.time())
    while spool.read(100, 1000) is not None:
        pass
    spool.store([Entry("disk", 1, 0, b"payload"), Entry("disk", 1, 1, count=4, reason=1)], time.time())
    yield path
    folder.release()


def test_ls_shows_a_live_spool(cli: Cli, live: Path) -> None:
    """One line a segment, who uses it, and nothing wider than 80 columns but the path."""
    result = cli("ls", "--path", str(live))
    assert 0 == result.exit_code
    head, user, columns, first, second = result.stdout.splitlines()
    assert head.startswith(f"{live}: 2 segments, 11 records, ")
    assert f"in use by pid {os.getpid()}" == user
    assert ["SEGMENT", "BYTES", "RECORDS", "LOSSES", "AGE", "STATE"] == columns.split()
    assert ["10", "0", "0s", "finished"] == first.split()[2:]
    assert ["1", "4", "0s", "open"] == second.split()[2:]
    assert max(map(len, (user, columns, first, second))) <= 80


def test_the_configuration_names_the_spool(cli: Cli, live: Path, tmp_path: Path) -> None:
    """With -c the spool is at its cache.path."""
    config = tmp_path / "agent.yaml"
    config.write_text("server: quic://localhost:7843\ncache: {path: spool}\n")
    assert 0 == cli("verify", "-c", str(config)).exit_code
    assert json.loads(cli("ls", "--json", "-c", str(config)).stdout)["path"] == str(live)


def test_verify_finds_damage(cli: Cli, live: Path) -> None:
    """A damaged segment is named with what it costs and where, and the exit code is 1."""
    assert 0 == cli("verify", "--path", str(live)).exit_code
    name = min(path.name for path in live.glob("*.seg"))
    data = bytearray((live / name).read_bytes())
    data[200] ^= 1
    (live / name).write_bytes(data)
    result = cli("verify", "--path", str(live))
    assert 1 == result.exit_code
    assert f"{name}: damaged, 1 of 10 records are lost" in result.stdout.splitlines()
    assert " bytes from offset " in result.stdout
    found = json.loads(cli("verify", "--json", "--path", str(live)).stdout)
    assert (True, os.getpid(), ["damaged", "open"]) == (
        found["damaged"], found["pid"], [segment["state"] for segment in found["segments"]],
    )  # fmt: skip
    assert {"number", "name", "bytes", "records", "losses", "age_s", "state", "unreadable", "damage", "error"} == set(
        found["segments"][0]
    )


def test_an_empty_spool_is_no_error(cli: Cli, tmp_path: Path) -> None:
    """Nothing spooled, nothing to show."""
    result = cli("ls", "--path", str(tmp_path))
    assert f"{tmp_path}: 0 segments, 0 records, 0 B\n" == result.stdout


def test_no_spool_says_where_it_looked(cli: Cli, tmp_path: Path) -> None:
    """A folder that is not there is an error that names it."""
    result = cli("ls", "--path", str(tmp_path / "absent"))
    assert isinstance(result.exception, SpoolError)
    assert f"there is no spool at {tmp_path / 'absent'}" in str(result.exception)
