"""kon_agent.bpf.libbpf: what is missing is said, and errors carry their errno."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from kon_agent.bpf import libbpf
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let the library be looked for anew; afterwards, too."""
    libbpf.library.cache_clear()
    yield monkeypatch
    libbpf.library.cache_clear()


def test_pylibbpfs_is_taken_where_it_is_installed(choose: pytest.MonkeyPatch) -> None:
    """Its version is the one this project is tried with most."""
    choose.delenv(libbpf.CHOICE_VARIABLE, raising=False)
    if importlib.util.find_spec("pylibbpf") is None:
        pytest.skip("needs pylibbpf, which has no wheel for this Python")
    assert "pylibbpf" in libbpf.library().path


def test_the_systems_is_taken_where_pylibbpf_is_not(choose: pytest.MonkeyPatch) -> None:
    """A platform without a wheel goes on with libbpf.so.1."""
    choose.delenv(libbpf.CHOICE_VARIABLE, raising=False)
    choose.setattr(importlib.util, "find_spec", lambda name: None)
    assert "libbpf.so.1" == libbpf.library().path


def test_without_any_only_loading_fails_and_says_what_to_install(choose: pytest.MonkeyPatch) -> None:
    """A machine without libbpf imports this package; `load` names what is missing."""
    choose.delenv(libbpf.CHOICE_VARIABLE, raising=False)
    choose.setattr(importlib.util, "find_spec", lambda name: None)
    choose.setattr(libbpf, "_SYSTEM", "libbpf-of-nobody.so.1")
    with pytest.raises(BpfError, match=r"pylibbpf is not installed .* libbpf-of-nobody.* apt install libbpf1"):
        NetCounters.load()


@pytest.mark.parametrize("choice", ["pylibbpf", "system"])
def test_one_can_be_asked_for(choose: pytest.MonkeyPatch, choice: str) -> None:
    """The variable decides; the other one is no way out."""
    choose.setenv(libbpf.CHOICE_VARIABLE, choice)
    choose.setattr(importlib.util, "find_spec", lambda name: None)
    choose.setattr(libbpf, "_SYSTEM", "libbpf-of-nobody.so.1")
    with pytest.raises(BpfError) as refused:
        libbpf.library()
    assert (choice == "pylibbpf") == ("pylibbpf is not installed" in str(refused.value))
    assert (choice == "system") == ("libbpf-of-nobody" in str(refused.value))


def test_an_unknown_choice_is_named(choose: pytest.MonkeyPatch) -> None:
    """A typing error does not end in another library than meant."""
    choose.setenv(libbpf.CHOICE_VARIABLE, "mine")
    with pytest.raises(BpfError, match="'mine'; it may be 'pylibbpf' or 'system'"):
        libbpf.library()


def test_a_library_without_the_functions_is_named_with_what_it_lacks() -> None:
    """Another libbpf than expected fails at the start, not in the middle of an attach."""
    with pytest.raises(BpfError, match=r"libm\.so\.6 lacks libbpf's bpf_link_create"):
        libbpf.Library("libm.so.6")


def test_a_library_that_is_not_there_is_an_error() -> None:
    """The path and the linker's reason are told."""
    with pytest.raises(BpfError, match=r"/nonexistent\.so"):
        libbpf.Library("/nonexistent.so")


def test_the_log_keeps_the_verifiers_verdict() -> None:
    """The lines before the end are shown, without register states and statistics."""
    log = libbpf.Log()
    log.append("libbpf: prog 'p': BPF program load failed: EACCES\nlibbpf: prog 'p': -- BEGIN PROG LOAD LOG --\n")
    log.append("0: (85) call 5  ; R0_w=scalar()\nR0 invalid mem access\nprocessed 2 insns\n-- END PROG LOAD LOG --\n")
    assert log.useful_lines().endswith("R0 invalid mem access")


def test_the_log_is_bounded() -> None:
    """A verifier log of any length costs a bounded amount of memory, and keeps its end."""
    log = libbpf.Log()
    log.append("x" * libbpf.MAX_LOG_BYTES)
    log.append("the end")
    assert libbpf.MAX_LOG_BYTES == len(log.text)
    assert log.text.endswith("the end")


def test_errno_text_uses_the_kernels_word() -> None:
    """95 has two names in errno.h; the network's is shown."""
    assert "EOPNOTSUPP: Operation not supported" == libbpf.errno_text(errno.EOPNOTSUPP)
    assert libbpf.errno_text(524).startswith("errno 524: ")


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0-3,8-11\n", 12), ("0,2\n", 3)])
def test_every_cpu_number_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, count: int) -> None:
    """Numbers may be missing in between: there must be a row up to the last one."""
    (tmp_path / "possible").write_text(text)
    monkeypatch.setattr(libbpf, "POSSIBLE_CPUS", str(tmp_path / "possible"))
    assert count == libbpf.Library.possible_cpus(libbpf.Library.__new__(libbpf.Library))
