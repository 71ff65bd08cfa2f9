"""Loaded counters go from one supervisor to the next: attachments, slots and the kernel's table are what they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kon_agent.bpf import handover, hooks, layout, libbpf, loader, net
from kon_agent.bpf.net import NetCounters
from kon_agent.errors import BpfError
from tests.unit.bpf.test_net import Kernel

CPUS = 1024  # four slots
Adopt = Callable[[], NetCounters | None]


@pytest.fixture
def object_path(tmp_path: Path) -> Path:
    """Return an object file."""
    path = tmp_path / "object.o"
    path.write_bytes(b"programs and maps")
    return path


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Return a kernel made of answers, which is the library's as well."""
    kernel = Kernel()
    monkeypatch.setattr(kernel, "possible_cpus", lambda: CPUS)
    monkeypatch.setattr(libbpf, "library", lambda: kernel)
    monkeypatch.setattr(net, "_map_counters", lambda fd, cpus: memoryview(bytes(layout.COUNTERS_BYTES)))
    return kernel


@pytest.fixture
def old(kernel: Kernel, object_path: Path) -> Iterator[NetCounters]:
    """Return counters with two interfaces watched and one that was."""
    names = ("counters", "interfaces", "kon_xdp_ingress", "kon_tc_egress")
    fds = {name: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for name in names}
    memory = memoryview(bytes(layout.COUNTERS_BYTES))
    counters = NetCounters(kernel, fds, memory, CPUS, loader.digest_of(str(object_path)))
    counters.attach(7, "eth0")
    counters.attach(9, "gone\udcff")
    counters.attach(7 + layout.BUCKETS, "eth1")
    counters.detach(9)
    yield counters
    counters.close()


def duplicated(taken: handover.Counters) -> handover.Counters:
    """Return it as it arrives in another process: through JSON, with descriptors of its own."""
    arrived = msgspec.json.decode(msgspec.json.encode(taken), type=handover.Counters)
    return msgspec.structs.replace(
        arrived,
        fds={name: os.dup(fd) for name, fd in arrived.fds.items()},
        watched=[
            msgspec.structs.replace(watched, link_fds=[os.dup(fd) for fd in watched.link_fds])
            for watched in arrived.watched
        ],
    )


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_they_go_on(old: NetCounters, kernel: Kernel, object_path: Path) -> None:
    """Nothing is attached anew; an interface that comes, goes or returns finds the table as it was left."""
    before, links, table = open_descriptors(), len(kernel.links), dict(kernel.table)
    new = NetCounters.adopt(duplicated(old.capture()), str(object_path))
    assert new is not None
    assert (old.attachments(), old.table(), links) == (new.attachments(), new.table(), len(kernel.links))
    assert old.capture().free == new.capture().free
    new.attach(7 + 2 * layout.BUCKETS, "eth2")
    assert kernel.table.items() > table.items()
    assert 1 == new.attach(9, "gone\udcff").slot
    new.detach(7)
    assert 7 not in kernel.table
    new.close()
    assert before == open_descriptors()


def test_another_object_is_not_gone_on_with(old: NetCounters, kernel: Kernel, object_path: Path) -> None:
    """Its programs count into other maps: everything is detached."""
    taken, before = old.capture(), open_descriptors()
    object_path.write_bytes(b"other programs and maps")
    assert None is NetCounters.adopt(duplicated(taken), str(object_path))
    assert before == open_descriptors()


def test_without_an_object_everything_is_detached(old: NetCounters, kernel: Kernel, object_path: Path) -> None:
    """No descriptor stays open where the new code cannot go on: it would keep a program attached."""
    taken, before = old.capture(), open_descriptors()
    object_path.unlink()
    with pytest.raises(BpfError, match="cannot read BPF object"):
        NetCounters.adopt(duplicated(taken), str(object_path))
    assert before == open_descriptors()


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return the interfaces whose clsact filter is taken away, and whether the qdisc was ours."""
    removed: list[tuple[int, bool]] = []
    for module in (handover, hooks):
        monkeypatch.setattr(module, "remove_filter", lambda ifindex, has_added: removed.append((ifindex, has_added)))
    return removed


def with_filter(taken: handover.Counters) -> handover.Counters:
    """Return it as it would be without TCX: the way out of the first interface has a filter, and no link."""
    first, *others = taken.watched
    os.close(first.link_fds[1])
    told = msgspec.structs.replace(first.attachment, egress_mode="clsact", egress_reason="no TCX")
    first = msgspec.structs.replace(first, attachment=told, link_fds=first.link_fds[:1], has_added_qdisc=True)
    return msgspec.structs.replace(taken, watched=[first, *others])


def test_a_filter_goes_on_and_goes_away(
    old: NetCounters, object_path: Path, removed: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set anew over itself, known to be ours, and taken away with its interface."""
    renewed: list[int] = []
    monkeypatch.setattr(hooks.Hooks, "_put_filter", lambda self, ifindex, **_: renewed.append(ifindex))
    new = NetCounters.adopt(with_filter(duplicated(old.capture())), str(object_path))
    assert new is not None
    assert ([7], "clsact", []) == (renewed, new.attachment(7).egress_mode, removed)
    new.close()
    assert [(7, True)] == removed


def test_a_filter_is_not_left_behind(
    old: NetCounters, kernel: Kernel, object_path: Path, removed: list[tuple[int, bool]]
) -> None:
    """Where the new code cannot go on, the filter is taken away as the links are."""
    taken, before = old.capture(), open_descriptors()
    object_path.write_bytes(b"other programs and maps")
    assert None is NetCounters.adopt(with_filter(duplicated(taken)), str(object_path))
    assert ([(7, True)], before) == (removed, open_descriptors())
