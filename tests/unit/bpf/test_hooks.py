"""kon_agent.bpf.hooks: what is tried in which order, whom it yields to, and what is taken away in the end."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from kon_agent.bpf import hooks, layout, surroundings
from kon_agent.bpf.hooks import TC_HANDLE, TC_PROGRAM, XDP_PROGRAM, Hooks, Ingress, reason_of, remove_filter
from kon_agent.bpf.surroundings import Occupant
from kon_agent.linux import tc
from kon_agent.linux.tc import Filter
from tests.unit.bpf.test_net import GENERIC, NATIVE, TCX, Kernel

PROGRAMS = {XDP_PROGRAM: 100, TC_PROGRAM: 101}
OURS = Filter(1, TC_HANDLE, "bpf", TC_PROGRAM, 55)
THEIRS = Filter(1, 1, "bpf", "theirs", 56)


@dataclass
class Shaper:
    """An interface's clsact qdisc, and what was done to it."""

    kind: str = ""
    found: list[Filter] = field(default_factory=list)
    log: list[tuple[object, ...]] = field(default_factory=list)

    def add_clsact(self, ifindex: int) -> bool:
        self.log.append(("add",))
        has_added = not self.kind
        self.kind = self.kind or "clsact"
        return has_added

    def qdisc_kind(self, ifindex: int) -> str:
        return self.kind

    def delete_clsact(self, ifindex: int) -> None:
        self.log.append(("delete",))

    def filters(self, ifindex: int, parent: int = tc.EGRESS) -> list[Filter]:
        return self.found if parent == tc.EGRESS else []

    def set_filter(self, ifindex: int, priority: int, handle: int, program_fd: int, name: str) -> None:
        self.log.append(("set", priority, handle, program_fd, name))

    def delete_filter(self, ifindex: int, priority: int, handle: int) -> None:
        self.log.append(("delete filter", priority, handle))
        self.found = [each for each in self.found if (each.priority, each.handle) != (priority, handle)]


@pytest.fixture
def shaper(monkeypatch: pytest.MonkeyPatch) -> Shaper:
    """Return an interface without any qdisc; nobody has our programs."""
    shaper = Shaper()
    for name in ("add_clsact", "qdisc_kind", "delete_clsact", "filters", "set_filter", "delete_filter"):
        monkeypatch.setattr(tc, name, getattr(shaper, name))
    monkeypatch.setattr(surroundings, "is_unattended", lambda program_id: True)
    return shaper


@pytest.fixture
def kernel() -> Kernel:
    """Return one without TCX."""
    kernel = Kernel()
    kernel.refusals = {TCX: errno.EINVAL}
    return kernel


def egress(kernel: Kernel, ingress: Ingress | None = None) -> hooks.Egress:
    return Hooks(kernel, PROGRAMS, looks_around=True).attach_egress(7, ingress or Ingress("generic"))


def test_without_tcx_a_filter(kernel: Kernel, shaper: Shaper) -> None:
    """In a qdisc that is added for it."""
    found = egress(kernel)
    assert ("clsact", True) == (found.mode, found.has_added_qdisc)
    assert [("add",), ("set", 1, TC_HANDLE, 101, TC_PROGRAM)] == shaper.log


def test_a_stale_filter_is_replaced_where_it_is(kernel: Kernel, shaper: Shaper) -> None:
    """Ours by name and handle, at its priority; the qdisc is nobody's now, so it stays in the end."""
    shaper.kind, shaper.found = "clsact", [Filter(3, TC_HANDLE, "bpf", TC_PROGRAM, 55), THEIRS]
    assert not egress(kernel).has_added_qdisc
    assert ("set", 3, TC_HANDLE, 101, TC_PROGRAM) == shaper.log[-1]


def test_beside_foreign_filters(kernel: Kernel, shaper: Shaper) -> None:
    """At the first priority that nobody has, even where somebody has our handle."""
    shaper.kind, shaper.found = "clsact", [THEIRS, Filter(2, TC_HANDLE, "bpf", "theirs", 57)]
    egress(kernel)
    assert ("set", 3, TC_HANDLE, 101, TC_PROGRAM) == shaper.log[-1]


@pytest.mark.parametrize(("kind", "found", "is_unattended"), [("ingress", [], True), ("clsact", [OURS], False)])
def test_busy(
    kernel: Kernel,
    shaper: Shaper,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    found: list[Filter],
    is_unattended: bool,
) -> None:
    """Nothing is set where the qdisc is of another kind, or a living agent has its filter."""
    shaper.kind, shaper.found = kind, found
    monkeypatch.setattr(surroundings, "is_unattended", lambda program_id: is_unattended)
    refused = egress(kernel)
    assert ("none", "busy") == (refused.mode, refused.reason[:4])
    assert [("add",)] == shaper.log


def test_another_agents_interface(kernel: Kernel, shaper: Shaper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program on the way in says that the filter on the way out is in use."""
    monkeypatch.setattr(surroundings, "name_of", lambda program_id: XDP_PROGRAM)
    found = egress(kernel, Ingress("none", occupant_id=9))
    assert ("none", "busy: another kon-agent counts this interface") == (found.mode, found.reason)
    assert [] == shaper.log


@pytest.mark.parametrize(
    ("found", "has_added", "expected"),
    [
        ([OURS], True, [("delete filter", 1, TC_HANDLE), ("delete",)]),
        ([OURS], False, [("delete filter", 1, TC_HANDLE)]),
        ([OURS, THEIRS], True, [("delete filter", 1, TC_HANDLE)]),
        ([THEIRS], True, []),
        ([], True, [("delete",)]),
    ],
)
def test_removal(shaper: Shaper, found: list[Filter], has_added: bool, expected: list[object]) -> None:
    """Our filter goes, and the qdisc if it is ours and empty."""
    shaper.found = list(found)
    remove_filter(7, has_added)
    assert expected == shaper.log


def test_a_bond_is_never_native() -> None:
    """It would refuse its ports then."""
    kernel = Kernel()
    found = Hooks(kernel, PROGRAMS, looks_around=False).attach_ingress(7, hooks.BOND)
    assert "generic" == found.mode
    assert [GENERIC] == kernel.links
    found.release()


def test_who_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is named; where the device has none it is one above."""
    kernel = Kernel()
    kernel.refusals = {NATIVE: errno.EEXIST}
    made = Hooks(kernel, PROGRAMS, looks_around=True)
    monkeypatch.setattr(surroundings, "xdp_occupant", lambda ifindex: Occupant(42, "drop_all", "generic"))
    named = made.attach_ingress(7)
    assert "busy: generic program 42 drop_all is attached, EEXIST: File exists" == named.reason
    assert not made.has_way_cleared(7, named)
    monkeypatch.setattr(surroundings, "xdp_occupant", lambda ifindex: None)
    assert made.has_way_cleared(7, named)
    assert "busy: a device above has a program, EEXIST: File exists" == made.attach_ingress(7).reason


@pytest.mark.parametrize("is_stale", [True, False])
def test_our_own_name(monkeypatch: pytest.MonkeyPatch, is_stale: bool) -> None:
    """A program of our name is taken away where nobody answers for it, and only then."""
    kernel = Kernel()
    kernel.refusals = {NATIVE: errno.EBUSY}

    def evict(ifindex: int, occupant: Occupant) -> bool:
        if is_stale:
            kernel.refusals = {}
        return is_stale

    monkeypatch.setattr(surroundings, "xdp_occupant", lambda ifindex: Occupant(42, XDP_PROGRAM, "native"))
    monkeypatch.setattr(surroundings, "evict_orphaned", evict)
    found = Hooks(kernel, PROGRAMS, looks_around=True).attach_ingress(7)
    assert ("native" if is_stale else "none") == found.mode
    found.release()


def test_a_reason_is_a_label() -> None:
    """It has the errno's name, and an end."""
    assert "EOPNOTSUPP: Operation not supported" == reason_of(errno.EOPNOTSUPP)
    assert layout.MAX_REASON_CHARS == len(reason_of(errno.EBUSY, "x" * 500))
