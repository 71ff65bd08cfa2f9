"""Files, users, the disk and the clock, judged from facts."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import msgspec
import pytest

from kon_agent import __version__
from kon_agent.config.schema import CacheConfig, Config, Size, TlsConfig
from kon_agent.control_protocol import PluginStatus, ResourceStatus, ServerStatus, SpoolStatus, Status
from kon_agent.doctor import host
from kon_agent.doctor.host import (
    FileFacts,
    SpoolFacts,
    judge_agent,
    judge_clock,
    judge_configuration,
    judge_credential,
    judge_socket,
    judge_spool,
    judge_user,
)
from kon_agent.doctor.patient import Patient
from kon_agent.errors import ControlError
from kon_agent.linux.clockstate import ClockState, TimeState
from kon_agent.linux.privileges import Privileges, User
from kon_agent.spool import lock

NOBODY = ControlError("not_running", "nobody answers")
SOCKET = "/run/kon-agent/control.sock"
MIB = 1024 * 1024
ROOT = Privileges(0, frozenset())
CACHE = CacheConfig(path="/var/lib/kon-agent/spool", max_size=Size(50 * MIB), min_free=Size(64 * MIB))
ROOM = SpoolFacts("/var/lib/kon-agent/spool", owner=990, free_bytes=1000 * MIB)
RUNNING = Status(
    agent_id="edge-1",
    version=__version__,
    pid=812,
    uptime_s=60.0,
    server=ServerStatus(address="quic://localhost:7843", state="connected", since=""),
    plugins=[PluginStatus(name="cpu", state="RUNNING", enabled=True, period_s=5.0)],
    spool=SpoolStatus(),
    resources=ResourceStatus(),
)


def test_a_running_agent_is_well() -> None:
    """It is told by its id, version and process."""
    found = judge_agent(RUNNING, None, SOCKET, "socket", "edge-1")
    assert ("ok", f"edge-1 runs, version {__version__}, pid 812") == (found.verdict, found.found)


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"agent_id": "edge-2"}, "fail", "the configuration is of edge-1"),
        ({"version": "0.0.0"}, "warn", "installed is"),
        ({"warnings": ["started without root", "another"]}, "warn", "started without root (and 1 more)"),
        (
            {"plugins": [PluginStatus(name="disk", state="FAILED", enabled=True, period_s=5.0)]},
            "fail",
            "does not run: disk",
        ),
    ],
)
def test_an_agent_in_trouble_says_so(change: dict[str, object], verdict: str, words: str) -> None:
    """Another's agent, an old one, one with warnings, one whose plugins die."""
    found = judge_agent(msgspec.structs.replace(RUNNING, **change), None, SOCKET, "socket", "edge-1")
    assert verdict == found.verdict
    assert words in found.found


@pytest.mark.parametrize(
    ("code", "kind", "verdict"),
    [
        ("not_running", "nothing", "ok"),
        ("not_running", "socket", "ok"),
        ("not_running", "other", "fail"),
        ("permission_denied", "socket", "warn"),
        ("timeout", "socket", "fail"),
        ("bad_reply", "socket", "fail"),
    ],
)
def test_silence_has_its_reasons(code: str, kind: str, verdict: str) -> None:
    """That no agent runs is none to fail; one that hangs is, and something else in the socket's place."""
    assert verdict == judge_agent(None, ControlError(code, "why", "what to do"), SOCKET, kind, "edge-1").verdict


def test_a_path_too_long_for_a_socket_fails() -> None:
    """The kernel's bound is one of bytes."""
    assert "fail" == judge_agent(None, None, "/" + "é" * 60, "nothing", None).verdict


@pytest.mark.parametrize(
    ("mode", "is_writable", "is_telling", "verdict"),
    [
        (0o755, True, True, "ok"),
        (0o1777, True, True, "ok"),
        (0o777, True, True, "warn"),
        (0o755, False, False, "warn"),
        (0o755, False, True, "fail"),
    ],
)
def test_a_socket_needs_a_folder_of_ours(mode: int, is_writable: bool, is_telling: bool, verdict: str) -> None:
    """One that the agent can write, and in which nobody else can replace it."""
    assert (
        verdict == judge_socket(FileFacts("/run/kon-agent", mode=stat.S_IFDIR | mode), is_writable, is_telling).verdict
    )


def test_a_file_is_no_folder_for_a_socket(tmp_path: Path) -> None:
    """Nor for the spool; what is there of the way is named."""
    (tmp_path / "file").write_text("")
    (found,) = host.check_socket(Patient(Config(), socket=str(tmp_path / "file" / "c.sock"), silence=NOBODY))
    assert ("fail", f"{tmp_path}/file: it is no folder") == (found.verdict, found.found)
    assert [] == list(host.check_socket(Patient(Config(), socket=SOCKET, silence=ControlError("timeout", "it hangs"))))
    assert f"{tmp_path}/file is no folder" == host._read_spool(str(tmp_path / "file" / "spool")).problem


def test_mistakes_are_counted_and_the_first_is_told() -> None:
    """The others are `check`'s to tell."""
    found = judge_configuration("agent.yaml", ["agent.yaml:1:1: a", "agent.yaml:2:1: b"])
    assert ("fail", "2 mistakes, the first: agent.yaml:1:1: a") == (found.verdict, found.found)
    assert "kon-agent check -c agent.yaml" in found.advice
    assert ("ok", "ok") == (judge_configuration("agent.yaml", []).verdict, judge_configuration(None, []).verdict)


@pytest.mark.parametrize(
    ("key", "mode", "verdict"),
    [
        ("key", 0o600, "ok"),
        ("key", 0o640, "warn"),
        ("key", 0o644, "fail"),
        ("token_file", 0o604, "fail"),
        ("cert", 0o644, "ok"),
        ("ca", 0o644, "ok"),
        ("ca", 0o666, "fail"),
    ],
)
def test_a_secret_is_for_its_owner(key: str, mode: int, verdict: str) -> None:
    """A key or token others read is as good as given away; an authority others write decides whom we trust."""
    facts = FileFacts("/etc/kon-agent/file", mode=stat.S_IFREG | mode, is_readable=True)
    assert verdict == judge_credential(key, facts, True).verdict


def test_a_file_we_cannot_read_tells_root_only() -> None:
    """An ordinary user's doctor does not know what the agent of root's can read."""
    closed = FileFacts("/etc/kon-agent/agent.key", mode=0o600)
    assert ("fail", "warn") == (
        judge_credential("key", closed, True).verdict,
        judge_credential("key", closed, False).verdict,
    )
    gone = FileFacts("/etc/kon-agent/agent.key", problem="No such file or directory")
    assert "fail" == judge_credential("key", gone, False).verdict


def test_the_content_of_a_secret_is_not_told(tmp_path: Path) -> None:
    """Its path and mode are."""
    token = tmp_path / "token"
    token.write_text("hunter2-hunter2-hunter2")
    token.chmod(0o644)
    (found,) = host.check_credentials(Patient(Config(tls=TlsConfig(token_file=str(token))), privileges=ROOT))
    assert ("file:tls.token_file", "fail") == (found.check, found.verdict)
    assert "hunter2" not in f"{found}"


def test_users_are_told() -> None:
    """A stand-in is worth a word, root a failure."""
    ours, stand_in = User("kon-agent", 990, 990), User("nobody", 65534, 65534, is_fallback=True)
    assert "ok" == judge_user("kon-agent", ours, "", "kon-agent", True).verdict
    assert "only root may" in judge_user("kon-agent", ours, "", "kon-agent", False).found
    assert "warn" == judge_user("kon-agent", stand_in, "", "kon-agent", True).verdict
    assert "fail" == judge_user("root", None, "user 'root' has uid 0; set `user:`", "kon-agent", True).verdict


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({}, "ok", "1000.0 MiB free"),
        ({"owner": None}, "ok", "the agent will make it"),
        ({"owner": 0}, "ok", "free"),
        ({"owner": 1234}, "fail", "belongs to uid 1234"),
        ({"free_bytes": 10 * MIB}, "fail", "less than cache.min_free"),
        ({"free_bytes": 100 * MIB}, "warn", "too little for a full spool"),
        ({"is_readonly": True}, "fail", "read-only"),
        ({"can_be_made": False}, "warn", "cannot be written by this user"),
        ({"problem": "it is closed to this user"}, "warn", "closed"),
        ({"holder": 55, "holder_parent": 812}, "ok", "free"),
        ({"holder": 55, "holder_parent": 7}, "fail", "in use by pid 55"),
        ({"holder": 0}, "fail", "in use by pid unknown"),
    ],
)
def test_the_spool_wants_room_and_its_own_folder(change: dict[str, object], verdict: str, words: str) -> None:
    """Its owner, its disk, and who else uses it; the sender of the agent asked may."""
    facts = SpoolFacts(**{**{name: getattr(ROOM, name) for name in ROOM.__slots__}, **change})
    found = judge_spool(facts, CACHE, 0, 990, 812)
    assert verdict == found.verdict
    assert words in found.found


def test_a_spool_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    """Its disk, its owner, who has its lock; one that is not there is not made."""
    absent = tmp_path / "deep" / "spool"
    facts = host._read_spool(str(absent))
    assert (None, True) == (facts.owner, facts.free_bytes > 0)
    assert [] == list(tmp_path.iterdir())
    folder_fd = os.open(tmp_path, os.O_RDONLY)
    held = lock.take(folder_fd)
    try:
        facts = host._read_spool(str(tmp_path))
        assert (os.getuid(), os.getpid(), os.getppid()) == (facts.owner, facts.holder, facts.holder_parent)
    finally:
        os.close(held)
        os.close(folder_fd)
    assert None is host._read_spool(str(tmp_path)).holder


def test_an_unset_clock_is_worth_a_word() -> None:
    """So is a kernel that does not tell."""
    state = ClockState(True, 0.0, 0.0, 0.012, 0.0, 37, TimeState.OK)
    assert ("ok", True) == (judge_clock(state, "").verdict, "12 ms" in judge_clock(state, "").found)
    unset = ClockState(False, 0.0, 0.0, 16.0, 16.0, 0, TimeState.ERROR)
    assert ("warn", "warn") == (judge_clock(unset, "").verdict, judge_clock(None, "EPERM").verdict)


def test_what_is_in_the_sockets_place_is_known(tmp_path: Path) -> None:
    """A socket, something else, or nothing."""
    path = tmp_path / "control.sock"
    assert "nothing" == host._kind(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert ("socket", "other") == (host._kind(str(path)), host._kind(str(tmp_path)))


def test_the_configuration_is_checked_whole(tmp_path: Path) -> None:
    """Every mistake counts, located as `check` does."""
    path = tmp_path / "agent.yaml"
    path.write_text("plugins: {cpu: {period: never}}\nuser: 7\n")
    (found,) = host.check_configuration(Patient(Config(), config_path=str(path), is_valid=False))
    assert "fail" == found.verdict
    assert found.found.startswith(f"2 mistakes, the first: {path}:1:")
