"""What eBPF needs of a kernel, judged from facts."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kon_agent.doctor import kernel
from kon_agent.doctor.finding import Finding
from kon_agent.doctor.kernel import (
    judge_btf,
    judge_capabilities,
    judge_jit,
    judge_kernel,
    judge_libbpf,
    judge_lockdown,
    judge_memlock,
    judge_object,
    judge_unprivileged_bpf,
    parse_memlock,
    version_of,
)
from kon_agent.doctor.patient import privileges_of
from kon_agent.linux.privileges import Privileges, current_privileges

BTF_HEAD = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 4096, 4096, 4096)
ALL = {"CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"}


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.5-amd64", (6, 12)), ("5.10.0", (5, 10)), ("4.19.0-27-cloud", (4, 19)), ("none", (0, 0))],
)
def test_a_release_has_a_version(release: str, version: tuple[int, int]) -> None:
    """The first two numbers count, as numbers."""
    assert version == version_of(release)


@pytest.mark.parametrize(
    ("release", "verdict", "lacks"),
    [
        ("6.6.1", "ok", ""),
        ("6.5.9", "warn", "TCX), from 6.6 on"),
        ("5.8.0", "warn", "links), from 5.9 on"),
        ("5.4.0", "warn", "mapping them, from 5.5 on"),
        ("4.19.0", "fail", "pidfd_open"),
    ],
)
def test_an_old_kernel_lacks_what_came_later(release: str, verdict: str, lacks: str) -> None:
    """Each feature is named with the kernel it takes; only one without which nothing runs is a failure."""
    found = judge_kernel(release)
    assert verdict == found.verdict
    assert lacks in found.found


def test_btf_is_there() -> None:
    """A kernel's BTF is known by its header."""
    assert "ok" == judge_btf(BTF_HEAD, "", ["tcp"]).verdict


@pytest.mark.parametrize("head", [b"", BTF_HEAD[:10], b"\0" * 24, b"\xff" + BTF_HEAD[1:]])
def test_a_file_that_holds_no_btf_is_said_to(head: bytes) -> None:
    """Whatever it holds instead."""
    found = judge_btf(head, "", ["tcp"])
    assert ("fail", True) == (found.verdict, "holds no BTF" in found.found)


@pytest.mark.parametrize(("wanting", "verdict"), [(["tcp", "drops"], "fail"), ([], "warn")])
def test_hidden_btf_matters_to_who_needs_it(wanting: list[str], verdict: str) -> None:
    """It fails where a plugin is enabled that can do without it only by procfs; that plugin is named."""
    found = judge_btf(b"", "/sys/kernel/btf/vmlinux does not exist", wanting)
    assert verdict == found.verdict
    assert all(plugin in found.found for plugin in wanting)
    assert "CONFIG_DEBUG_INFO_BTF" in found.advice


def test_btf_is_read_from_the_kernel(tmp_path: Path) -> None:
    """What the file holds, or why it cannot be had, in words."""
    assert (b"", "/sys/kernel/btf/vmlinux does not exist") == kernel._read_btf(str(tmp_path))
    folder = tmp_path / "sys/kernel/btf"
    folder.mkdir(parents=True)
    (folder / "vmlinux").write_bytes(BTF_HEAD + bytes(100))
    assert (BTF_HEAD, "") == kernel._read_btf(str(tmp_path))


def test_which_libbpf_is_said() -> None:
    """The one within pylibbpf, or the system's, with its version and place."""
    ours = judge_libbpf("v1.6", "/lib/python3.11/site-packages/pylibbpf/pylibbpf.so", "", ["ebpf"])
    system = judge_libbpf("v1.1", "libbpf.so.1", "", ["ebpf"])
    assert ("ok", True) == (ours.verdict, ours.found.startswith("pylibbpf's libbpf v1.6"))
    assert ("ok", True) == (system.verdict, system.found.startswith("the system's libbpf v1.1"))


@pytest.mark.parametrize(("wanting", "verdict"), [(["ebpf"], "fail"), ([], "warn")])
def test_no_libbpf_says_what_to_install(wanting: list[str], verdict: str) -> None:
    """In the loader's words; harmless where no plugin wants it."""
    found = judge_libbpf("", "", "there is no libbpf; install the system's libbpf", wanting)
    assert Finding("libbpf", verdict, "there is no libbpf", "install the system's libbpf") == found  # type: ignore[arg-type]


def test_an_object_that_loads_is_well() -> None:
    """So it is said, with the programs that have no place in this kernel where there are some."""
    assert "ok" == judge_object("tcp", "", [], True).verdict
    lacking = judge_object("tcp", "", ["kon_tcp_reset"], True)
    assert ("warn", True) == (lacking.verdict, "kon_tcp_reset" in lacking.found)


def test_a_refused_object_tells_the_verifiers_words() -> None:
    """On one line; it fails only where this process may what the agent may."""
    words = "cannot load BPF object kon_net: EPERM\nlibbpf says: R1 pointer\n  prohibited"
    found = judge_object("ebpf", words, [], True)
    assert ("object:ebpf", "fail") == (found.check, found.verdict)
    assert "EPERM | libbpf says: R1 pointer | prohibited" in found.found
    assert "warn" == judge_object("ebpf", words, [], False).verdict


def test_an_endless_story_is_cut() -> None:
    """A verifier's log of megabytes still makes a line."""
    assert len(judge_object("ebpf", "x" * 100_000, [], True).found) < 1100


def test_all_capabilities_are_well() -> None:
    """Those split off CAP_SYS_ADMIN may come by it."""
    assert "ok" == judge_capabilities(root(ALL), "the agent", True).verdict
    without = ALL - {"CAP_BPF", "CAP_PERFMON"} | {"CAP_SYS_ADMIN"}
    assert "ok" == judge_capabilities(root(without), "the agent", True).verdict


@pytest.mark.parametrize("capability", sorted(ALL))
def test_a_missing_capability_is_named_with_what_it_is_for(capability: str) -> None:
    """And granting it is the advice."""
    found = judge_capabilities(root(ALL - {capability}), "the agent", True)
    assert "fail" == found.verdict
    assert f"{capability} (" in found.found
    assert capability in found.advice


def test_capabilities_nobody_needs_are_not_asked_for() -> None:
    """Without a BPF plugin, those for BPF."""
    assert "ok" == judge_capabilities(root({"CAP_SETUID", "CAP_SETGID", "CAP_KILL"}), "the agent", False).verdict


def test_an_ordinary_user_needs_no_capability() -> None:
    """An agent of such a user runs, with less; nor does such a doctor know what root would have."""
    found = judge_capabilities(Privileges(1000, frozenset()), "this process", True)
    assert ("warn", True) == (found.verdict, "as root" in found.advice)


def test_the_running_agents_capabilities_are_read() -> None:
    """Of any process, from /proc."""
    assert current_privileges() == privileges_of(os.getpid())


def root(held: set[str]) -> Privileges:
    """Return root with these capabilities."""
    return Privileges(0, frozenset(held))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[none] integrity confidentiality\n", "ok"),
        ("none [integrity] confidentiality\n", "ok"),
        ("none integrity [confidentiality]\n", "fail"),
        (None, "ok"),
    ],
)
def test_only_confidentiality_is_in_the_way(text: str | None, verdict: str) -> None:
    """The stricter of the two lockdowns forbids BPF to read the kernel's memory."""
    assert verdict == judge_lockdown(text).verdict


@pytest.mark.parametrize("text", ["0\n", "1\n", "2\n", None])
def test_unprivileged_bpf_is_information(text: str | None) -> None:
    """The agent's own programs are loaded by the privileged."""
    assert "ok" == judge_unprivileged_bpf(text).verdict


@pytest.mark.parametrize(
    ("release", "limit", "verdict"),
    [
        ("5.11.0", 65536, "ok"),
        ("5.10.0", 65536, "fail"),
        ("5.10.0", 64 << 20, "ok"),
        ("5.10.0", None, "ok"),
    ],
)
def test_locked_memory_counts_on_old_kernels(release: str, limit: int | None, verdict: str) -> None:
    """From 5.11 on the control group bounds BPF memory."""
    assert verdict == judge_memlock(release, limit, "the agent").verdict


def test_the_limit_of_locked_memory_is_read() -> None:
    """From the table of /proc/PID/limits, whose words are separated by blanks; `unlimited` is none."""
    text = "Max processes             96365   96365   processes\nMax locked memory         65536   8388608   bytes\n"
    assert 65536 == parse_memlock(text)
    assert None is parse_memlock(text.replace("65536", "unlimited"))
    assert None is parse_memlock("")


@pytest.mark.parametrize(("text", "verdict"), [("1\n", "ok"), ("2\n", "ok"), ("0\n", "warn"), (None, "ok")])
def test_an_idle_compiler_is_worth_a_word(text: str | None, verdict: str) -> None:
    """Interpreted programs work, and cost several times as much."""
    found = judge_jit(text)
    assert verdict == found.verdict
    assert ("bpf_jit_enable=1" in found.advice) == (verdict == "warn")
