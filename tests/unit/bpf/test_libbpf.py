"""kon_agent.bpf.libbpf: what is missing is said, and errors carry their errno."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator

import pytest

from kon_agent.bpf import libbpf
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError


@pytest.fixture
def without_pylibbpf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    libbpf.pylibbpf_module.cache_clear()
    libbpf.library.cache_clear()
    yield
    libbpf.pylibbpf_module.cache_clear()
    libbpf.library.cache_clear()


@pytest.mark.usefixtures("without_pylibbpf")
def test_without_pylibbpf_only_loading_fails_and_says_so() -> None:
    """A platform without a wheel imports this package; `load` names what is missing."""
    with pytest.raises(BpfError, match="pylibbpf is not installed"):
        NetCounters.load()


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
