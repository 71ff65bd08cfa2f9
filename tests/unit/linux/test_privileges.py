"""Users, capabilities, and what is missing. (The drop itself is tested on real children: test_process.)"""

from __future__ import annotations

import os
import pwd

import pytest

from kon_agent.errors import PrivilegeError
from kon_agent.linux import privileges
from kon_agent.linux.privileges import Privileges, User, resolve_user


def entry(name: str, uid: int, gid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/false"))


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> dict[str, pwd.struct_passwd]:
    table = {"agent": entry("agent", 990, 991), "nobody": entry("nobody", 65534, 65534)}
    monkeypatch.setattr(pwd, "getpwnam", lambda name: table[name])
    return table


def test_a_user_is_found_by_name(users: dict[str, pwd.struct_passwd]) -> None:
    """The user asked for, where it exists."""
    assert User("agent", 990, 991) == resolve_user("agent")


def test_nobody_stands_in(users: dict[str, pwd.struct_passwd]) -> None:
    """An unknown user becomes nobody, and the caller can tell."""
    assert User("nobody", 65534, 65534, is_fallback=True) == resolve_user("kon-agent")


def test_no_user_at_all_is_an_error(users: dict[str, pwd.struct_passwd]) -> None:
    """Without nobody, the message says how to make the user."""
    del users["nobody"]
    with pytest.raises(PrivilegeError, match="useradd -r kon-agent"):
        resolve_user("kon-agent")


@pytest.mark.parametrize(("uid", "gid"), [(0, 0), (0, 5), (5, 0)])
def test_root_is_refused_under_any_name(users: dict[str, pwd.struct_passwd], uid: int, gid: int) -> None:
    """uid 0 and root's group are root, however they are called."""
    users["toor"] = entry("toor", uid, gid)
    with pytest.raises(PrivilegeError, match="toor"):
        resolve_user("toor")


def test_capability_names_follow_their_bits() -> None:
    """Bits 12, 38 and 39 of a set, as linux/capability.h numbers them."""
    assert {"CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"} == privileges._parse_capabilities("000000c000001000")


def test_what_is_missing_is_named_in_order() -> None:
    """The supervisor's message lists what it lacks."""
    has = Privileges(1000, frozenset({"CAP_NET_ADMIN"}))
    assert ("CAP_BPF", "CAP_PERFMON") == has.missing("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")


def test_both_ids_are_needed_to_change_the_user() -> None:
    """CAP_SETUID alone would leave root's group behind."""
    assert not Privileges(0, frozenset({"CAP_SETUID"})).can_change_user
    assert Privileges(0, frozenset({"CAP_SETUID", "CAP_SETGID"})).can_change_user


def test_verification_notices_that_nothing_was_dropped() -> None:
    """A process that dropped nothing does not pass."""
    with pytest.raises(PrivilegeError, match="after the drop"):
        privileges.verify_dropped(os.getuid(), os.getgid(), is_user_changed=False, is_bounding_set_dropped=True)
